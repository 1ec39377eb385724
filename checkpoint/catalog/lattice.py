"""Rows of numbers that go up by equal steps along axes: found in the rows, unfolded, and cut down to what is wanted.

Pure arithmetic for `table.py`. A block is base rows and axes that all of them have; each axis is how often to add
what. A row is then `base + i * steps + j * steps' ...`, so that whatever is linear in it has its extremes at corners.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
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

    def corners(self) -> Rows:
        """The rows between which all others lie."""
        if not self.axes:
            return self.bases
        moves = np.zeros((1, self.bases.shape[1]), dtype=np.int64)
        for count, steps in self.axes:
            moves = np.concatenate([moves, moves + (count - 1) * np.array(steps, dtype=np.int64)])
        return (self.bases[:, None] + moves[None]).reshape(-1, self.bases.shape[1])

    def most(self, column: int) -> int:
        """The largest number of a column; there must be a row."""
        return int(self.bases[:, column].max()) + sum(max(0, (count - 1) * steps[column]) for count, steps in self.axes)

    def total(self, column: int) -> int:
        """The sum of a column over all rows."""
        grown = sum(steps[column] * (count - 1) * self.times // 2 for count, steps in self.axes)
        return int(self.bases[:, column].sum()) * self.times + len(self.bases) * grown

    def to_json(self) -> list[Any]:
        return [self.bases.tolist(), [[count, list(steps)] for count, steps in self.axes]]


def parse_block(raw: Any, columns: int) -> Block:
    """What `Block.to_json` gave. Raises ValueError for anything else, and for more than any job has."""
    bases, axes = raw
    block = Block(
        np.array([_numbers(base, columns) for base in bases], dtype=np.int64).reshape(-1, columns),
        tuple((_count(count), _numbers(steps, columns)) for count, steps in axes),
    )
    reach = sum(count * max(map(abs, steps), default=0) for count, steps in block.axes)
    reach += sum(sum(map(abs, base)) for base in bases)  # so that no sum of a column wraps around
    if len(block.axes) > _MOST_AXES or block.times * len(block.bases) > _MOST_ROWS or reach > _MOST_NUMBER:
        raise ValueError("pieces beyond all measure")
    return block


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


def _numbers(raw: Any, columns: int) -> tuple[int, ...]:
    if len(raw) != columns or set(map(type, raw)) != {int} or max(map(abs, raw)) > _MOST_NUMBER:
        raise ValueError(f"not {columns} whole numbers")
    return tuple(raw)


def _count(raw: Any) -> int:
    if type(raw) is not int or raw < 1:
        raise ValueError(f"{raw!r} is no number of rows")
    return raw
