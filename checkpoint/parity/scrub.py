"""Looks for bytes that have changed in memory, at a bounded rate, and puts them right from the rest of the group.

Every block of the images and of the whole parity of this node is compared with its digest. Blocks are lent one by one,
so that no image is kept from being freed for longer than it takes to read one. What cannot be put right is reported,
once; a restore would find it anyway (law 5).
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from resilient.checkpoint.agent.memory import private_memory
from resilient.checkpoint.digest import digest
from resilient.checkpoint.parity.facts import Done
from resilient.checkpoint.parity.layout import Key, Layout, image_range, parity_range
from resilient.checkpoint.parity.memory import copy
from resilient.checkpoint.parity.reader import Reader
from resilient.checkpoint.parity.store import ParityStore
from resilient.checkpoint.peers.pacing import Pace
from resilient.checkpoint.record import Record
from resilient.errors import LevelFailed, ResilientError, RestoreError

log = logging.getLogger(__name__)
_REPORTED = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """A damaged block of what peers call `name`; `error` says why it could not be put right, if so."""

    node: str
    name: str
    offset: int
    error: str | None

    def __str__(self) -> str:
        what = f"{self.name} at offset {self.offset} was damaged in the memory of node {self.node}"
        return f"{what} and has been put right" if self.error is None else f"{what}; it stays so: {self.error}"


class Images(Protocol):
    """The images of this node. Any thread; LevelFailed for what is not there (any more)."""

    def inventory(self) -> list[Record]: ...
    def lend_image(self, life: str, step: int, rank: int) -> AbstractContextManager[memoryview]: ...
    def mend_image(self, life: str, step: int, rank: int, offset: int, block: memoryview) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Whole:
    """A snapshot whose parity is whole: where its blocks lie, and their digests by row."""

    layout: Layout
    done: Mapping[int, Done]


class Scrub:
    """One node's. `passes` is driven by one thread; `pace` bounds it.

    `whole(key)` is None for a snapshot without whole parity, `reader(key)` reads from all nodes what is left of one and
    raises LevelFailed where nothing is. `report` is called with what was found.
    """

    def __init__(
        self,
        node: str,
        images: Images,
        store: ParityStore,
        whole: Callable[[Key], Whole | None],
        reader: Callable[[Key], Reader],
        pace: Pace,
        block_bytes: int,
        report: Callable[[Finding], None],
    ) -> None:
        self._node = node
        self._images = images
        self._store = store
        self._whole = whole
        self._reader = reader
        self._pace = pace
        self._block_bytes = block_bytes
        self._report = report
        self._known: dict[tuple[str, int], None] = {}  # what stays damaged is reported once
        self.seen_bytes = 0

    def walk(self) -> Iterator[None]:
        """One look at everything that is there when its turn comes; yields after each block."""
        for record in self._images.inventory():
            yield from self._walk_image(record)
        for life, step, row, j in self._store.sealed():
            yield from self._walk_shard((life, step), row, j)

    def _walk_image(self, record: Record) -> Iterator[None]:
        name = image_range(record.life, record.step, record.rank)
        for block, expected in enumerate(record.blocks):
            offset = block * self._block_bytes
            stop = min(offset + self._block_bytes, record.image_bytes)
            try:
                with self._images.lend_image(record.life, record.step, record.rank) as image:
                    good = digest(image[offset:stop]) == expected
                if not good:
                    self._mend(name, offset, partial(self._mend_image, record, block))
            except LevelFailed:
                return  # it is not needed any more
            self._rest(stop - offset)
            yield

    def _walk_shard(self, key: Key, row: int, j: int) -> Iterator[None]:
        whole = self._whole(key)
        for number in range(whole.layout.blocks(row) if whole is not None else 0):
            assert whole is not None
            offset, nbytes = number * self._block_bytes, whole.layout.nbytes(row, number)
            expected = whole.done[row].digest_of(j, number)
            try:
                with self._store.lend(key, row, j, offset, nbytes) as block:
                    good = digest(block) == expected
                if not good:
                    self._mend(
                        parity_range(*key, row, j), offset, partial(self._mend_shard, key, row, j, offset, nbytes)
                    )
            except LevelFailed:
                return
            self._rest(nbytes)
            yield

    def _rest(self, nbytes: int) -> None:
        self.seen_bytes += nbytes
        self._pace.wait(nbytes)

    def _mend(self, name: str, offset: int, mend: Callable[[], None]) -> None:
        """Put a block right, and report. Raises LevelFailed where it is gone meanwhile."""
        error: str | None = None
        try:
            mend()
        except (LevelFailed, RestoreError) as failure:
            error = str(failure)
        if error is None:
            self._known.pop((name, offset), None)
        elif (name, offset) in self._known:
            return
        else:
            self._known[name, offset] = None
            while len(self._known) > _REPORTED:
                del self._known[next(iter(self._known))]
        self._report(Finding(node=self._node, name=name, offset=offset, error=error))

    def _mend_image(self, record: Record, block: int) -> None:
        """Raises LevelFailed or DamagedImage."""
        offset = block * self._block_bytes
        into = private_memory(min(self._block_bytes, record.image_bytes - offset))
        reader = self._reader((record.life, record.step))
        reader.distrust(self._node, image_range(record.life, record.step, record.rank), offset)
        reader.read(record.rank, block, block + 1, into)
        self._images.mend_image(record.life, record.step, record.rank, offset, into)

    def _mend_shard(self, key: Key, row: int, j: int, offset: int, nbytes: int) -> None:
        """Raises LevelFailed or DamagedImage."""
        into = private_memory(nbytes)
        reader = self._reader(key)
        reader.distrust(self._node, parity_range(*key, row, j), offset)
        reader.parity(row, j, offset // self._block_bytes, into)
        with self._store.mend(key, row, j, offset // self._block_bytes) as block:
            copy(block, into)


def run(walks: Callable[[], Iterable[None]], stopped: Callable[[float], bool], idle_s: float) -> None:
    """Walk again and again until `stopped(seconds to wait)`."""
    while not stopped(0.0):
        count = 0
        try:
            for _ in walks():
                count += 1
                if stopped(0.0):
                    return
        except ResilientError as error:
            log.warning("the scrub goes on after: %s", error)
        if stopped(0.0 if count else idle_s):
            return
