"""All pieces of one tensor, as rows of numbers; written down as lattices where they are regular.

A job of thousands of ranks cuts its tensors regularly: from rank to rank along an axis of the mesh the same numbers go
up by the same amounts. Such rows are stored as one row, and for each axis how often to add what: the mesh and the
placement of the job, found in the numbers, so that it does not matter which library cut them.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from resilient.checkpoint.pieces import Piece

Rows = NDArray[np.int64]
FILE, OFFSET, START, STOP, BOX = range(5)  # columns; from BOX on: offsets, sizes and strides, one number a dimension


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredPiece:
    """A piece, and where its bytes are: `offset` is that of its first element in file number `file` of the catalog.

    `strides`, in elements, are those of the box as it is stored; None: row-major. Only whole boxes may have others.
    """

    piece: Piece
    file: int
    offset: int
    strides: tuple[int, ...] | None = None


def row_major(sizes: Sequence[int]) -> tuple[int, ...]:
    """The strides, in elements, of a contiguous array."""
    return tuple(math.prod(sizes[dim + 1 :]) for dim in range(len(sizes)))


class PieceTable:
    """The pieces of one tensor of `dims` dimensions. Immutable; `rows` is not to be changed."""

    def __init__(self, dims: int, rows: Rows) -> None:
        """`rows`: int64 [pieces, 4 + 3 * dims]."""
        self.dims = dims
        self.rows = rows.reshape(-1, BOX + 3 * dims)

    @classmethod
    def of(cls, pieces: Iterable[StoredPiece]) -> "PieceTable":
        """At least one piece, all of the same tensor. Raises ValueError for strides of a part of a box."""
        found = list(pieces)
        rows = [_row(one) for one in found]
        return cls(len(found[0].piece.shape), np.array(rows, dtype=np.int64))

    def __len__(self) -> int:
        return len(self.rows)

    def pieces(self, shape: tuple[int, ...]) -> Iterator[StoredPiece]:
        """The rows as objects; slow for very many."""
        d = self.dims
        for row in self.rows.tolist():
            offsets, sizes, strides = (tuple(row[BOX + d * n : BOX + d * (n + 1)]) for n in range(3))
            piece = Piece(shape=shape, offsets=offsets, sizes=sizes, start=row[START], stop=row[STOP])
            yield StoredPiece(piece=piece, file=row[FILE], offset=row[OFFSET], strides=strides)

    @property
    def offsets(self) -> Rows:
        return self.rows[:, BOX : BOX + self.dims]

    @property
    def sizes(self) -> Rows:
        return self.rows[:, BOX + self.dims : BOX + 2 * self.dims]

    @property
    def strides(self) -> Rows:
        return self.rows[:, BOX + 2 * self.dims :]

    @property
    def numel(self) -> int:
        """Elements of all pieces together."""
        return int((self.rows[:, STOP] - self.rows[:, START]).sum())

    def to_json(self) -> list[Any]:
        """A list of lattices, each `[row, [[count, steps], ...]]`, the innermost axis first."""
        return [[base, axes] for base, axes in _fold(self.rows)]

    @classmethod
    def from_json(cls, dims: int, lattices: Sequence[Any]) -> "PieceTable":
        """What `to_json` gave. Raises ValueError for anything else."""
        parts = [_unfold(base, axes) for base, axes in lattices]
        return cls(dims, np.concatenate(parts) if parts else np.empty((0, BOX + 3 * dims), np.int64))


def _row(one: StoredPiece) -> list[int]:
    piece = one.piece
    strides = one.strides or row_major(piece.sizes)
    if not piece.is_box and strides != row_major(piece.sizes):
        raise ValueError(f"a part of a box is stored row-major, not with strides {strides}")
    return [one.file, one.offset, piece.start, piece.stop, *piece.offsets, *piece.sizes, *strides]


_Axes = tuple[tuple[int, tuple[int, ...]], ...]


def _fold(rows: Rows) -> list[tuple[list[int], list[list[Any]]]]:
    """Lattices that unfold, one after the other, to the rows in their order."""
    items: list[tuple[Rows, _Axes]] = [(rows, ())]  # base rows that have the same axes
    while True:
        folded: list[tuple[Rows, _Axes]] = []
        for bases, axes in items:
            folded += _fold_once(bases, axes)
        joined = _join(folded)
        if sum(len(bases) for bases, _ in joined) == sum(len(bases) for bases, _ in items):
            break
        items = joined
    return [
        (base, [[count, list(steps)] for count, steps in axes]) for bases, axes in joined for base in bases.tolist()
    ]


def _fold_once(bases: Rows, axes: _Axes) -> list[tuple[Rows, _Axes]]:
    """Runs of rows that go up by equal steps, each as its first row and one more axis."""
    steps = np.diff(bases, axis=0)
    ends = np.flatnonzero(np.any(steps[1:] != steps[:-1], axis=1)) + 2  # behind the last row of a run of equal steps
    found: list[tuple[Rows, _Axes]] = []
    begin, count = 0, len(bases)
    while begin < count:
        later = np.searchsorted(ends, begin + 2)
        end = int(ends[later]) if later < len(ends) else count
        if begin + 1 == count:
            found.append((bases[begin:], axes))
            break
        if end - begin == 2 and end < count and (not found or found[-1][1] == axes):
            end = begin + 1  # two rows always have "equal steps": the second may begin a longer run
        length = end - begin
        axis = ((length, tuple(steps[begin].tolist())),) if length > 1 else ()
        found.append((bases[begin : begin + 1], axes + axis))
        begin = end
    return found


def _join(items: Sequence[tuple[Rows, _Axes]]) -> list[tuple[Rows, _Axes]]:
    """Neighbours with the same axes together."""
    groups: list[tuple[list[Rows], _Axes]] = []
    for bases, axes in items:
        if groups and groups[-1][1] == axes:
            groups[-1][0].append(bases)
        else:
            groups.append(([bases], axes))
    return [(np.concatenate(parts), axes) for parts, axes in groups]


def _unfold(base: Sequence[int], axes: Sequence[Any]) -> Rows:
    rows = np.array([base], dtype=np.int64)
    for count, steps in axes:
        grow = np.arange(count, dtype=np.int64)[:, None, None] * np.array(steps, dtype=np.int64)
        rows = (rows[None] + grow).reshape(-1, rows.shape[1])
    return rows
