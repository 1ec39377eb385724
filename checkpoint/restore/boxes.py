"""Boxes of live tensors from pieces that were cut otherwise: which bytes of an image they need, and their scattering.

`scatter.py` is the quick way for a job that is cut as it was when the snapshot was made; this one is for all others.
"""

import threading
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from resilient.checkpoint.catalog.catalog import Tensor as Described
from resilient.checkpoint.catalog.meet import Box, boxes_of_range, intersect, parts_of
from resilient.checkpoint.catalog.table import BOX, FILE, OFFSET, START, STOP, UNITS, PieceTable, row_major
from resilient.checkpoint.copying import Move
from resilient.checkpoint.digest import BLOCK_BYTES, FINE_BYTES, fine_count
from resilient.errors import DamagedImage

_VIEWS: dict[int, torch.dtype] = {
    1: torch.uint8,
    2: torch.int16,
    4: torch.int32,
    8: torch.int64,
    16: torch.complex128,
}


@dataclass(frozen=True, slots=True)
class BoxRange:
    """A stored piece of which a live tensor needs some: elements [start, stop), row-major, of the box (`at`, `sizes`).

    They begin at `offset` in the image of old rank `image_rank`. `local` is the box `place` of the same global tensor,
    and has `needed` of the elements.
    """

    image_rank: int
    offset: int
    start: int
    stop: int
    at: tuple[int, ...]
    sizes: tuple[int, ...]
    local: Tensor
    place: Box
    needed: int

    @property
    def nbytes(self) -> int:
        """Of the piece, not only of what is needed of it."""
        return (self.stop - self.start) * self.local.element_size()

    @property
    def needed_bytes(self) -> int:
        return self.needed * self.local.element_size()

    def boxes(self, start: int, stop: int) -> list[Box]:
        """Elements [start, stop) of the stored box, as boxes of the global tensor in the order of their bytes."""
        return _boxes_at(self.at, start, stop, self.sizes)


def box_ranges(tensor: Described, local: Tensor, place: Box, begins: Sequence[int]) -> list[BoxRange]:
    """What of the stored pieces fills `local`, the box `place` of the tensor. `begins`: where each image's data does.

    Raises DamagedImage where they do not make it up, ValueError for a place outside of the tensor.
    """
    if not local.numel():
        return []
    d, rows = tensor.pieces.dims, tensor.pieces.near(*place)
    needed = _needed(np.ascontiguousarray(rows[:, START:]).tobytes(), tensor.shape, place)
    if needed is None:
        parts_of(tensor, *place)  # which says what is missing
    found = []
    for number, count in (needed or {}).items():
        row = rows[number].tolist()
        at, sizes = tuple(row[BOX : BOX + d]), tuple(row[BOX + d : BOX + 2 * d])
        offset = begins[row[FILE]] + row[OFFSET]
        found.append(BoxRange(row[FILE], offset, row[START], row[STOP], at, sizes, local, place, count))
    return found


@lru_cache(maxsize=4096)
def _needed(geometry: bytes, shape: tuple[int, ...], place: Box) -> dict[int, int] | None:
    """How many elements of those of some pieces, by number, that have any lie in a box; None where they do not make it
    up exactly.

    `geometry` are their rows without where they are: the same for many tensors, such as a parameter and its moments.
    """
    cuts = np.frombuffer(geometry, dtype=np.int64).reshape(-1, BOX - START + 3 * len(shape))
    rows = np.hstack([np.arange(len(cuts))[:, None], np.zeros((len(cuts), 1), np.int64), cuts])
    table = PieceTable(len(shape), rows)
    try:
        parts = parts_of(Described(name="", kind="tensor", dtype="uint8", shape=shape, pieces=table), *place)
    except DamagedImage:
        return None
    found: dict[int, int] = {}
    for part in parts:
        found[part.file] = found.get(part.file, 0) + part.numel
    return found


