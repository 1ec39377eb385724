"""Where parity lies in a group: rotated rows, so that every node stores and computes an equal part.

A group of n = k + m nodes has n rows. In row r the nodes r to r + m - 1 (mod n) hold one parity segment each, and each
of the other k nodes has one segment of its image data in the row. So a node holds no data in a row whose parity it
keeps: with that, any m nodes may be lost. Each stores m / k of its data extra (D. A. Patterson et al.: A Case for
Redundant Arrays of Inexpensive Disks, SIGMOD 1988, level 5, for m parities).

A node's data are its ranks' images, end to end. Sizes may differ: a segment that ends early counts as followed by
zeros, which are neither stored nor sent.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from resilient.errors import UsageError


@dataclass(frozen=True, slots=True)
class Segment:
    """Bytes [begin, end) of a member's data; `member` is its number in the group."""

    member: int
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.begin


@dataclass(frozen=True, slots=True)
class Row:
    """One code word: `data[i]` is shard i, `parity[j]` the member that keeps shard k + j; `nbytes` of every shard."""

    data: tuple[Segment, ...]
    parity: tuple[int, ...]
    nbytes: int


def rows(sizes: Sequence[int], m: int, align: int = 4096) -> list[Row]:
    """The rows of a group whose members have `sizes` bytes of data. Pure: every member computes the same.

    Segments begin at multiples of `align`. Raises UsageError for fewer than m + 1 members.
    """
    n = len(sizes)
    k = n - m
    if m < 1 or k < 1:
        raise UsageError(f"{m} parities in a group of {n} nodes: at least 1, and one node more than that")
    cuts = [_up(_up(size, k) // k, align) for size in sizes]
    found = []
    for row in range(n):
        keepers = tuple((row + number) % n for number in range(m))
        holders = [member for member in range(n) if member not in keepers]
        data = tuple(_segment(member, row, sizes[member], cuts[member], n, m) for member in holders)
        found.append(Row(data, keepers, max(segment.nbytes for segment in data)))
    return found


def _segment(member: int, row: int, size: int, cut: int, n: int, m: int) -> Segment:
    """The member keeps parity in the m rows up to its own number; its data rows follow, in order."""
    number = (row - member - 1) % n
    assert number < n - m, "a member has no data in a row whose parity it keeps"
    return Segment(member, min(number * cut, size), min((number + 1) * cut, size))


def _up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
