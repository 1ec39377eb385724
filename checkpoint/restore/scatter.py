"""Bytes of an image to where the state has them, in whatever portions they come."""

import ctypes
import threading
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from resilient.checkpoint.copying import Move
from resilient.checkpoint.levels.direct import address_of

_MOST_PLACES = 64  # for one block; beyond, reading into each costs more than a second copy


@dataclass(frozen=True, slots=True)
class Range:
    """Bytes [offset, offset + nbytes) of rank `image_rank`'s image are elements [start, stop) of `local`, flat."""

    image_rank: int
    offset: int
    nbytes: int
    local: Tensor
    start: int
    stop: int


class Scatter:
    """Fills ranges of one image. `take` may be called from several threads, with portions that do not overlap."""

    def __init__(self, ranges: Iterable[Range]) -> None:
        self._targets = [_Target(span) for span in sorted(ranges, key=lambda span: span.offset) if span.nbytes]
        self._stops = list(accumulate((target.stop for target in self._targets), max))  # sorted, if ranges overlap too
        self.nbytes = sum(target.stop - target.begin for target in self._targets)

    def take(self, begin: int, portion: memoryview) -> None:
        """Bytes of the image from `begin` on: each range gets what is its own of them."""
        end = begin + len(portion)
        first = bisect_right(self._stops, begin)
        if first == len(self._targets) or self._targets[first].begin >= end:
            return
        source = address_of(portion) - begin
        for number in range(first, len(self._targets)):
            target = self._targets[number]
            if target.begin >= end:
                break
            if target.stop > begin:
                target.take(max(begin, target.begin), min(end, target.stop), source)

    def places(self, begin: int, end: int, spare: memoryview) -> list[Any] | None:
        """Where bytes [begin, end) of the image go, as buffers in order; what nobody wants to its place in `spare`.

        None where that cannot be said: ranges that overlap or are not plain host memory, or very many of them.
        """
        found: list[Any] = []
        origin = begin
        for number in range(bisect_right(self._stops, begin), len(self._targets)):
            target = self._targets[number]
            if target.begin >= end:
                break
            overlaps = bool(found) and target.begin < begin
            if overlaps or not target.plain or len(found) > _MOST_PLACES:
                return None
            start, stop = max(begin, target.begin), min(end, target.stop)
            found += [spare[begin - origin : start - origin]] if start > begin else []
            found.append(target.place(start, stop))
            begin = stop
        return found + ([spare[begin - origin : end - origin]] if end > begin else [])


class _Target:
    """One range, [begin, stop) of the image. What is not plain host memory is put together on the host first."""

    def __init__(self, span: Range) -> None:
        self.begin, self.stop = span.offset, span.offset + span.nbytes
        self._span = span
        self.plain = span.local.device.type == "cpu" and span.local.is_contiguous()
        self._address = span.local.data_ptr() + span.start * span.local.element_size()
        self._lock = threading.Lock()
        self._staged: Tensor | None = None
        self._missing = span.nbytes

    def place(self, begin: int, stop: int) -> Any:
        """The memory of bytes [begin, stop) of the image."""
        return (ctypes.c_uint8 * (stop - begin)).from_address(self._address + begin - self.begin)

    def take(self, begin: int, stop: int, source: int) -> None:
        """Bytes [begin, stop) of the image are at address `source + begin`."""
        if self.plain:
            Move(self._address + begin - self.begin, source + begin, stop - begin).run()
            return
        with self._lock:
            if self._staged is None:
                self._staged = torch.empty(self._span.nbytes, dtype=torch.uint8)
            staged = self._staged
        Move(staged.data_ptr() + begin - self.begin, source + begin, stop - begin).run()
        with self._lock:
            self._missing -= stop - begin
            if self._missing:
                return
            self._staged = None
        _put(self._span, staged)


def _put(span: Range, data: Tensor) -> None:
    """Give a range its bytes, a uint8 tensor on the host; `local` may be on a device or not contiguous."""
    with torch.no_grad():
        local, values = span.local, data.view(span.local.dtype)
        if local.is_contiguous():
            local.view(-1)[span.start : span.stop].copy_(values)
        else:
            local.copy_(values.view(local.shape))
