"""Bytes of a message, end to end, which need not lie together in memory: a part of each rank's part of a tensor."""

from collections.abc import Iterator
from itertools import accumulate


class Spans:
    """`views`: contiguous bytes each, which end at `ends`. Nothing is copied but by `fill`."""

    def __init__(self, *views: memoryview) -> None:
        self._views = [view for view in views if len(view)]
        self.ends = list(accumulate(len(view) for view in self._views))

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def within(self, begin: int, end: int) -> Iterator[memoryview]:
        """What lies from `begin` to `end`, view by view."""
        for view, until in zip(self._views, self.ends, strict=True):
            start = until - len(view)
            if begin < until and start < end:
                yield view[max(begin - start, 0) : end - start]

    def part(self, begin: int, end: int) -> "Spans":
        return Spans(*self.within(begin, end))

    def lies(self, begin: int, end: int) -> memoryview | None:
        """The same where it lies together."""
        found = list(self.within(begin, end))
        return found[0] if len(found) == 1 else None

    def fill(self, begin: int, content: bytes | bytearray) -> None:
        """Write `content` from `begin` on."""
        at = 0
        for view in self.within(begin, begin + len(content)):
            view[:] = content[at : at + len(view)]
            at += len(view)
