"""Catalog ∩ layout: which bytes of which files are a box of a tensor. Pure.

Everything is cut into boxes that lie in one file with regular strides: a flat range of a box, as ZeRO and replicas that
share a tensor have it, is at most 2 · dims - 1 boxes.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from resilient.checkpoint.catalog.catalog import Tensor
from resilient.checkpoint.catalog.table import BOX, FILE, OFFSET, START, STOP, Rows, row_major
from resilient.errors import DamagedImage

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""Offsets and sizes."""


class Part(NamedTuple):
    """A box of a tensor, `offsets` and `sizes` in the whole tensor, that lies in file number `file`.

    `offset`: of its first element, in bytes; `strides`, in bytes too, lead to the others.
    """

    file: int
    offset: int
    strides: tuple[int, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.sizes)

    def span_bytes(self, itemsize: int) -> int:
        """From the first byte of the part to its last; more than its own bytes where others lie between."""
        reach = sum((size - 1) * stride for size, stride in zip(self.sizes, self.strides, strict=True))
        return reach + itemsize

    def is_contiguous(self, itemsize: int) -> bool:
        return self.span_bytes(itemsize) == self.numel * itemsize and self.strides_are_row_major(itemsize)

    def strides_are_row_major(self, itemsize: int) -> bool:
        expected = row_major(self.sizes)
        return all(
            size == 1 or stride == itemsize * row
            for size, stride, row in zip(self.sizes, self.strides, expected, strict=True)
        )


def parts_of(tensor: Tensor, offsets: Sequence[int] | None = None, sizes: Sequence[int] | None = None) -> list[Part]:
    """The parts that make up a box of a tensor (all of it when not given), each element once.

    Raises ValueError for a box outside of the tensor, DamagedImage where the pieces do not make it up exactly.
    """
    begin = tuple(offsets) if offsets is not None else (0,) * len(tensor.shape)
    extent = tuple(sizes) if sizes is not None else tensor.shape
    d, rows = tensor.pieces.dims, part_rows(tensor, (begin, extent))
    rows[:, BOX + 2 * d :] *= tensor.itemsize
    vectors = [(BOX + d * n, BOX + d * (n + 1)) for n in (2, 0, 1)]
    return [Part(row[FILE], row[OFFSET], *(tuple(row[a:b]) for a, b in vectors)) for row in rows.tolist()]


def part_rows(tensor: Tensor, box: Box) -> Rows:
    """As `parts_of`, as rows of a table (`table.py`) that are all whole boxes: there may be very many."""
    begin, extent = box
    if len(begin) != len(tensor.shape) or any(
        at < 0 or size < 0 or at + size > whole for at, size, whole in zip(begin, extent, tensor.shape, strict=True)
    ):
        raise ValueError(f"the box at {begin} with sizes {extent} is no part of {tensor.name!r}, shape {tensor.shape}")
    d, wanted = tensor.pieces.dims, math.prod(extent)
    if not wanted:
        return np.empty((0, BOX + 3 * d), dtype=np.int64)
    rows = tensor.pieces.meeting(begin, extent)
    found = _clipped(_as_boxes(rows, d, tensor.itemsize), d, tensor.itemsize, box)
    have = int(found[:, STOP].sum())
    if have != wanted or (len(rows) > 1 and _overlap(rows, d) and _boxes_overlap(found[:, BOX : BOX + 2 * d])):
        raise DamagedImage(
            f"tensor {tensor.name!r}: the checkpoint has {have} of the {wanted} elements at {begin} with sizes "
            f"{extent}, or has some of them twice"
        )
    return found


def _clipped(rows: Rows, d: int, itemsize: int, box: Box) -> Rows:
    """Of whole boxes what lies in a box."""
    at, strides = rows[:, BOX : BOX + d], rows[:, BOX + 2 * d :]
    begin, extent = (np.array(one, dtype=np.int64) for one in box)
    low = np.maximum(at, begin)
    sizes = np.minimum(at + rows[:, BOX + d : BOX + 2 * d], begin + extent) - low
    offsets = rows[:, OFFSET] + ((low - at) * strides).sum(axis=1) * itemsize
    columns = rows[:, FILE], offsets, np.zeros_like(offsets), sizes.prod(axis=1), low, sizes, strides
    return np.column_stack(columns)[np.all(sizes > 0, axis=1)]


def _as_boxes(rows: Rows, d: int, itemsize: int) -> Rows:
    """Pieces as whole boxes."""
    rows = _with_whole_rows_as_boxes(rows, d)
    whole = (rows[:, START] == 0) & (rows[:, STOP] == rows[:, BOX + d : BOX + 2 * d].prod(axis=1))
    if whole.all():
        return rows
    ranges = [box for row in rows[~whole].tolist() for box in _boxes_of_row(row, d, itemsize)]
    return np.concatenate([rows[whole], np.array(ranges, dtype=np.int64).reshape(-1, BOX + 3 * d)])


