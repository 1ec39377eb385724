"""Images of other nodes: their owners send them through the job's own group, once, to all who need them.

For a replicated model every node needs every piece, so one broadcast per image moves no byte twice over a link that
the ranks' group would not use anyway. One window at a time: received, compared with the digests of the image (law 5),
sent again if a rank did not get what was sent, and only then written. On the training thread; collective.
"""

from collections.abc import Callable, Sequence

import torch

from resilient.checkpoint.digest import BLOCK_BYTES, damaged_blocks
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
    sent = [0, []] if own is None else [own.record.image_bytes, list(own.record.blocks)]
    needs = world.gather([sorted({span.image_rank for span in ranges}), *sent])
    loaded = 0
    for source in sorted({rank for wanted, _, _ in needs for rank in wanted}):
        mine = [span for span in ranges if span.image_rank == source]
        _, size, blocks = needs[source]
        loaded += _receive_image(world, source, size, blocks, mine, own)
    return loaded


def _receive_image(
    world: World, source: int, size: int, blocks: Sequence[str], ranges: Sequence[Range], own: InMemory | None
) -> int:
    window = torch.empty(min(_WINDOW_BYTES, size), dtype=torch.uint8)
    scatter = Scatter(ranges)
    for begin in range(0, size, _WINDOW_BYTES):
        part = window[: min(_WINDOW_BYTES, size - begin)]
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
