"""Where the parity of one snapshot lies in a group, block by block. Pure: every member computes the same from the same.

A member's data are its ranks' images end to end, each padded to whole blocks, so that the segments of `ec/placement.py`
are whole blocks and every block that moves between nodes can be compared with its image's record. The padding counts as
zeros: it is neither stored nor sent. A *row block* is one block of every shard of a row: the least that is encoded.
"""

from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any, NamedTuple

from resilient.ec.placement import rows
from resilient.errors import UsageError

Key = tuple[str, int]
"""(life, step): one snapshot, on all nodes. The text of a later life is greater."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """A node of a group; `image_bytes[i]` is the size of the image of `ranks[i]`."""

    node: str
    ranks: tuple[int, ...]
    image_bytes: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.ranks) != len(self.image_bytes) or len(set(self.ranks)) != len(self.ranks):
            raise UsageError(f"node {self.node} has ranks {self.ranks} and images of {self.image_bytes} bytes")
        if any(nbytes < 0 for nbytes in self.image_bytes):
            raise UsageError(f"node {self.node} has images of {self.image_bytes} bytes")


@dataclass(frozen=True, slots=True, kw_only=True)
class Stripe:
    """One snapshot in one group: all that its layout follows from. Raises UsageError for what cannot be."""

    life: str
    step: int
    world_size: int
    m: int
    block_bytes: int
    members: tuple[Member, ...]

    def __post_init__(self) -> None:
        if self.block_bytes < 1 or not 1 <= self.m < len(self.members):
            raise UsageError(
                f"{self.m} parities of blocks of {self.block_bytes} bytes in a group of {len(self.members)}"
            )
        ranks = [rank for member in self.members for rank in member.ranks]
        if len({member.node for member in self.members}) != len(self.members) or len(set(ranks)) != len(ranks):
            raise UsageError(f"a group has each node and each rank once, unlike {self.members}")

    @property
    def key(self) -> Key:
        return self.life, self.step

    @property
    def n(self) -> int:
        return len(self.members)

    @property
    def k(self) -> int:
        return len(self.members) - self.m

    def to_json(self) -> dict[str, Any]:
        return {
            "life": self.life,
            "step": self.step,
            "world_size": self.world_size,
            "m": self.m,
            "block_bytes": self.block_bytes,
            "members": [[one.node, list(one.ranks), list(one.image_bytes)] for one in self.members],
        }

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> "Stripe":
        """Raises UsageError, and KeyError, TypeError or ValueError for what is no stripe at all."""
        members = tuple(
            Member(node=str(node), ranks=tuple(map(int, ranks)), image_bytes=tuple(map(int, sizes)))
            for node, ranks, sizes in raw["members"]
        )
        return cls(
            life=str(raw["life"]),
            step=int(raw["step"]),
            world_size=int(raw["world_size"]),
            m=int(raw["m"]),
            block_bytes=int(raw["block_bytes"]),
            members=members,
        )


class Block(NamedTuple):
    """One block of a data shard: block `block` of the image of `rank`, which `member` holds."""

    shard: int
    member: int
    rank: int
    block: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Stretch:
    """Row blocks `number` to `number + count - 1`, whose blocks lie end to end within one image for each shard.

    `blocks` are the first of each shard, with the bytes of all `count`; only the last of an image may be short.
    """

    row: int
    number: int
    count: int
    blocks: tuple[Block, ...]

    @property
    def width(self) -> int:
        """The bytes that the stretch has of each parity."""
        return max(block.nbytes for block in self.blocks)


class Place(NamedTuple):
    """Where a block of an image is in the parity: its row, its shard, and the number of the row block."""

    row: int
    shard: int
    number: int


class Layout:
    """What follows from a stripe. Use `layout_of`, which keeps those made last."""

    def __init__(self, stripe: Stripe) -> None:
        self.stripe = stripe
        self._member_of = {rank: index for index, one in enumerate(stripe.members) for rank in one.ranks}
        blocks = [[-(-nbytes // stripe.block_bytes) for nbytes in one.image_bytes] for one in stripe.members]
        self._firsts = [[0, *accumulate(counts)] for counts in blocks]  # of each image, in the member's blocks
        sizes = [firsts[-1] * stripe.block_bytes for firsts in self._firsts]
        self._rows = rows(sizes, stripe.m, align=stripe.block_bytes)
        self._segments = self._find_segments()

    def blocks(self, row: int) -> int:
        """How many row blocks a row has."""
        return self._rows[row].nbytes // self.stripe.block_bytes

    def keepers(self, row: int) -> tuple[int, ...]:
        """The members that keep the row's parity; the first is its primary."""
        return self._rows[row].parity

    def kept_by(self, member: int) -> list[tuple[int, int]]:
        """The (row, parity number) of all that a member keeps."""
        return [(row, j) for row in range(self.stripe.n) for j, kept in enumerate(self.keepers(row)) if kept == member]

    def shards(self, row: int, number: int) -> list[Block]:
        """The data blocks of a row block; shards that ended earlier are left out, and count as zeros."""
        found = []
        for shard, segment in enumerate(self._rows[row].data):
            first = segment.begin // self.stripe.block_bytes + number
            if first * self.stripe.block_bytes < segment.end:
                found.append(self._block(shard, segment.member, first))
        return found

    def nbytes(self, row: int, number: int) -> int:
        """The bytes of a row block: what each of its parity blocks has."""
        return max((block.nbytes for block in self.shards(row, number)), default=0)

    def stretch(self, row: int, number: int, most: int) -> Stretch:
        """As many row blocks from `number` on as can be moved and worked on as one, up to `most`."""
        first = last = self.shards(row, number)
        count = 1
        while count < most and number + count < self.blocks(row):
            following = self.shards(row, number + count)
            if [block[:4] for block in following] != [(*block[:3], block.block + count) for block in first]:
                break
            last = following
            count += 1
        before = (count - 1) * self.stripe.block_bytes
        blocks = tuple(one._replace(nbytes=before + end.nbytes) for one, end in zip(first, last, strict=True))
        return Stretch(row, number, count, blocks)

    def parity_bytes(self, row: int) -> int:
        """The room that one parity shard of a row takes: whole blocks, but for the last."""
        count = self.blocks(row)
        return (count - 1) * self.stripe.block_bytes + self.nbytes(row, count - 1) if count else 0

    def where(self, rank: int, block: int) -> Place:
        """Where a block of a rank's image is. The inverse of `shards`."""
        member = self._member_of[rank]
        index = self._firsts[member][self.stripe.members[member].ranks.index(rank)] + block
        segments = self._segments[member]
        first, row, shard = segments[bisect_right(segments, (index, self.stripe.n, 0)) - 1]
        return Place(row, shard, index - first)

    def places(self, rank: int) -> Iterator[Place]:
        """The places of all blocks of a rank's image, in order."""
        for block in range(self.image_blocks(rank)):
            yield self.where(rank, block)

    def image_blocks(self, rank: int) -> int:
        firsts = self._firsts[self._member_of[rank]]
        number = self.stripe.members[self._member_of[rank]].ranks.index(rank)
        return firsts[number + 1] - firsts[number]

    def segment_ranks(self, row: int) -> list[set[int]]:
        """The ranks whose images each data shard of a row is cut from."""
        found: list[set[int]] = [set() for _ in range(self.stripe.k)]
        for shard, segment in enumerate(self._rows[row].data):
            begin, end = (offset // self.stripe.block_bytes for offset in (segment.begin, segment.end))
            firsts = self._firsts[segment.member]
            for number, rank in enumerate(self.stripe.members[segment.member].ranks):
                if max(begin, firsts[number]) < min(end, firsts[number + 1]):
                    found[shard].add(rank)
        return found

    def _find_segments(self) -> list[list[tuple[int, int, int]]]:
        """(first block, row, shard) of each member's segments that are not empty, ascending."""
        found: list[list[tuple[int, int, int]]] = [[] for _ in self.stripe.members]
        for row, one in enumerate(self._rows):
            for shard, segment in enumerate(one.data):
                if segment.begin < segment.end:
                    found[segment.member].append((segment.begin // self.stripe.block_bytes, row, shard))
        return [sorted(segments) for segments in found]

    def _block(self, shard: int, member: int, index: int) -> Block:
        """Block `index` of a member's data."""
        firsts, one = self._firsts[member], self.stripe.members[member]
        number = bisect_right(firsts, index) - 1
        block = index - firsts[number]
        nbytes = min(self.stripe.block_bytes, one.image_bytes[number] - block * self.stripe.block_bytes)
        return Block(shard, member, one.ranks[number], block, nbytes)


@lru_cache(maxsize=32)
def layout_of(stripe: Stripe) -> Layout:
    return Layout(stripe)


def image_range(life: str, step: int, rank: int) -> str:
    """What peers call a rank's image."""
    return f"image/{life}/{step}/{rank}"


def parity_range(life: str, step: int, row: int, number: int) -> str:
    """What peers call parity `number` of a row."""
    return f"parity/{life}/{step}/{row}/{number}"


class RangeName(NamedTuple):
    """A parsed name: `numbers` is (rank,) of an image, (row, parity number) of parity."""

    kind: str
    life: str
    step: int
    numbers: tuple[int, ...]


def parse_range_name(name: str) -> RangeName | None:
    """The inverse of `image_range` and `parity_range`; None for any other name."""
    kind, _, rest = name.partition("/")
    parts = rest.split("/")
    if {"image": 3, "parity": 4}.get(kind) != len(parts):
        return None
    if not all(part.isascii() and part.isdigit() for part in parts[1:]):
        return None
    step, *numbers = map(int, parts[1:])
    return RangeName(kind, parts[0], step, tuple(numbers))
