"""Images of other nodes: their owners send them through the job's own group, once, to all who need them.

For a replicated model every node needs every piece, so one broadcast per image moves no byte twice over a link that
the ranks' group would not use anyway. One window at a time: received, compared with the digests of the image (law 5),
sent again if a rank did not get what was sent, and only then written. On the training thread; collective.
"""

from collections.abc import Sequence

import torch

from resilient.checkpoint.digest import BLOCK_BYTES, digest
from resilient.checkpoint.restore.images import Image
from resilient.checkpoint.restore.load import Range, put
from resilient.checkpoint.world import World
from resilient.errors import DamagedImage

_WINDOW_BYTES = 8 * BLOCK_BYTES
_ATTEMPTS = 3


def receive_remote(world: World, ranges: Sequence[Range], own: Image) -> int:
    """Fill `ranges`, whose images lie on other nodes. Collective, also for ranks that need nothing. Returns bytes.

    Raises DamagedImage on every rank when bytes arrive wrong again and again; the state is partly overwritten then.
    """
    if world.group is None or len(set(world.nodes)) == 1:
        return 0
    needs = world.gather([sorted({span.image_rank for span in ranges}), len(own.view), list(own.record.blocks)])
    loaded = 0
    for source in sorted({rank for wanted, _, _ in needs for rank in wanted}):
        mine = [span for span in ranges if span.image_rank == source]
        _, size, blocks = needs[source]
        _receive_image(world, source, size, blocks, mine, own)
        loaded += sum(span.nbytes for span in mine)
    return loaded


def _receive_image(
    world: World, source: int, size: int, blocks: Sequence[str], ranges: Sequence[Range], own: Image
) -> None:
    window = torch.empty(min(_WINDOW_BYTES, size), dtype=torch.uint8)
    targets = [_Target(span) for span in ranges if span.nbytes]
    for begin in range(0, size, _WINDOW_BYTES):
        part = window[: min(_WINDOW_BYTES, size - begin)]
        _receive_window(world, source, begin, part, blocks, own)
        for target in targets:
            target.take(begin, part)
        targets = [target for target in targets if not target.full]


def _receive_window(
    world: World, source: int, begin: int, part: torch.Tensor, blocks: Sequence[str], own: Image
) -> None:
    """Fill `part` on every rank. They agree on whether it arrived: one alone cannot repeat a broadcast."""
    bad: list[list[int]] = []
    for _ in range(_ATTEMPTS):
        if world.rank == source:
            part.copy_(torch.frombuffer(bytearray(own.view[begin : begin + len(part)]), dtype=torch.uint8))
        world.broadcast(part, source)
        bad = world.gather(_damaged(part, begin, blocks))
        if not any(bad):
            return
    ranks = [rank for rank, numbers in enumerate(bad) if numbers]
    raise DamagedImage(
        f"blocks {bad[ranks[0]]} of the image of rank {source} arrived damaged at rank {ranks[0]}, {_ATTEMPTS} times: "
        "the state is partly overwritten, so do not train on; check memory and network of these nodes, and restart"
    )


def _damaged(part: torch.Tensor, begin: int, blocks: Sequence[str]) -> list[int]:
    """The numbers of the blocks in a window that differ from their digests. Windows begin at blocks."""
    view = part.numpy().data
    first = begin // BLOCK_BYTES
    return [
        first + number
        for number in range(-(-len(view) // BLOCK_BYTES))
        if digest(view[number * BLOCK_BYTES : (number + 1) * BLOCK_BYTES]) != blocks[first + number]
    ]


class _Target:
    """One range. It is written at once where all of it lies in one window, else collected on the host first."""

    def __init__(self, span: Range) -> None:
        self._span = span
        self._bytes: torch.Tensor | None = None
        self.full = False

    def take(self, begin: int, part: torch.Tensor) -> None:
        """Use what a window has of the range."""
        start, stop = self._span.offset - begin, self._span.offset + self._span.nbytes - begin
        first, last = max(0, start), min(len(part), stop)
        if first >= last:
            return
        self.full = stop <= len(part)
        if self.full and start >= 0:
            put(self._span, part[start:stop].clone())  # a copy: aligned as its elements need it
            return
        if self._bytes is None:
            self._bytes = torch.empty(self._span.nbytes, dtype=torch.uint8)
        self._bytes[first - start : last - start] = part[first:last]
        if self.full:
            put(self._span, self._bytes)
            self._bytes = None
