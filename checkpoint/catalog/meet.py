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
    if len(begin) != len(tensor.shape) or any(
        at < 0 or size < 0 or at + size > whole for at, size, whole in zip(begin, extent, tensor.shape, strict=True)
    ):
        raise ValueError(f"the box at {begin} with sizes {extent} is no part of {tensor.name!r}, shape {tensor.shape}")
    wanted = math.prod(extent)
    if not wanted:
        return []
    rows = tensor.pieces.meeting(begin, extent)
    parts = _parts(rows, tensor, begin, extent)
    have = sum(part.numel for part in parts)
    if have != wanted or (len(rows) > 1 and _overlap(rows, tensor.pieces.dims) and _parts_overlap(parts)):
        raise DamagedImage(
            f"tensor {tensor.name!r}: the checkpoint has {have} of the {wanted} elements at {begin} with sizes "
            f"{extent}, or has some of them twice"
        )
    return parts


def _parts(rows: Rows, tensor: Tensor, begin: tuple[int, ...], extent: tuple[int, ...]) -> list[Part]:
    d, itemsize = tensor.pieces.dims, tensor.itemsize
    rows = _with_whole_rows_as_boxes(rows, d)
    at, sizes, strides = (rows[:, BOX + d * n : BOX + d * (n + 1)] for n in range(3))
    whole = (rows[:, START] == 0) & (rows[:, STOP] == sizes.prod(axis=1))
    low = np.maximum(at, np.array(begin, dtype=np.int64))
    high = np.minimum(at + sizes, np.array(begin, dtype=np.int64) + np.array(extent, dtype=np.int64))
    whole &= np.all(high > low, axis=1)
    first = rows[:, OFFSET] + ((low - at) * strides).sum(axis=1) * itemsize
    columns = rows[:, FILE], first, strides * itemsize, low, high - low
    file, offset, *vectors = (column[whole].tolist() for column in columns)
    parts = list(map(Part, file, offset, *(map(tuple, vector) for vector in vectors)))  # there may be very many
    for row in rows[~whole].tolist():
        parts += _parts_of_range(row, d, itemsize, (begin, extent))
    return parts


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


def _parts_of_range(row: Sequence[int], d: int, itemsize: int, box: Box) -> Iterator[Part]:
    at, size, stride = (tuple(row[BOX + d * n : BOX + d * (n + 1)]) for n in range(3))
    origin = row[OFFSET] - row[START] * itemsize  # where the box would begin, were all of it here
    for inner_at, inner_size in boxes_of_range(row[START], row[STOP], size):
        in_tensor = tuple(a + b for a, b in zip(at, inner_at, strict=True))
        found = intersect((in_tensor, inner_size), box)
        if found is not None:
            first = sum((x - a) * s for x, a, s in zip(found[0], at, stride, strict=True))
            yield Part(row[FILE], origin + first * itemsize, tuple(s * itemsize for s in stride), *found)


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


def _parts_overlap(parts: Sequence[Part]) -> bool:
    """Whether two parts share an element: what is left to ask where a piece is less than its box."""
    at = np.array([part.offsets for part in parts], dtype=np.int64)
    return _boxes_overlap(at, at + np.array([part.sizes for part in parts], dtype=np.int64))


def _overlap(rows: Rows, dims: int) -> bool:
    """Whether two pieces may share an element: two ranges of one box, or two boxes."""
    columns = [rows[:, START], *(rows[:, BOX + n] for n in reversed(range(2 * dims)))]
    rows = rows[np.lexsort(columns)]
    boxes = rows[:, BOX : BOX + 2 * dims]
    same = np.all(boxes[1:] == boxes[:-1], axis=1)
    if np.any(same & (rows[1:, START] < rows[:-1, STOP])):
        return True
    boxes = boxes[np.concatenate([[True], ~same])]
    return len(boxes) > 1 and _boxes_overlap(boxes[:, :dims], boxes[:, :dims] + boxes[:, dims:])


def _boxes_overlap(at: Rows, ends: Rows) -> bool:
    """Of different boxes. In a grid different ones never do; else a sweep."""
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