def needed_blocks(ranges: Iterable[BoxRange], image_bytes: int) -> NDArray[np.bool_]:
    """Which blocks of `FINE_BYTES` of an image hold bytes that the ranges need."""
    single: list[tuple[int, int]] = []
    firsts, lasts = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for one in ranges:
        itemsize = one.local.element_size()
        for run in _runs(one.start, one.stop, one.at, one.sizes, one.place):
            first, nbytes = one.offset + run.first * itemsize, run.length * itemsize
            if not run.sizes:
                single.append((first, first + nbytes - 1))
                continue
            begins = first + _grid(run.sizes, run.strides) * itemsize
            firsts.append(begins)
            lasts.append(begins + nbytes - 1)
    whole = np.array(single, dtype=np.int64).reshape(-1, 2)
    begin, end = np.concatenate([*firsts, whole[:, 0]]), np.concatenate([*lasts, whole[:, 1]])
    count = fine_count(image_bytes) + 1
    steps = np.bincount(begin // FINE_BYTES, minlength=count) - np.bincount(end // FINE_BYTES + 1, minlength=count)
    needed: NDArray[np.bool_] = np.cumsum(steps[:-1]) > 0
    return needed


def units(needed: NDArray[np.bool_], image_bytes: int, *, fine: bool) -> list[tuple[int, int]]:
    """Ranges [begin, end) to read, of one block of `BLOCK_BYTES` each at most; whole ones where not `fine`."""
    per_block = BLOCK_BYTES // FINE_BYTES
    found = []
    for first in np.unique(np.flatnonzero(needed) // per_block).tolist():
        begin = first * BLOCK_BYTES
        if not fine:
            found.append((begin, min(begin + BLOCK_BYTES, image_bytes)))
            continue
        wanted = needed[first * per_block : (first + 1) * per_block].astype(np.int8)
        edges = np.flatnonzero(np.diff(wanted, prepend=0, append=0)).reshape(-1, 2)
        found += [(begin + a * FINE_BYTES, min(begin + b * FINE_BYTES, image_bytes)) for a, b in edges.tolist()]
    return found


class _Run(NamedTuple):
    """Contiguous elements that are needed of a piece, `length` each: `first` is where the first begin, from the piece's
    own first; `sizes` and `strides` lead to the others. `to`: where the first one goes, from the first of the box that
    needs them, if all go there one behind the other; else None. All in elements.
    """

    first: int
    length: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    to: int | None


@lru_cache(maxsize=4096)
def _runs(start: int, stop: int, at: tuple[int, ...], sizes: tuple[int, ...], place: Box) -> tuple[_Run, ...]:
    """What a box `place` needs of elements [start, stop) of the box (`at`, `sizes`). The same for many tensors."""
    found = []
    strides = row_major(sizes)
    for box in _boxes_at(at, start, stop, sizes):
        shared = intersect(box, place)
        if shared is None:
            continue
        inner, dim = 1, len(shared[1])
        while dim:
            dim -= 1
            inner *= shared[1][dim]
            if shared[1][dim] != sizes[dim]:  # beyond it, something else lies between
                break
        first = sum((x - a) * s for x, a, s in zip(shared[0], at, strides, strict=True)) - start
        outer = [(size, stride) for size, stride in zip(shared[1][:dim], strides[:dim], strict=True) if size > 1]
        sizes_outer, strides_outer = tuple(size for size, _ in outer), tuple(stride for _, stride in outer)
        found.append(_Run(first, inner, sizes_outer, strides_outer, None if outer else _begins_in(place, shared)))
    return tuple(found)


def _begins_in(place: Box, shared: Box) -> int | None:
    """Where in a contiguous array, the box `place`, a part of it begins; None if other elements lie in between."""
    thick = next((dim for dim, size in enumerate(shared[1]) if size > 1), len(shared[1]))
    if shared[1][thick + 1 :] != place[1][thick + 1 :]:
        return None
    return sum((x - a) * s for x, a, s in zip(shared[0], place[0], row_major(place[1]), strict=True))


def _grid(sizes: Sequence[int], strides: Sequence[int]) -> NDArray[np.int64]:
    """Where the elements of an array with these strides are, from the first."""
    found = np.zeros(1, dtype=np.int64)
    for size, stride in zip(sizes, strides, strict=True):
        found = (found[:, None] + np.arange(size, dtype=np.int64) * stride).reshape(-1)
    return found


def _boxes_at(at: tuple[int, ...], start: int, stop: int, sizes: tuple[int, ...]) -> list[Box]:
    """Elements [start, stop) of the box (`at`, `sizes`), as boxes of the global tensor in the order of their bytes."""
    return [
        (tuple(a + b for a, b in zip(at, inner, strict=True)), size)
        for inner, size in boxes_of_range(start, stop, sizes)
    ]


class BoxScatter:
    """Fills box ranges of one image. `take` may be called from several threads, with portions that do not overlap.

    Portions begin and end between elements: the data of an image is aligned. `finish` when all were taken.
    """

    def __init__(self, ranges: Iterable[BoxRange]) -> None:
        self._ranges = list(ranges)  # keeps the memory that is copied to
        moves, targets = list[tuple[int, int, int]](), list[_BoxTarget]()
        for one in self._ranges:
            found = _moves(one)
            if found is None:
                targets.append(_BoxTarget(one))
            else:
                moves += found
        self._moves = sorted(moves)
        self._move_stops = list(accumulate((stop for _, stop, _ in self._moves), max))  # sorted, if they overlap too
        self._targets = sorted(targets, key=lambda target: target.begin)
        self._stops = list(accumulate((target.stop for target in self._targets), max))

    def take(self, begin: int, portion: memoryview) -> None:
        """Bytes of the image from `begin` on: each range gets what is its own of them."""
        end = begin + portion.nbytes
        source = np.frombuffer(portion, dtype=np.uint8).ctypes.data - begin
        for number in range(bisect_right(self._move_stops, begin), len(self._moves)):
            first, stop, place = self._moves[number]
            if first >= end:
                break
            first, stop = max(first, begin), min(stop, end)
            if first < stop:
                Move(place + first, source + first, stop - first).run()  # large ones release the interpreter lock
        for number in range(bisect_right(self._stops, begin), len(self._targets)):
            target = self._targets[number]
            if target.begin >= end:
                break
            if target.stop > begin:
                target.take(max(begin, target.begin), min(end, target.stop), begin, portion)

    def finish(self) -> None:
        """Bring what lies on another device, or not in order, to its place."""
        for target in self._targets:
            target.finish()


def _moves(one: BoxRange) -> list[tuple[int, int, int]] | None:
    """Bytes [first, stop) of the image that are to be copied as they are, and where to: the address at which byte 0
    would be. None where that is not enough."""
    local, itemsize = one.local, one.local.element_size()
    if local.device.type != "cpu" or not local.is_contiguous() or local.is_complex():
        return None
    found, address = [], local.data_ptr()
    for run in _runs(one.start, one.stop, one.at, one.sizes, one.place):
        if run.to is None:
            return None
        first = one.offset + run.first * itemsize
        found.append((first, first + run.length * itemsize, address + run.to * itemsize - first))
    return found


class _BoxTarget:
    def __init__(self, one: BoxRange) -> None:
        self._one = one
        self._itemsize = one.local.element_size()
        self.begin, self.stop = one.offset, one.offset + one.nbytes
        self._strides = row_major(one.sizes)
        self._host = _host_view(one.local)
        self._lock = threading.Lock()
        self._staged: list[tuple[Any, Any]] = []

    def take(self, begin: int, stop: int, origin: int, portion: memoryview) -> None:
        one, size = self._one, self._itemsize
        start = one.start + (begin - one.offset) // size
        end = one.start + (stop - one.offset) // size
        values = np.frombuffer(portion[begin - origin : stop - origin], dtype=UNITS[size])
        for box in one.boxes(start, end):
            shared = intersect(box, one.place)
            if shared is not None:
                self._put(shared, values, start)

    def _put(self, shared: Box, values: Any, start: int) -> None:
        one, size = self._one, self._itemsize
        first = sum((x - a) * s for x, a, s in zip(shared[0], one.at, self._strides, strict=True)) - start
        found = np.lib.stride_tricks.as_strided(
            values[first:], shape=shared[1], strides=tuple(s * size for s in self._strides), writeable=False
        )
        at = tuple(slice(x - a, x - a + n) for x, a, n in zip(shared[0], one.place[0], shared[1], strict=True))
        if self._host is not None:
            target = self._host[(..., *at)]
            if target.flags.c_contiguous and found.flags.c_contiguous and found.nbytes > FINE_BYTES:
                Move(target.ctypes.data, found.ctypes.data, found.nbytes).run()  # releases the interpreter lock
            else:
                target[...] = found
            return
        with self._lock:
            self._staged.append((at, found.copy()))

    def finish(self) -> None:
        with torch.no_grad():
            for at, values in self._staged:
                view = torch.from_numpy(values.view(np.uint8)).view(self._one.local.dtype)
                self._one.local[(..., *at)].copy_(view.view(values.shape))
        self._staged = []


def _host_view(local: Tensor) -> Any:
    """A live tensor as a numpy array of elements of its size; None where it is not in host memory."""
    if local.device.type != "cpu":
        return None
    return local.detach().view(_VIEWS[local.element_size()]).numpy()
