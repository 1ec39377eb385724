"""Rows of numbers that go up by equal steps along axes: found in the rows, unfolded, and cut down to what is wanted.

Pure arithmetic for `table.py`. A block is base rows and axes that all of them have; each axis is how often to add
what. A row is then `base + i * steps + j * steps' ...`, so that whatever is linear in it has its extremes at corners.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.int64]
Axes = tuple[tuple[int, tuple[int, ...]], ...]
"""(count, steps) of each axis, the innermost first."""

Bound = tuple[tuple[int, ...], tuple[int, ...], int, int]
"""Columns `low` and `high`, `begin` and `end`: a row is wanted where sum(low) < end and sum(high) > begin."""

_MOST_ROWS = 1 << 24
_MOST_AXES = 8
_MOST_NUMBER = 1 << 60


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """Base rows, int64 [bases, columns], and the axes of each. Unfolded base by base, the outermost axis slowest."""

    bases: Rows
    axes: Axes = ()

    @property
    def times(self) -> int:
        """Rows that each base stands for."""
        return math.prod(count for count, _ in self.axes)

    def unfold(self) -> Rows:
        if not self.axes:
            return self.bases
        grown = np.zeros((1, self.bases.shape[1]), dtype=np.int64)
        for count, steps in self.axes:
            step = np.array(steps, dtype=np.int64)
            grown = (grown[None] + np.arange(count, dtype=np.int64)[:, None, None] * step).reshape(-1, len(steps))
        return (self.bases[:, None] + grown[None]).reshape(-1, self.bases.shape[1])

    def most(self, column: int) -> int:
        """The largest number of a column; there must be a row."""
        return int(self.bases[:, column].max()) + sum(max(0, (count - 1) * steps[column]) for count, steps in self.axes)

    def total(self, column: int) -> int:
        """The sum of a column over all rows."""
        grown = sum(steps[column] * (count - 1) * self.times // 2 for count, steps in self.axes)
        of_bases = self.bases[0, column] if len(self.bases) == 1 else self.bases[:, column].sum()
        return int(of_bases) * self.times + len(self.bases) * grown

    def to_json(self) -> list[Any]:
        return [self.bases.tolist(), [[count, list(steps)] for count, steps in self.axes]]


def parse_blocks(raws: Sequence[Any], columns: int) -> list[Block]:
    """What `Block.to_json` gave, of several blocks. Raises ValueError and its like for anything else, and for more than
    any job has.

    All at once: a checkpoint has thousands, and to look at each by itself takes longer than to read them.
    """
    rows = _numbers([base for bases, _ in raws for base in bases], columns)
    counts = [_count(count) for _, axes in raws for count, _ in axes]
    steps = _numbers([step for _, axes in raws for _, step in axes], columns)
    # As floating-point numbers, which do not wrap around.
    reach = np.zeros(len(raws))
    np.add.at(reach, _owners([len(bases) for bases, _ in raws]), np.abs(rows).sum(axis=1, dtype=np.float64))
    far = np.array(counts, dtype=np.float64) * np.abs(steps).max(axis=1)
    np.add.at(reach, _owners([len(axes) for _, axes in raws]), far)
    found, begin = [], 0
    for bases, axes in raws:
        block = Block(rows[begin : begin + len(bases)], tuple((count, tuple(step)) for count, step in axes))
        begin += len(bases)
        if len(axes) > _MOST_AXES or block.times * len(bases) > _MOST_ROWS:
            raise ValueError("pieces beyond all measure")
        found.append(block)
    if (reach > _MOST_NUMBER).any():  # so that no sum of a column wraps around
        raise ValueError("pieces beyond all measure")
    return found


def corners_of(blocks: Sequence[Block], columns: int) -> tuple[Rows, Rows]:
    """The rows between which all others of blocks lie, and of which block each is, by number."""
    found: list[Rows] = [np.empty((0, columns), np.int64)]
    owners: list[Rows] = [np.empty(0, np.int64)]
    by_axes: dict[int, list[int]] = {}
    for number, block in enumerate(blocks):
        by_axes.setdefault(len(block.axes), []).append(number)
    for axes, numbers in by_axes.items():
        some = [blocks[number] for number in numbers]
        rows = np.concatenate([block.bases for block in some])
        each = _owners([len(block.bases) for block in some])
        corners = rows
        for axis in range(axes):
            steps = np.array([block.axes[axis][1] for block in some], dtype=np.int64)
            last = np.array([[block.axes[axis][0] - 1] for block in some], dtype=np.int64)
            moves = np.tile((steps * last)[each], (len(corners) // max(1, len(rows)), 1))
            corners = np.concatenate([corners, corners + moves])
        found.append(corners)
        owners.append(np.tile(np.array(numbers, dtype=np.int64)[each], len(corners) // max(1, len(rows))))
    return np.concatenate(found), np.concatenate(owners)


def _owners(lengths: Sequence[int]) -> Rows:
    """Of each of the members of several lists, end to end, the number of its list."""
    return np.repeat(np.arange(len(lengths)), lengths)


def fold(rows: Rows) -> list[Block]:
    """Blocks that unfold to the rows, in another order."""
    blocks = [Block(rows)]
    while True:
        joined = _join(part for block in blocks for part in _fold_once(block))
        if sum(len(block.bases) for block in joined) == sum(len(block.bases) for block in blocks):
            return joined
        blocks = joined


def clipped(base: Sequence[int], axes: Axes, bounds: Sequence[Bound]) -> tuple[list[int], Axes] | None:
    """A lattice of one base without most of the rows that are not wanted; None where no row is."""
    row = list(base)
    left = list(axes)
    for number in reversed(range(len(left))):
        count, steps = left[number]
        first, last = 0, count - 1
        for low, high, begin, end in bounds:
            least, most = _total(low, row), _total(high, row)
            for other, (times, moves) in enumerate(left):
                if other != number:
                    least += min(0, (times - 1) * _total(low, moves))
                    most += max(0, (times - 1) * _total(high, moves))
            first, last = _until(least, _total(low, steps), end, first, last)
            first, last = _until(-most, -_total(high, steps), -begin, first, last)
            if first > last:
                return None
        row = [value + first * step for value, step in zip(row, steps, strict=True)]
        left[number] = (last - first + 1, steps)
    return row, tuple(left)


def _until(value: int, step: int, end: int, first: int, last: int) -> tuple[int, int]:
    """Those i from `first` to `last` with value + i * step < end."""
    if step > 0:
        return first, min(last, (end - 1 - value) // step)
    if step < 0:
        return max(first, (value - end) // -step + 1), last
    return (first, last) if value < end else (1, 0)


def _total(columns: tuple[int, ...], row: Sequence[int]) -> int:
    total = 0
    for column in columns:
        total += row[column]
    return total


def _fold_once(block: Block) -> Iterator[Block]:
    """Runs of base rows that go up by equal steps, each as its first row and one more axis."""
    steps = np.diff(block.bases, axis=0)
    ends = np.flatnonzero(np.any(steps[1:] != steps[:-1], axis=1)) + 2  # behind the last row of a run of equal steps
    begin, count = 0, len(block.bases)
    while begin < count:
        later = np.searchsorted(ends, begin + 2)
        end = int(ends[later]) if later < len(ends) else count
        if end - begin == 2 and end < count and not _again(steps, begin):
            end = begin + 1  # two rows always have "equal steps": the second may begin a longer run
        length = end - begin
        axis = ((length, tuple(steps[begin].tolist())),) if length > 1 else ()
        yield Block(block.bases[begin : begin + 1], block.axes + axis)
        begin = end


def _again(steps: Rows, begin: int) -> bool:
    """Whether the next two rows are as far apart as these two: an axis of two."""
    return begin + 2 < len(steps) and bool((steps[begin] == steps[begin + 2]).all())


def _join(blocks: Iterable[Block]) -> list[Block]:
    """Those with the same axes together."""
    groups: dict[Axes, list[Rows]] = {}
    for block in blocks:
        groups.setdefault(block.axes, []).append(block.bases)
    return [Block(np.concatenate(parts), axes) for axes, parts in groups.items()]


def _numbers(raws: list[Any], columns: int) -> Rows:
    """Lists of whole numbers as rows."""
    flat = list(chain.from_iterable(raws))
    if not set(map(len, raws)) <= {columns} or not set(map(type, flat)) <= {int}:
        raise ValueError(f"not {columns} whole numbers")
    if flat and not -_MOST_NUMBER <= min(flat) <= max(flat) <= _MOST_NUMBER:
        raise ValueError("a number beyond all measure")
    return np.array(flat, dtype=np.int64).reshape(len(raws), columns)


def _count(raw: Any) -> int:
    if type(raw) is not int or raw < 1:
        raise ValueError(f"{raw!r} is no number of rows")
    return raw
