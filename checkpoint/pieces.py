"""Pieces: which part of which global tensor a rank holds, and which of the replicas saves it.

A piece is a box (`offsets`, `sizes`) of the global shape and, within that box, a range [`start`, `stop`) of its
row-major elements. The range is what lets replicas share one tensor evenly. Pure values and pure functions; the state
is walked in `leaves.py`, the bytes are laid out in `plan.py`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

_CUT_BYTES = 64 << 10  # a tensor is cut between replicas only where both parts are at least this large


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Elements [start, stop), in row-major order, of the box (offsets, sizes) of a tensor of the global `shape`."""

    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    start: int
    stop: int

    @classmethod
    def whole(cls, shape: Sequence[int]) -> "Piece":
        return cls.box(shape, (0,) * len(shape), shape)

    @classmethod
    def box(cls, shape: Sequence[int], offsets: Sequence[int], sizes: Sequence[int]) -> "Piece":
        return cls(shape=tuple(shape), offsets=tuple(offsets), sizes=tuple(sizes), start=0, stop=math.prod(sizes))

    def part(self, start: int, stop: int) -> "Piece":
        """The elements [start, stop) of the same box."""
        return Piece(shape=self.shape, offsets=self.offsets, sizes=self.sizes, start=start, stop=stop)

    @property
    def numel(self) -> int:
        return self.stop - self.start

    @property
    def is_box(self) -> bool:
        """Whether it is its box as a whole."""
        return self.start == 0 and self.stop == math.prod(self.sizes)

    def same_box(self, other: "Piece") -> bool:
        return (self.shape, self.offsets, self.sizes) == (other.shape, other.offsets, other.sizes)


@dataclass(frozen=True, slots=True)
class Replicated:
    """What `share` needs to know of one replicated tensor: elements, bytes of one, and whether it may be cut."""

    numel: int
    itemsize: int
    divisible: bool


def share(tensors: Sequence[Replicated], replicas: int) -> list[list[tuple[int, int]]]:
    """Share replicated tensors evenly: for each tensor, the element range that each of the `replicas` saves.

    All tensors are laid end to end and cut into equal parts, so every replica finds the same answer without a
    message, and at most `replicas - 1` tensors are cut. A tensor that may not be cut, or would leave a part below
    64 KiB, goes whole to the replica in whose part its middle lies. Ranges may be empty; together they are the tensor.
    No part is smaller than 64 KiB but the last: of thousands of replicas only the first have the counters of an
    optimizer, say, so that who needs them all reads few images.
    """
    total = sum(tensor.numel * tensor.itemsize for tensor in tensors)
    bounds = [max(total * index // replicas, index * _CUT_BYTES) for index in range(replicas + 1)]
    ranges: list[list[tuple[int, int]]] = []
    begin = 0
    for tensor in tensors:
        length = tensor.numel * tensor.itemsize
        cuts = [_cut(bound - begin, length, tensor) for bound in bounds]
        cuts[0], cuts[-1] = 0, tensor.numel
        ranges.append(list(pairwise(cuts)))
        begin += length
    return ranges


def _cut(position: int, length: int, tensor: Replicated) -> int:
    """The element at which a tensor is cut for a bound that lies `position` bytes into it."""
    if position <= 0:
        return 0
    if position >= length:
        return tensor.numel
    if not tensor.divisible or min(position, length - position) < _CUT_BYTES:
        return 0 if position < length / 2 else tensor.numel
    return position // 4096 * 4096 // tensor.itemsize
