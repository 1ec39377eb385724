"""Boxes of live tensors from pieces that were cut otherwise: which bytes of an image they need, and their scattering.

`scatter.py` is the quick way for a job that is cut as it was when the snapshot was made; this one is for all others.
All is counted in runs, rows of numbers: a rank of a large job may need pieces by the hundred thousand.
"""

import ctypes
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from resilient.checkpoint.catalog.catalog import Tensor as Described
from resilient.checkpoint.catalog.meet import Box, part_rows
from resilient.checkpoint.catalog.table import BOX, FILE, OFFSET, START, UNITS, PieceTable, Rows, row_major
from resilient.checkpoint.digest import BLOCK_BYTES, FINE_BYTES, fine_count
from resilient.errors import DamagedImage

IMAGE, FIRST, COUNT, STRIDE, LENGTH, TO, TO_STRIDE = range(7)
"""The columns of runs, in bytes: of image number `IMAGE`, from `FIRST` on, `COUNT` times `LENGTH`, each `STRIDE` behind
the one before. Of what they fill, row-major, they are `TO` and what follows in steps of `TO_STRIDE`."""


@dataclass(frozen=True, slots=True, eq=False)
class Filling:
    """A live tensor, or a part of one, and the runs that fill it, each element once."""

    local: Tensor
    runs: Rows


def filling_of(tensor: Described, local: Tensor, place: Box, begins: Rows) -> Filling:
    """What of the stored pieces fills `local`, the box `place` of the tensor. `begins`: where each image's data does.

    Raises DamagedImage where they do not make it up, ValueError for a place outside of the tensor.
    """
    if not local.numel():
        return Filling(local, np.empty((0, TO_STRIDE + 1), dtype=np.int64))
    rows = tensor.pieces.near(*place)
    cut = _runs(np.ascontiguousarray(rows[:, START:]).tobytes(), tensor.shape, place)
    if cut is None:
        part_rows(tensor, place)  # which says what is missing
    assert cut is not None, "what is missing without a place is missing"
    runs, rows = cut.copy(), rows[cut[:, IMAGE]]
    runs[:, IMAGE] = rows[:, FILE]
    runs[:, [FIRST, *range(STRIDE, TO_STRIDE + 1)]] *= local.element_size()
    runs[:, FIRST] += rows[:, OFFSET] + begins[rows[:, FILE]]
    return Filling(local, runs)


@lru_cache(maxsize=1024)
def _runs(geometry: bytes, shape: tuple[int, ...], place: Box) -> Rows | None:
    """The runs that make up a box, in elements, of pieces (by number) instead of images, from the first of each on.
    None where the pieces do not make it up exactly.

    `geometry` are their rows without where they are: the same for many tensors, such as a parameter and its moments.
    """
    d = len(shape)
    cuts = np.frombuffer(geometry, dtype=np.int64).reshape(-1, BOX - START + 3 * d)
    rows = np.column_stack([np.arange(len(cuts)), np.zeros(len(cuts), np.int64), cuts])
    try:
        parts = part_rows(
            Described(name="", kind="tensor", dtype="uint8", shape=shape, pieces=PieceTable(d, rows)), place
        )
    except DamagedImage:
        return None
    at, sizes, strides = (parts[:, BOX + d * n : BOX + d * (n + 1)] for n in range(3))
    to_strides = np.array(row_major(place[1]), dtype=np.int64)
    to = ((at - np.array(place[0], dtype=np.int64)) * to_strides).sum(axis=1)
    one = np.ones_like(to)
    runs = np.column_stack([parts[:, FILE], parts[:, OFFSET], one, one, one, to, one])
    for dim in reversed(range(d)):
        runs, more = _grown(runs, sizes[:, dim], strides[:, dim], int(to_strides[dim]))
        sizes, strides = sizes[more], strides[more]
    runs[:, STRIDE] = np.where(runs[:, COUNT] == 1, runs[:, LENGTH], runs[:, STRIDE])
    return runs


def _grown(runs: Rows, size: Rows, stride: Rows, to_stride: int) -> tuple[Rows, Rows]:
    """Runs along one more dimension of their boxes, and which of the runs before each comes from."""
    more, count, length = size > 1, runs[:, COUNT], runs[:, LENGTH]
    alone = more & (count == 1)
    longer = alone & (stride == length) & (to_stride == length)
    regular = (stride == count * runs[:, STRIDE]) & (to_stride == count * runs[:, TO_STRIDE])
    beside, further = alone & ~longer, more & ~alone & regular
    times = np.where(more & ~alone & ~regular, size, 1)
    columns = {
        COUNT: np.where(beside | further, count * size, count),
        STRIDE: np.where(beside, stride, runs[:, STRIDE]),
        LENGTH: np.where(longer, length * size, length),
        TO_STRIDE: np.where(beside, to_stride, runs[:, TO_STRIDE]),
    }
    for number, column in columns.items():
        runs[:, number] = column
    if not (times > 1).any():
        return runs, np.arange(len(runs))
    each, step = _repeated(times)
    runs = runs[each]
    runs[:, FIRST] += step * stride[each]
    runs[:, TO] += step * to_stride
    return runs, each


def _repeated(times: Rows) -> tuple[Rows, Rows]:
    """Numbers of rows, each so often, and how often each was there before."""
    each = np.repeat(np.arange(len(times)), times)
    return each, np.arange(len(each)) - (np.cumsum(times) - times)[each]


