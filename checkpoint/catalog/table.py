"""All pieces of one tensor, as rows of numbers; written down as lattices where they are regular.

A job of thousands of ranks cuts its tensors regularly: from rank to rank along an axis of the mesh the same numbers go
up by the same amounts. Such rows are stored as one row, and for each axis how often to add what: the mesh and the
placement of the job, found in the numbers, so that it does not matter which library cut them.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from resilient.checkpoint.catalog.lattice import Block, Bound, Rows, clipped, corners_of, fold, parse_blocks
from resilient.checkpoint.pieces import Piece

__all__ = ["BOX", "FILE", "OFFSET", "START", "STOP", "PieceTable", "Rows", "StoredPiece", "row_major"]

UNITS: dict[int, Any] = {1: np.uint8, 2: np.int16, 4: np.int32, 8: np.int64, 16: np.complex128}
"""Elements by their size in bytes, for moving values of whatever dtype."""
FILE, OFFSET, START, STOP, BOX = range(5)  # columns; from BOX on: offsets, sizes and strides, one number a dimension
_MOST_CLIPPED = 8  # bases of a block that are looked at one by one
_FEW_ROWS = 64  # sooner unfolded than thought about


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


def within(rows: Rows, shapes: Rows, dims: int) -> bool:
    """Whether pieces are some: within the tensor, of `shapes` ([rows or 1, dims]), and no range beyond its box."""
    at, sizes = rows[:, BOX : BOX + dims], rows[:, BOX + dims : BOX + 2 * dims]
    start, stop = rows[:, START], rows[:, STOP]
    outside = (at < 0).any() or (sizes < 0).any() or (at + sizes > shapes).any()
    empty = (start < 0).any() or (stop < start).any() or (stop > sizes.prod(axis=1)).any()
    return not (outside or empty or (rows[:, [FILE, OFFSET]] < 0).any())


class PieceTable:
    """The pieces of one tensor of `dims` dimensions. Immutable.

    It is kept as it came: as rows, or, from a catalog's text, as lattices that are unfolded where they are needed.
    """

    def __init__(self, dims: int, rows: Rows) -> None:
        """`rows`: int64 [pieces, 4 + 3 * dims]."""
        self.dims = dims
        self._blocks = [Block(rows.reshape(-1, BOX + 3 * dims))]

    @classmethod
    def of(cls, pieces: Iterable[StoredPiece]) -> "PieceTable":
        """At least one piece, all of the same tensor. Raises ValueError for strides of a part of a box."""
        found = list(pieces)
        rows = [_row(one) for one in found]
        return cls(len(found[0].piece.shape), np.array(rows, dtype=np.int64))

    @classmethod
    def joined(cls, tables: Sequence["PieceTable"]) -> "PieceTable":
        """The pieces of several tables of one tensor as one, folded; the same in whatever order they are given."""
        return cls(tables[0].dims, np.concatenate([table.rows for table in tables])).folded()

    def folded(self) -> "PieceTable":
        """The same pieces in the order of files, kept as lattices."""
        rows = self.rows
        return self._of_blocks(self.dims, fold(rows[np.lexsort((rows[:, START], rows[:, OFFSET], rows[:, FILE]))]))

    @classmethod
    def _of_blocks(cls, dims: int, blocks: list[Block]) -> "PieceTable":
        table = cls.__new__(cls)
        table.dims, table._blocks = dims, blocks
        return table

    def __len__(self) -> int:
        return sum(len(block.bases) * block.times for block in self._blocks)

    def pieces(self, shape: tuple[int, ...]) -> Iterator[StoredPiece]:
        """The rows as objects; slow for very many."""
        d = self.dims
        for row in self.rows.tolist():
            offsets, sizes, strides = (tuple(row[BOX + d * n : BOX + d * (n + 1)]) for n in range(3))
            piece = Piece(shape=shape, offsets=offsets, sizes=sizes, start=row[START], stop=row[STOP])
            yield StoredPiece(piece=piece, file=row[FILE], offset=row[OFFSET], strides=strides)

    @property
    def rows(self) -> Rows:
        """All rows, not to be changed. Of lattices they are made anew each time."""
        return self._as_one([one.unfold() for one in self._blocks])

    @property
    def corners(self) -> Rows:
        """Rows between which, number by number, all others lie: enough to see whether any is out of bounds."""
        return self.corners_of([self])[0]

    @property
    def numel(self) -> int:
        """Elements of all pieces together."""
        return sum(block.total(STOP) - block.total(START) for block in self._blocks)

    @property
    def last_file(self) -> int:
        """The highest number of a file; -1 without pieces."""
        return max((block.most(FILE) for block in self._blocks if len(block.bases)), default=-1)

    @property
    def files(self) -> list[int]:
        """The numbers of the files that have pieces, ascending."""
        found: list[int] = np.unique(self.rows[:, FILE]).tolist()
        return found

    def of_file(self, file: int) -> "PieceTable":
        """The pieces that lie in one file."""
        bounds: list[Bound] = [((FILE,), (FILE,), file - 1, file + 1)]
        rows = self._as_one(list(self._clipped(lambda _base, _block: bounds)))
        return PieceTable(self.dims, rows[rows[:, FILE] == file])

    def near(self, begin: Sequence[int], extent: Sequence[int]) -> Rows:
        """All rows that share elements with a box that has some, among others; of very many rows only few others."""
        return self._as_one(list(self._clipped(lambda base, block: self._bounds(base, block, begin, extent))))

    def meeting(self, begin: Sequence[int], extent: Sequence[int]) -> Rows:
        """The rows that share elements with a box that has some, and of flat ranges hardly any others besides."""
        return _meeting(self.near(begin, extent), self.dims, begin, extent)

    def to_json(self) -> list[Any]:
        """A list of lattices, each `[[row, ...], [[count, steps], ...]]`, the innermost axis first."""
        return [block.to_json() for one in self._blocks for block in ([one] if one.axes else fold(one.bases))]

    @classmethod
    def from_json(cls, dims: int, lattices: Sequence[Any]) -> "PieceTable":
        """What `to_json` gave. Raises ValueError and its like for anything else."""
        return cls.all_from_json(dims, [lattices])[0]

    @classmethod
    def all_from_json(cls, dims: int, tables: Sequence[Sequence[Any]]) -> list["PieceTable"]:
        """What `to_json` gave, of several tables of as many dimensions. Raises ValueError and its like."""
        blocks = iter(parse_blocks([raw for lattices in tables for raw in lattices], BOX + 3 * dims))
        return [cls._of_blocks(dims, list(islice(blocks, len(lattices)))) for lattices in tables]

    @classmethod
    def corners_of(cls, tables: Sequence["PieceTable"]) -> tuple[Rows, Rows]:
        """The corners of tables of as many dimensions, at least one, and of which table each is, by number."""
        blocks = [block for table in tables for block in table._blocks]
        owners = [number for number, table in enumerate(tables) for _ in table._blocks]
        rows, block = corners_of(blocks, BOX + 3 * tables[0].dims)
        return rows, np.array(owners, dtype=np.int64)[block]

    def _as_one(self, found: list[Rows]) -> Rows:
        return found[0] if len(found) == 1 else np.concatenate([np.empty((0, BOX + 3 * self.dims), np.int64), *found])

    def _clipped(self, bounds: Callable[[Sequence[int], Block], list[Bound]]) -> Iterator[Rows]:
        for block in self._blocks:
            if len(block.bases) > _MOST_CLIPPED or len(block.bases) * block.times <= _FEW_ROWS:
                yield block.unfold()
                continue
            for base in block.bases.tolist():
                found = clipped(base, block.axes, bounds(base, block))
                if found is not None:
                    yield Block(np.array([found[0]], dtype=np.int64), found[1]).unfold()

    def _bounds(self, base: Sequence[int], block: Block, begin: Sequence[int], extent: Sequence[int]) -> list[Bound]:
        """What `clipped` is to look at: the box along each dimension, and, where all have one box, the flat range."""
        d = self.dims
        found: list[Bound] = [
            ((BOX + dim,), (BOX + dim, BOX + d + dim), at, at + size)
            for dim, (at, size) in enumerate(zip(begin, extent, strict=True))
        ]
        if d and not any(any(steps[BOX : BOX + 2 * d]) for _, steps in block.axes):
            first, last = (int(one[0]) for one in _flat(np.array([base], dtype=np.int64), d, begin, extent))
            found.append(((START,), (STOP,), first, last + 1))
        return found


def _flat(rows: Rows, dims: int, begin: Sequence[int], extent: Sequence[int]) -> tuple[Rows, Rows]:
    """Of what each row's box shares with a box: the first and the last element, row-major in the row's."""
    offsets, sizes = rows[:, BOX : BOX + dims], rows[:, BOX + dims : BOX + 2 * dims]
    low = np.maximum(offsets, np.array(begin, dtype=np.int64)) - offsets
    high = np.minimum(offsets + sizes, np.array(begin, dtype=np.int64) + np.array(extent, dtype=np.int64)) - offsets
    first, last = np.zeros(len(rows), np.int64), np.zeros(len(rows), np.int64)
    for dim in range(dims):
        first = first * sizes[:, dim] + low[:, dim]
        last = last * sizes[:, dim] + high[:, dim] - 1
    return first, last


def _meeting(rows: Rows, dims: int, begin: Sequence[int], extent: Sequence[int]) -> Rows:
    at = np.array(begin, dtype=np.int64)
    offsets, sizes = rows[:, BOX : BOX + dims], rows[:, BOX + dims : BOX + 2 * dims]
    rows = rows[np.all((offsets < at + np.array(extent, dtype=np.int64)) & (offsets + sizes > at), axis=1)]
    if not len(rows):
        return rows
    first, last = _flat(rows, dims, begin, extent)
    return rows[(rows[:, START] <= last) & (rows[:, STOP] > first)]


def _row(one: StoredPiece) -> list[int]:
    piece = one.piece
    strides = one.strides or row_major(piece.sizes)
    if not piece.is_box and strides != row_major(piece.sizes):
        raise ValueError(f"a part of a box is stored row-major, not with strides {strides}")
    return [one.file, one.offset, piece.start, piece.stop, *piece.offsets, *piece.sizes, *strides]