def _with_whole_rows_as_boxes(rows: Rows, d: int) -> Rows:
    """A flat range that is some of its box's rows, to the element, is a box; most of the ranges of ZeRO are."""
    if not d or not len(rows):
        return rows
    row = np.maximum(rows[:, BOX + d + 1 : BOX + 2 * d].prod(axis=1), 1)
    aligned = (rows[:, START] % row == 0) & (rows[:, STOP] % row == 0) & (rows[:, STOP] > rows[:, START])
    rows = rows.copy()
    first, numel = rows[:, START] // row, rows[:, STOP] - rows[:, START]
    rows[:, BOX] += np.where(aligned, first, 0)
    rows[:, BOX + d] = np.where(aligned, numel // row, rows[:, BOX + d])
    rows[:, START] = np.where(aligned, 0, rows[:, START])
    rows[:, STOP] = np.where(aligned, numel, rows[:, STOP])
    return rows


def _boxes_of_row(row: Sequence[int], d: int, itemsize: int) -> Iterator[list[int]]:
    at, size, strides = (row[BOX + d * n : BOX + d * (n + 1)] for n in range(3))
    for inner, extent in boxes_of_range(row[START], row[STOP], tuple(size)):
        first = sum(x * s for x, s in zip(inner, strides, strict=True)) - row[START]
        place = (a + b for a, b in zip(at, inner, strict=True))
        yield [row[FILE], row[OFFSET] + first * itemsize, 0, math.prod(extent), *place, *extent, *strides]


def intersect(one: Box, other: Box) -> Box | None:
    """The elements that two boxes share; None where there are none."""
    low = tuple(max(a, b) for a, b in zip(one[0], other[0], strict=True))
    high = tuple(min(a + m, b + n) for a, m, b, n in zip(one[0], one[1], other[0], other[1], strict=True))
    if any(a >= b for a, b in zip(low, high, strict=True)):
        return None
    return low, tuple(b - a for a, b in zip(low, high, strict=True))


def boxes_of_range(start: int, stop: int, sizes: tuple[int, ...]) -> list[Box]:
    """Elements [start, stop), row-major, of an array of `sizes` as disjoint boxes in their order."""
    if start >= stop:
        return []
    if not sizes or (start == 0 and stop == math.prod(sizes)):
        return [((0,) * len(sizes), sizes)]
    rest = sizes[1:]
    row = math.prod(rest)
    first, last = start // row, (stop - 1) // row
    if first == last:
        return _in_row(first, boxes_of_range(start - first * row, stop - first * row, rest))
    found: list[Box] = []
    body = first
    if start > first * row:
        found += _in_row(first, boxes_of_range(start - first * row, row, rest))
        body += 1
    whole = stop // row
    if whole > body:
        found.append(((body,) + (0,) * len(rest), (whole - body, *rest)))
    if stop > whole * row:
        found += _in_row(whole, boxes_of_range(0, stop - whole * row, rest))
    return found


def _in_row(number: int, boxes: list[Box]) -> list[Box]:
    return [((number, *at), (1, *size)) for at, size in boxes]


def _overlap(rows: Rows, dims: int) -> bool:
    """Whether two pieces may share an element: two ranges of one box, or two boxes."""
    columns = [rows[:, START], *(rows[:, BOX + n] for n in reversed(range(2 * dims)))]
    rows = rows[np.lexsort(columns)]
    boxes = rows[:, BOX : BOX + 2 * dims]
    same = np.all(boxes[1:] == boxes[:-1], axis=1)
    if np.any(same & (rows[1:, START] < rows[:-1, STOP])):
        return True
    boxes = boxes[np.concatenate([[True], ~same])]
    return len(boxes) > 1 and _boxes_overlap(boxes)


def _boxes_overlap(boxes: Rows) -> bool:
    """Of different boxes, offsets and sizes. In a grid different ones never do; else a sweep."""
    at, sizes = np.hsplit(boxes, 2)
    ends = at + sizes
    cells = np.zeros(len(at), dtype=np.int64)
    for dim in range(at.shape[1]):
        begins, number = np.unique(at[:, dim], return_inverse=True)
        reach = np.zeros(len(begins), dtype=np.int64)
        np.maximum.at(reach, number, ends[:, dim])
        if np.any(reach[:-1] > begins[1:]):
            return _swept(at, ends)
        _, cells = np.unique(cells * len(begins) + number, return_inverse=True)
    return len(np.unique(cells)) < len(cells)


def _swept(at: Rows, ends: Rows) -> bool:
    """Along the dimension that has the most different offsets, each box is compared with those that begin within."""
    dim = max(range(at.shape[1]), key=lambda d: len(np.unique(at[:, d])))
    order = np.argsort(at[:, dim], kind="stable")
    at, ends = at[order], ends[order]
    for number in range(len(at)):
        later = slice(number + 1, int(np.searchsorted(at[:, dim], ends[number, dim])))
        if np.any(np.all((at[later] < ends[number]) & (at[number] < ends[later]), axis=1)):
            return True
    return False
