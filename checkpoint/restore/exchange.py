"""Images of other nodes: their owners send them through the job's own group, once, to all who need them.

For a replicated model every node needs every piece, so one broadcast per image moves no byte twice over a link that
the ranks' group would not use anyway; of a sharded one only the blocks that anybody needs are sent. One window at a
time: received, compared with the digests of the image (law 5), sent again if a rank did not get what was sent, and only
then written. On the training thread; collective.
"""

from collections.abc import Callable, Collection, Mapping, Sequence

import torch

from resilient.checkpoint.digest import BLOCK_BYTES, block_count, damaged_blocks
from resilient.checkpoint.restore.scatter import Range, Scatter
from resilient.checkpoint.restore.source import InMemory
from resilient.checkpoint.world import World
from resilient.errors import DamagedImage

_WINDOW_BYTES = 8 * BLOCK_BYTES
_ATTEMPTS = 3


def receive_remote(world: World, ranges: Sequence[Range], own: InMemory | None) -> int:
    """Fill `ranges`, whose images lie on other nodes. Collective, also for ranks that need nothing. Returns bytes.

    `own` is this rank's verified image; None where no other rank needs it.
    Raises DamagedImage on every rank when bytes arrive wrong again and again; the state is partly overwritten then.
    """
    if world.group is None or len(set(world.nodes)) == 1:
        return 0
    wanted: dict[int, set[int]] = {}
    for needs in world.gather({str(source): runs_of(blocks) for source, blocks in _blocks_by_image(ranges).items()}):
        for source, runs in needs.items():
            wanted.setdefault(int(source), set()).update(
                number for first, stop in runs for number in range(first, stop)
            )
    mine = sorted(wanted.get(world.rank, ()))
    assert own is not None or not mine, "a rank that others need holds its image"
    told = world.gather([own.record.image_bytes, [own.record.blocks[number] for number in mine]] if own else [0, []])
    loaded = 0
    for source in sorted(wanted):
        size, digests = told[source]
        blocks = dict(zip(sorted(wanted[source]), digests, strict=True))
        spans = [span for span in ranges if span.image_rank == source]
        loaded += _receive_image(world, source, size, blocks, spans, own)
    return loaded


def runs_of(blocks: Collection[int]) -> list[list[int]]:
    """Numbers as runs [first, stop) of those that follow one another, ascending."""
    runs: list[list[int]] = []
    for number in sorted(blocks):
        if runs and runs[-1][1] == number:
            runs[-1][1] += 1
        else:
            runs.append([number, number + 1])
    return runs


def _blocks_by_image(ranges: Sequence[Range]) -> dict[int, set[int]]:
    """Which blocks of which image hold these ranges."""
    found: dict[int, set[int]] = {}
    for span in ranges:
        if span.nbytes:
            numbers = range(span.offset // BLOCK_BYTES, -(-(span.offset + span.nbytes) // BLOCK_BYTES))
            found.setdefault(span.image_rank, set()).update(numbers)
    return found


def _receive_image(
    world: World, source: int, size: int, digests: Mapping[int, str], ranges: Sequence[Range], own: InMemory | None
) -> int:
    """The blocks of an image that have a digest here, which are those that any rank wants."""
    window = torch.empty(min(_WINDOW_BYTES, size), dtype=torch.uint8)
    blocks = [digests.get(number, "") for number in range(block_count(size))]
    scatter = Scatter(ranges)
    for first, stop in runs_of(digests):
        end = min(stop * BLOCK_BYTES, size)
        for begin in range(first * BLOCK_BYTES, end, _WINDOW_BYTES):
            part = window[: min(_WINDOW_BYTES, end - begin)]
            _receive_window(world, source, begin, part, blocks, own)
            scatter.take(begin, part.numpy().data)
    return scatter.nbytes


def _receive_window(
    world: World, source: int, begin: int, part: torch.Tensor, blocks: Sequence[str], own: InMemory | None
) -> None:
    """Fill `part` on every rank, from the image that its rank holds."""

    def fill(begin: int, part: torch.Tensor) -> str:
        assert own is not None, "a rank that others need holds its image"
        part.copy_(torch.frombuffer(bytearray(own.view[begin : begin + len(part)]), dtype=torch.uint8))
        return ""

    bad = send_window(world, source, begin, part, blocks, fill)
    ranks = [rank for rank, numbers in enumerate(bad) if numbers]
    if ranks:
        raise DamagedImage(
            f"blocks {bad[ranks[0]]} of the image of rank {source} arrived damaged at rank {ranks[0]}, {_ATTEMPTS} "
            "times: the state is partly overwritten, so do not train on; check memory and network of these nodes, and "
            "restart"
        )


def send_window(
    world: World,
    source: int,
    begin: int,
    part: torch.Tensor,
    blocks: Sequence[str],
    fill: Callable[[int, torch.Tensor], str],
) -> list[list[int] | str]:
    """Broadcast whole blocks of an image, from offset `begin` on, into `part` on every rank; verified there.

    `fill(begin, part)` brings them from the image, on the rank `source`, or says why that failed. They agree on whether
    they arrived, since one rank alone cannot repeat a broadcast. Returns, of each rank, the numbers of the blocks that
    arrived damaged in the last attempt, or why it could not fill them: nothing, when all have them.
    """
    problems: list[list[int] | str] = []
    for _ in range(_ATTEMPTS):
        problem = fill(begin, part) if world.rank == source else ""
        world.broadcast(part, source)
        problems = world.gather(problem or damaged_blocks(part.numpy().data, blocks, begin))
        if not any(problems):
            break
    return problems
