"""Reads images, or parity, of a snapshot by blocks: from who holds them, else decoded from k shards of their row.

Every block is compared with the digest in its image's record before it counts. A node that fails, or whose bytes are
not what they should be, is replaced by others as long as enough are left. Reads of all nodes run side by side. Several
blocks are read as one, and one by one where something is wrong with them.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace

from resilient.checkpoint.digest import digest
from resilient.checkpoint.parity.encode import codec_of, padded
from resilient.checkpoint.parity.facts import Done, Sealed
from resilient.checkpoint.parity.gather import Gather, Part, SourceFailed, Taken
from resilient.checkpoint.parity.layout import Layout, Place, image_range, parity_range
from resilient.checkpoint.parity.memory import Blocks
from resilient.checkpoint.parity.recover import Sources
from resilient.errors import DamagedImage, LevelFailed, ResilientError

STRIKES = 2  # failures after which a node is asked no more
_PLANNED = 256  # targets that are planned together
_DIRECT = -1  # the shard number of a part that is the block itself


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Target:
    """Blocks that are wanted, a stretch: of the image of a rank, or of parity (`place.shard` of the row)."""

    name: str
    offset: int
    into: memoryview
    digests: tuple[str, ...]
    rank: int | None
    place: Place


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
        while first < last:
            place, count = Place(-1, -1, -1), min(self._blocks.at_once, last - first)
            if self._layout is not None:
                place = self._layout.where(rank, first)
                count = self._layout.stretch(place.row, place.number, count).count
            offset, stop = first * self._block_bytes, min((first + count) * self._block_bytes, image.nbytes)
            targets.append(
                _Target(
                    name=image_range(*self._key, rank),
                    offset=offset,
                    into=into[offset - start : stop - start],
                    digests=tuple(image.digest_of(block) for block in range(first, first + count)),
                    rank=rank,
                    place=place,
                )
            )
            first += count
        self._fetch(targets)

    def parity(self, row: int, j: int, number: int, into: memoryview) -> None:
        """One block of parity, computed from other shards. Raises as `read` does."""
        assert self._layout is not None
        target = _Target(
            name=parity_range(*self._key, row, j),
            offset=number * self._block_bytes,
            into=into,
            digests=(self._done[row].digest_of(j, number),),
            rank=None,
            place=Place(row, self._layout.stripe.k + j, number),
        )
        self._fetch([target])

    def distrust(self, node: str, name: str, offset: int) -> None:
        """A node's copy of a block is known to be damaged."""
        self._bad.add((node, name, offset))

    # --- inside

    def _fetch(self, targets: Sequence[_Target]) -> None:
        left = list(targets)
        while left:
            now, left = left[:_PLANNED], left[_PLANNED:]
            plans = [self._plan(target) for target in now]
            count = 0
            again: list[_Target] = []
            try:
                with closing(self._gather(plans, self._check)) as gathered:
                    for target, taken in zip(now, gathered, strict=False):
                        count += 1
                        if not self._finish(target, taken):
                            again += self._apart(target)
            except SourceFailed as error:
                if isinstance(error.error, DamagedImage) and len(now[count].digests) > 1:
                    again += self._apart(now[count])  # which block it is will be seen then
                    count += 1
                else:
                    self._blame(error, plans[count])
            left = again + now[count:] + left

    def _apart(self, target: _Target) -> Iterator[_Target]:
        """The same, block by block."""
        for number, expected in enumerate(target.digests):
            begin = number * self._block_bytes
            yield replace(
                target,
                offset=target.offset + begin,
                into=target.into[begin : begin + self._block_bytes],
                digests=(expected,),
                place=target.place._replace(number=target.place.number + number),
            )

    def _plan(self, target: _Target) -> list[Part]:
        """The parts that give a target: itself, or k of the other shards. Raises LevelFailed or DamagedImage."""
        count = len(target.digests)
        if target.rank is not None:
            for node in self._usable(self._sources.images.get(target.rank, ()), target.name, target.offset, count):
                return [
                    Part(
                        node=node,
                        name=target.name,
                        offset=target.offset,
                        nbytes=target.into.nbytes,
                        digests=target.digests,
                        shard=_DIRECT,
                        into=target.into,
                    )
                ]
        parts = self._others(target) if self._layout is not None else None
        if parts is not None:
            return parts
        kind = DamagedImage if isinstance(self._last, DamagedImage) else LevelFailed
        raise kind(
            f"{target.name} at offset {target.offset} can be had from nobody any more"
            + (f": {self._last}" if self._last else "; too many nodes are lost")
        )

    def _others(self, target: _Target) -> list[Part] | None:
        """k other shards of the target's row blocks; those that are all zeros are not read."""
        assert self._layout is not None
        stripe, count, (row, wanted, number) = self._layout.stripe, len(target.digests), target.place
        found: list[tuple[int, Part]] = []
        stretch = self._layout.stretch(row, number, count)
        assert stretch.count == count
        there = {block.shard for block in stretch.blocks}
        needed = stripe.k - sum(shard not in there for shard in range(stripe.k) if shard != wanted)

        def add(nodes: Iterable[str], name: str, offset: int, nbytes: int, digests: Iterable[str], shard: int) -> None:
            for node in self._usable(nodes, name, offset, count)[:1]:
                part = Part(node=node, name=name, offset=offset, nbytes=nbytes, digests=tuple(digests), shard=shard)
                found.append((self._strikes[node], part))

        for shard, _, rank, block, nbytes in stretch.blocks:
            if shard != wanted:
                expected = [self._images[rank].digest_of(each) for each in range(block, block + count)]
                nodes = self._sources.images.get(rank, ())
                add(nodes, image_range(*self._key, rank), block * self._block_bytes, nbytes, expected, shard)
        for j in range(stripe.m):
            if stripe.k + j != wanted and row in self._done:
                expected = [self._done[row].digest_of(j, each) for each in range(number, number + count)]
                nodes, name = self._sources.parity.get((row, j), ()), parity_range(*self._key, row, j)
                add(nodes, name, number * self._block_bytes, stretch.width, expected, stripe.k + j)
        found.sort(key=lambda each: each[0])  # stable: data, then parity 0, then the others
        return [part for _, part in found[:needed]] if len(found) >= needed else None

    def _usable(self, nodes: Iterable[str], name: str, offset: int, count: int) -> list[str]:
        """Those that may be asked for so many blocks, the most dependable first."""
        offsets = [offset + number * self._block_bytes for number in range(count)]
        fit = [
            node
            for node in nodes
            if self._strikes[node] < STRIKES and not any((node, name, each) in self._bad for each in offsets)
        ]
        return sorted(fit, key=self._strikes.__getitem__)

    def _check(self, part: Part, view: memoryview) -> None:
        """On the reading threads. What is decoded from is not compared: what comes out of it is."""
        if part.shard == _DIRECT and not self._is_right(view, part.digests):
            raise DamagedImage(f"{part.name} at offset {part.offset} on node {part.node} is damaged")

    def _is_right(self, view: memoryview, digests: Sequence[str]) -> bool:
        size = self._block_bytes
        return all(digest(view[at * size : (at + 1) * size]) == expected for at, expected in enumerate(digests))

    def _finish(self, target: _Target, taken: Taken) -> bool:
        """Make the blocks of what was read. False: they have to be read again, from others or one by one."""
        if taken and taken[0][0].shard == _DIRECT:
            return True
        assert self._layout is not None
        stripe, nbytes, wanted = self._layout.stripe, target.into.nbytes, target.place.shard
        zeros = self._blocks.zeros()[:nbytes]
        ended = set(range(stripe.k)) - {
            each.shard for each in self._layout.shards(target.place.row, target.place.number)
        }
        present = {shard: zeros for shard in ended if shard != wanted}
        for part, view in taken:
            present[part.shard] = padded(view, max(nbytes, view.nbytes))[:nbytes]
        codec_of(stripe.k, stripe.m).decode(present, {wanted: target.into})
        if self._is_right(target.into, target.digests):
            return True
        if len(target.digests) > 1:
            return False
        liars = [part for part, view in taken if not self._is_right(view[: part.nbytes], part.digests)]
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
