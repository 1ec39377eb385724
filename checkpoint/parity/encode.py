"""One row's parity, made on its primary: read k shards, verify, encode, keep parity 0, push the others.

The job can be run again after a failure and goes on where all parity was kept. `steps` is the work, a few blocks at a
time, for whoever drives it: a thread (`service.py`) or a simulation. What it needs of the world is in `Hands`.
"""

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Protocol

from resilient.checkpoint.digest import digest
from resilient.checkpoint.parity.facts import Sealed
from resilient.checkpoint.parity.gather import Gather, Part, SourceFailed, Taken
from resilient.checkpoint.parity.layout import Layout, Stretch, image_range
from resilient.checkpoint.parity.memory import Blocks, zero
from resilient.ec.codec import Codec
from resilient.errors import DamagedImage, LevelFailed, ResilientError

_LEAST_STRETCHES = 8  # of a row, where it can be: nothing is pushed before the first is read, nor read after the last


class Submit(Protocol):
    """Runs a call on some thread, or at once."""

    def __call__(self, call: Callable[[], None], /) -> "Future[None]": ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Hands:
    """`keep(j, number, nbytes)` is where this node's own parity goes, from a row block on; `push(node, j, offset, data,
    digest)` sends a block to another keeper. `submit` does pushes meanwhile; `in_flight` bounds how many buffers are
    pushed at a time."""

    gather: Gather
    blocks: Blocks
    keep: Callable[[int, int, int], AbstractContextManager[memoryview]]
    push: Callable[[str, int, int, memoryview, str], None]
    submit: Submit
    in_flight: int = 2


class Stopped(Exception):
    """The job was told to stop. Never leaves this package."""


class RowJob:
    """The parity of one row. One thread at a time drives it; `stop` may be called from any."""

    def __init__(self, layout: Layout, row: int, images: Mapping[int, Sealed], hands: Hands) -> None:
        self.layout = layout
        self.row = row
        self._images = images
        self._hands = hands
        self._codec = codec_of(layout.stripe.k, layout.stripe.m)
        count = layout.blocks(row)
        self._digests: list[list[str]] = [[""] * count for _ in range(layout.stripe.m)]
        self._kept = [[False] * count for _ in range(layout.stripe.m)]
        self._pushing: list[Future[None]] = []
        self._damaged: set[tuple[int, int]] = set()
        self._stopped = False
        self.damaged_again = False

    def stop(self) -> None:
        """`steps` raises Stopped as soon as it can."""
        self._stopped = True

    def steps(self) -> Iterator[None]:
        """Encode what is not yet kept; yields after each stretch. Raises Stopped, LevelFailed, DamagedImage.

        Once it has ended, all parity of the row is kept: see `digests`.
        """
        stretches = list(self._stretches())
        positions = [self._parts(stretch) for stretch in stretches]
        try:
            with closing(self._hands.gather(positions, self._verify)) as gathered:
                for stretch, taken in zip(stretches, gathered, strict=True):
                    self._encode(stretch, taken)
                    yield
            self._settle(0)
        except SourceFailed as error:
            raise _as_failure(error, self.layout, self.row) from error
        finally:
            self._pushing.clear()  # they may end as they like: what they push then counts as kept

    def digests(self) -> tuple[str, ...]:
        """The digests of all blocks of each parity, end to end."""
        return tuple("".join(texts) for texts in self._digests)

    def _stretches(self) -> Iterator[Stretch]:
        """What is to be encoded; with it, now and then, some of what is kept already."""
        number, count = 0, self.layout.blocks(self.row)
        most = max(1, min(self._hands.blocks.at_once, count // _LEAST_STRETCHES))
        while number < count:
            if all(kept[number] for kept in self._kept):
                number += 1
            else:
                yield (stretch := self.layout.stretch(self.row, number, most))
                number += stretch.count

    def _parts(self, stretch: Stretch) -> list[Part]:
        stripe = self.layout.stripe
        return [
            Part(
                node=stripe.members[block.member].node,
                name=image_range(stripe.life, stripe.step, block.rank),
                offset=block.block * stripe.block_bytes,
                nbytes=block.nbytes,
                digests=tuple(self._images[block.rank].digest_of(block.block + n) for n in range(stretch.count)),
                shard=block.shard,
            )
            for block in stretch.blocks
        ]

    def _verify(self, part: Part, view: memoryview) -> None:
        """Called on reading threads. A block that differs twice is damaged where it lies, not on its way."""
        if self._stopped:
            raise LevelFailed("the encoding was given up")
        for number, (block, expected) in enumerate(zip(self._cut(view), part.digests, strict=True)):
            if digest(block) != expected:
                where = part.shard, part.offset + number * self.layout.stripe.block_bytes
                self.damaged_again = where in self._damaged
                self._damaged.add(where)
                raise DamagedImage(f"{part.name} at offset {where[1]} on node {part.node} is damaged")

    def _encode(self, stretch: Stretch, taken: Taken) -> None:
        if self._stopped:
            raise Stopped
        width = stretch.width
        zeros = self._hands.blocks.zeros()[:width]
        data = [zeros] * self.layout.stripe.k
        for part, view in taken:
            data[part.shard] = padded(view, width)
        others = [self._hands.blocks.take() for _ in range(1, self.layout.stripe.m)]
        with self._hands.keep(0, stretch.number, width) as mine:
            self._codec.encode(data, [mine, *(buffer[:width] for buffer in others)])
            found = [digest(block) for block in self._cut(mine)]
        for number, text in enumerate(found, stretch.number):
            self._digests[0][number], self._kept[0][number] = text, True
        for j, buffer in enumerate(others, 1):
            self._settle(self._hands.in_flight * len(others) - 1)
            self._pushing.append(self._hands.submit(partial(self._push, j, stretch, buffer)))

    def _push(self, j: int, stretch: Stretch, buffer: memoryview) -> None:
        stripe = self.layout.stripe
        keeper = stripe.members[self.layout.keepers(self.row)[j]].node
        try:
            for number, block in enumerate(self._cut(buffer[: stretch.width]), stretch.number):
                if self._stopped:
                    return
                found = self._digests[j][number] = digest(block)
                self._hands.push(keeper, j, number * stripe.block_bytes, block, found)
                self._kept[j][number] = True
        finally:
            self._hands.blocks.give(buffer)

    def _cut(self, view: memoryview) -> list[memoryview]:
        """The blocks of a stretch."""
        size = self.layout.stripe.block_bytes
        return [view[begin : begin + size] for begin in range(0, view.nbytes, size)]

    def _settle(self, most: int) -> None:
        """Wait until at most so many pushes are on their way. Raises what one of them raised, and Stopped."""
        while len(self._pushing) > most:
            self._pushing.pop(0).result()
        if self._stopped:
            raise Stopped


def padded(view: memoryview, width: int) -> memoryview:
    """What is in a buffer, with zeros up to `width`: the buffer is at least as long."""
    if view.nbytes == width:
        return view
    whole = memoryview(view.obj)[:width]
    zero(whole[view.nbytes :])
    return whole


@lru_cache(maxsize=64)
def codec_of(k: int, m: int) -> Codec:
    return Codec(k, m)


def _as_failure(error: SourceFailed, layout: Layout, row: int) -> ResilientError:
    what = f"row {row} of step {layout.stripe.step} could not be encoded: "
    kind: type[ResilientError] = DamagedImage if isinstance(error.error, DamagedImage) else LevelFailed
    return kind(f"{what}{error.error}")