class Wanted:
    """All that a rank wants of images at a time. `images`: the numbers of those, ascending."""

    def __init__(self, fillings: Iterable[Filling]) -> None:
        self.fillings = list(fillings)
        self.runs = np.concatenate([np.empty((0, TO_STRIDE + 1), np.int64), *(one.runs for one in self.fillings)])
        self.images: list[int] = np.flatnonzero(np.bincount(self.runs[:, IMAGE])).tolist()

    @property
    def nbytes(self) -> int:
        return int((self.runs[:, COUNT] * self.runs[:, LENGTH]).sum())

    def blocks(self, image_bytes: Mapping[int, int]) -> dict[int, NDArray[np.bool_]]:
        """Which blocks of `FINE_BYTES` of each image are wanted. Raises DamagedImage for bytes behind its end."""
        runs, reach = self.runs, _reach(self.runs)
        ends = np.cumsum([fine_count(image_bytes[image]) for image in self.images])
        base, most = np.zeros((2, 1 + max(self.images, default=0)), dtype=np.int64)
        base[self.images], most[self.images] = [0, *ends[:-1]], [image_bytes[image] for image in self.images]
        if (runs[:, FIRST] + reach > most[runs[:, IMAGE]]).any():
            raise DamagedImage("the checkpoint has pieces behind the ends of its images: use another snapshot")
        wide = runs[:, STRIDE] - runs[:, LENGTH] >= FINE_BYTES  # else no block fits in between
        each, step = _repeated(np.where(wide, runs[:, COUNT], 1))
        begin = runs[each, FIRST] + step * runs[each, STRIDE]
        end = begin + np.where(wide, runs[:, LENGTH], reach)[each] - 1
        base, count = base[runs[each, IMAGE]], int(ends[-1]) + 1 if self.images else 1
        begin, end = (np.bincount(base + at // FINE_BYTES, minlength=count) for at in (begin, end + FINE_BYTES))
        return dict(zip(self.images, np.split(np.cumsum((begin - end)[:-1]) > 0, ends[:-1]), strict=True))


def _reach(runs: Rows) -> Rows:
    """From the first byte of each to its last."""
    reach: Rows = (runs[:, COUNT] - 1) * runs[:, STRIDE] + runs[:, LENGTH]
    return reach


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


class BoxScatter:
    """Fills what is wanted of images. `take` may be called from several threads, with portions that do not overlap.

    Portions begin and end between elements: the data of an image is aligned. `finish` when all were taken.
    """

    def __init__(self, wanted: Wanted) -> None:
        self._fillings = wanted.fillings  # keeps the memory that is copied to
        self._targets = [_host_array(one.local) for one in self._fillings]
        owners = np.repeat(np.arange(len(self._fillings)), [len(one.runs) for one in self._fillings])
        order = np.lexsort((wanted.runs[:, FIRST], wanted.runs[:, IMAGE]))
        runs, owners = wanted.runs[order], owners[order]
        first, reach = runs[:, FIRST].copy(), _reach(runs)
        ends = [*np.searchsorted(runs[:, IMAGE], wanted.images), len(runs)]
        self._of = {
            image: (first[a:b], np.maximum.accumulate((first + reach)[a:b]), runs[a:b], owners[a:b])
            for image, (a, b) in zip(wanted.images, pairwise(ends), strict=True)
        }

    def uses(self) -> dict[int, Callable[[int, memoryview], None]]:
        """By image, where its bytes are to be given to."""
        return {image: partial(self.take, image) for image in self._of}

    def take(self, image: int, begin: int, portion: memoryview) -> None:
        """Bytes of an image from `begin` on: each run gets what is its own of them."""
        first, ends, runs, owners = self._of[image]
        some = slice(np.searchsorted(ends, begin, "right"), np.searchsorted(first, begin + portion.nbytes))
        for owner, (_, at, *run) in zip(owners[some].tolist(), runs[some].tolist(), strict=True):
            _copy(self._targets[owner], portion, at - begin, *run)

    def finish(self) -> None:
        """Bring what lies on another device, or not in order, to its place."""
        with torch.no_grad():
            for one, target in zip(self._fillings, self._targets, strict=True):
                if not _is_plain(one.local):
                    values = torch.from_numpy(target.view(np.uint8)).view(one.local.dtype)
                    one.local.copy_(values.view(one.local.shape))


def _is_plain(local: Tensor) -> bool:
    """Whether its elements lie in host memory, row-major and as they are (not as conjugates of what is there)."""
    return local.device.type == "cpu" and local.is_contiguous() and not (local.is_conj() or local.is_neg())


def _host_array(local: Tensor) -> Any:
    """The elements of a live tensor, row-major; room for them where they are not plain host memory."""
    unit = UNITS[local.element_size()]
    if not _is_plain(local):
        return np.empty(local.numel(), dtype=unit)
    memory: Any = (ctypes.c_uint8 * local.nbytes).from_address(local.data_ptr())
    return np.ndarray(local.numel(), unit, memory)


def _copy(
    target: Any, portion: memoryview, at: int, count: int, stride: int, length: int, to: int, to_stride: int
) -> None:
    """What a portion of an image has of a run, which begins `at` bytes behind its beginning. Large copies release the
    interpreter lock."""
    unit, size = target.dtype, target.itemsize
    low, high = max(0, -(at // stride)), min(count, (portion.nbytes - at - length) // stride + 1)
    if low < high:  # these are all there
        shape = high - low, length // size
        values: Any = np.ndarray(shape, unit, portion, at + low * stride, (stride, size))
        np.ndarray(shape, unit, target, to + low * to_stride, (to_stride, size))[...] = values
    for number in {low - 1, high} & set(range(count)):
        begin = at + number * stride
        first, end = max(begin, 0), min(begin + length, portion.nbytes)
        if first < end:
            place = (to + number * to_stride + first - begin) // size
            target[place : place + (end - first) // size] = np.frombuffer(portion[first:end], dtype=unit)
