"""Reads images, or parity, of a snapshot by blocks: from who holds them, else decoded from k shards of their row.

Every block is compared with the digest in its image's record before it counts. A node that fails, or whose bytes are
not what they should be, is replaced by others as long as enough are left. Reads of all nodes run side by side.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass

from resilient.checkpoint.digest import digest
from resilient.checkpoint.parity.encode import codec_of, padded
from resilient.checkpoint.parity.facts import Done, Sealed
from resilient.checkpoint.parity.gather import Gather, Part, SourceFailed, Taken
from resilient.checkpoint.parity.layout import Layout, image_range, parity_range
from resilient.checkpoint.parity.memory import Blocks
from resilient.checkpoint.parity.recover import Sources
from resilient.errors import DamagedImage, LevelFailed, ResilientError

STRIKES = 2  # failures after which a node is asked no more
_AT_ONCE = 1024  # blocks that are planned together
_DIRECT = -1  # the shard number of a part that is the block itself


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Target:
    """A block that is wanted: of the image of a rank, or of parity (`shard` of a row block)."""

    name: str
    offset: int
    into: memoryview
    digest: str
    rank: int | None
    row: int = -1
    shard: int = -1
    number: int = -1


class Reader:
    """Reads of one snapshot. One thread at a time. `layout` None: images can be read from their holders only."""

    def __init__(
        self,
        key: tuple[str, int],
        block_bytes: int,
        images: Mapping[int, Sealed],
        sources: Sources,
        gather: Gather,
        blocks: Blocks,
        *,
        layout: Layout | None = None,
        done: Mapping[int, Done] | None = None,
    ) -> None:
        self._key = key
        self._block_bytes = block_bytes
        self._images = images
        self._sources = sources
        self._gather = gather
        self._blocks = blocks
        self._layout = layout
        self._done = done or {}
        self._strikes: Counter[str] = Counter()
        self._bad: set[tuple[str, str, int]] = set()
        self._last: ResilientError | None = None

    def read(self, rank: int, first: int, last: int, into: memoryview) -> None:
        """Blocks [first, last) of the image of a rank, into memory of just their size. Blocks.

        `into` is right on return, and anything on an error. Raises LevelFailed, or DamagedImage where bytes are wrong.
        """
        image = self._images[rank]
        start = first * self._block_bytes
        targets = []
        for block in range(first, last):
            offset = block * self._block_bytes
            stop = min(offset + self._block_bytes, image.nbytes)
            place = self._layout.where(rank, block) if self._layout is not None else (-1, -1, -1)
            targets.append(
                _Target(
                    name=image_range(*self._key, rank),
                    offset=offset,
                    into=into[offset - start : stop - start],
                    digest=image.digest_of(block),
                    rank=rank,
                    row=place[0],
                    shard=place[1],
                    number=place[2],
                )
            )
        self._fetch(targets)

    def parity(self, row: int, j: int, number: int, into: memoryview) -> None:
        """One block of parity, computed from other shards. Raises as `read` does."""
        assert self._layout is not None
        target = _Target(
            name=parity_range(*self._key, row, j),
            offset=number * self._block_bytes,
            into=into,
            digest=self._done[row].digest_of(j, number),
            rank=None,
            row=row,
            shard=self._layout.stripe.k + j,
            number=number,
        )
        self._fetch([target])

    def distrust(self, node: str, name: str, offset: int) -> None:
        """A node's copy of a block is known to be damaged."""
        self._bad.add((node, name, offset))

    # --- inside

    def _fetch(self, targets: Sequence[_Target]) -> None:
        left = list(targets)
        while left:
            now, left = left[:_AT_ONCE], left[_AT_ONCE:]
            plans = [self._plan(target) for target in now]
            count = 0
            again: list[_Target] = []
            try:
                with closing(self._gather(plans, self._check)) as gathered:
                    for target, taken in zip(now, gathered, strict=False):
                        count += 1
                        if not self._finish(target, taken):
                            again.append(target)
            except SourceFailed as error:
                self._blame(error, plans[count])
            left = again + now[count:] + left

    def _plan(self, target: _Target) -> list[Part]:
        """The parts that give a block: itself, or k of the other shards. Raises LevelFailed or DamagedImage."""
        if target.rank is not None:
            for node in self._usable(self._sources.images.get(target.rank, ()), target.name, target.offset):
                return [self._part(node, target.name, target.offset, target.into.nbytes, target.digest, target.into)]
        parts = self._others(target) if self._layout is not None else None
        if parts is not None:
            return parts
        kind = DamagedImage if isinstance(self._last, DamagedImage) else LevelFailed
        raise kind(
            f"{target.name} at offset {target.offset} can be had from nobody any more"
            + (f": {self._last}" if self._last else "; too many nodes are lost")
        )

    def _others(self, target: _Target) -> list[Part] | None:
        """k other shards of the target's row block; those that are all zeros are not read."""
        assert self._layout is not None
        stripe = self._layout.stripe
        found: list[tuple[int, Part]] = []
        blocks = {block.shard: block for block in self._layout.shards(target.row, target.number)}
        needed = stripe.k - sum(shard not in blocks for shard in range(stripe.k) if shard != target.shard)
        for shard, block in blocks.items():
            name, offset = image_range(*self._key, block.rank), block.block * self._block_bytes
            if shard != target.shard:
                for node in self._usable(self._sources.images.get(block.rank, ()), name, offset)[:1]:
                    found_digest = self._images[block.rank].digest_of(block.block)
                    part = self._part(node, name, offset, block.nbytes, found_digest, shard=shard)
                    found.append((self._strikes[node], part))
        offset, width = target.number * self._block_bytes, self._layout.nbytes(target.row, target.number)
        for j in range(stripe.m):
            name = parity_range(*self._key, target.row, j)
            if stripe.k + j != target.shard and target.row in self._done:
                for node in self._usable(self._sources.parity.get((target.row, j), ()), name, offset)[:1]:
                    found_digest = self._done[target.row].digest_of(j, target.number)
                    part = self._part(node, name, offset, width, found_digest, shard=stripe.k + j)
                    found.append((self._strikes[node], part))
        found.sort(key=lambda each: each[0])  # stable: data, then parity 0, then the others
        return [part for _, part in found[:needed]] if len(found) >= needed else None

    def _usable(self, nodes: Iterable[str], name: str, offset: int) -> list[str]:
        """Those that may be asked, the most dependable first."""
        fit = [each for each in nodes if self._strikes[each] < STRIKES and (each, name, offset) not in self._bad]
        return sorted(fit, key=self._strikes.__getitem__)

    def _part(
        self,
        node: str,
        name: str,
        offset: int,
        nbytes: int,
        expected: str,
        into: memoryview | None = None,
        shard: int = _DIRECT,
    ) -> Part:
        return Part(node=node, name=name, offset=offset, nbytes=nbytes, digest=expected, shard=shard, into=into)

    def _check(self, part: Part, view: memoryview) -> None:
        """On the reading threads. What is decoded from is not compared: what comes out of it is."""
        if part.shard == _DIRECT and digest(view) != part.digest:
            raise DamagedImage(f"{part.name} at offset {part.offset} on node {part.node} is damaged")

    def _finish(self, target: _Target, taken: Taken) -> bool:
        """Make the block of what was read. False: it has to be read again, from others."""
        if taken and taken[0][0].shard == _DIRECT:
            return True
        assert self._layout is not None
        stripe, nbytes = self._layout.stripe, target.into.nbytes
        zeros = self._blocks.zeros()[:nbytes]
        ended = set(range(stripe.k)) - {each.shard for each in self._layout.shards(target.row, target.number)}
        present = {shard: zeros for shard in ended if shard != target.shard}
        for part, view in taken:
            present[part.shard] = padded(view, max(nbytes, view.nbytes))[:nbytes]
        codec_of(stripe.k, stripe.m).decode(present, {target.shard: target.into})
        if digest(target.into) == target.digest:
            return True
        liars = [part for part, view in taken if digest(view[: part.nbytes]) != part.digest]
        if not liars:
            raise DamagedImage(f"{target.name} at offset {target.offset}: its shards do not give what its record says")
        for part in liars:
            self._blame_part(part, DamagedImage(f"{part.name} at {part.offset} on node {part.node} is damaged"))
        return False

    def _blame(self, failure: SourceFailed, position: Sequence[Part]) -> None:
        """A position could not be read."""
        if isinstance(failure.error, DamagedImage):
            for part in position:
                if part.node == failure.node and part.shard == _DIRECT:
                    self._blame_part(part, failure.error)
                    return
        self._strikes[failure.node] += 1
        self._last = failure.error

    def _blame_part(self, part: Part, error: ResilientError) -> None:
        self._bad.add((part.node, part.name, part.offset))
        self._last = error
