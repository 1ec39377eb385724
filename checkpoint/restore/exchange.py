"""Images of other nodes: their owners send them through the job's own group, once, to all who need them.

For a replicated model every node needs every piece, so one broadcast per image moves no byte twice over a link that
the ranks' group would not use anyway. Bounded memory: one window at a time.
"""

from collections.abc import Sequence

import torch

from resilient.checkpoint.restore.images import Image
from resilient.checkpoint.restore.load import Range
from resilient.checkpoint.world import World

_WINDOW_BYTES = 32 << 20


def receive_remote(world: World, ranges: Sequence[Range], own: Image) -> int:
    """Fill `ranges`, whose images lie on other nodes. Collective, also for ranks that need nothing. Returns bytes."""
    if world.group is None or len(set(world.nodes)) == 1:
        return 0
    needs = world.gather([sorted({span.image_rank for span in ranges}), len(own.view)])
    sizes = [size for _, size in needs]
    loaded = 0
    for source in sorted({rank for wanted, _ in needs for rank in wanted}):
        mine = [span for span in ranges if span.image_rank == source]
        loaded += _receive_image(world, source, sizes[source], mine, own)
    return loaded


def _receive_image(world: World, source: int, size: int, ranges: Sequence[Range], own: Image) -> int:
    window = torch.empty(min(_WINDOW_BYTES, size), dtype=torch.uint8)
    targets = [_Target(span) for span in ranges]
    for begin in range(0, size, _WINDOW_BYTES):
        part = window[: min(_WINDOW_BYTES, size - begin)]
        if world.rank == source:
            part.copy_(torch.frombuffer(bytearray(own.view[begin : begin + len(part)]), dtype=torch.uint8))
        world.broadcast(part, source)
        for target in targets:
            target.take(begin, part)
    for target in targets:
        target.finish()
    return sum(span.nbytes for span in ranges)


class _Target:
    """One range that is filled window by window, on the host, and then given to its tensor."""

    def __init__(self, span: Range) -> None:
        self._span = span
        self._bytes = torch.empty(span.nbytes, dtype=torch.uint8)

    def take(self, begin: int, part: torch.Tensor) -> None:
        first = max(begin, self._span.offset)
        last = min(begin + len(part), self._span.offset + self._span.nbytes)
        if first < last:
            self._bytes[first - self._span.offset : last - self._span.offset] = part[first - begin : last - begin]

    def finish(self) -> None:
        if not self._span.nbytes:
            return
        local, values = self._span.local, self._bytes.view(self._span.local.dtype)
        with torch.no_grad():
            if local.is_contiguous():
                local.view(-1)[self._span.start : self._span.stop].copy_(values)
            else:
                local.copy_(values.view(local.shape))
