"""Some of an image: only the blocks that are needed are read, verified (law 5) and given on.

`Reading` does it for several images at once, with a few threads. It may begin before it is known where the bytes go: a
disk that waits until all is planned is idle for a third of the time that it needs.
"""

import mmap
import queue
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from resilient.checkpoint.agent.memory import private_memory
from resilient.checkpoint.copying import cpu_threads
from resilient.checkpoint.digest import BLOCK_BYTES, FINE_BYTES, block_range, damaged_blocks, fine_count, fine_damage
from resilient.checkpoint.record import Record
from resilient.errors import DamagedImage

_READERS = 4
# Held at most while nobody knows where they go; more huge pages than this cost more than they bring.
AHEAD_BYTES = 32 << 20

Read = Callable[[int, memoryview], None]
"""Fills a part with the image's raw bytes from an offset on. Called from several threads."""
Use = Callable[[int, memoryview], None]
"""Called from several threads with an offset in the image and the bytes there, which change after the call."""
Unit = tuple[int, int]
"""A range of an image within one block of 4 MiB."""


@dataclass(frozen=True, slots=True)
class Opened:
    """An image that this rank can read itself.

    `fine`: the digests of its blocks of 64 KiB, on whose borders its units lie; None: they are whole blocks of 4 MiB.
    `verified`: its blocks have been compared where they lie.
    """

    record: Record
    level: str
    read: Read
    fine: bytes | None = None
    verified: bool = False


class _Wanted(NamedTuple):
    image: int
    opened: Opened
    begin: int
    end: int


class Reading:
    """Units of images, read and verified by a few threads, each then given to the use of its image.

    One thread calls: `want`, as often as there is something, `finish` once, then `close` in every case. Units are read
    from the first `want` on; without `uses` `AHEAD_BYTES` of them at most are held until `finish` says them.
    `read_bytes`: what was read, after `finish`.
    """

    def __init__(self, uses: Mapping[int, Use] | None = None) -> None:
        self.read_bytes = 0
        self._threads = max(_READERS, cpu_threads())
        self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="resilient-partial")
        self._started = 0
        self._wanted: queue.SimpleQueue[_Wanted | None] = queue.SimpleQueue()
        self._uses = uses
        self._changed = threading.Condition()
        self._room: memoryview | None = None
        self._used = 0  # bytes of the room
        self._held: list[tuple[_Wanted, memoryview]] = []
        self._failed: dict[int, Exception] = {}
        self._closed = threading.Event()

    def want(self, image: int, opened: Opened, units: Iterable[Unit]) -> None:
        """Read these, after all that was wanted before."""
        for begin, end in units:
            self._wanted.put(_Wanted(image, opened, begin, end))
            if self._started < self._threads:
                self._started += 1
                self._pool.submit(self._work)

    def finish(self, uses: Mapping[int, Use]) -> dict[int, Exception]:
        """Give all that is wanted to these, by image, and wait for it. Of images that failed, why: they are left then.

        What `read` and the uses raise is taken for a failure of the image.
        """
        for _ in range(self._started):
            self._wanted.put(None)
        with self._changed:
            self._uses, held, self._held = uses, self._held, []
            self._changed.notify_all()
        for one, part in held:
            self._give(one, part, uses)
        self._pool.shutdown()
        return self._failed

    def close(self) -> None:
        """Forget what has not been given to anyone. Safe to repeat."""
        with self._changed:
            self._closed.set()
            self._changed.notify_all()
        for _ in range(self._started):
            self._wanted.put(None)
        self._pool.shutdown()
        self._held, self._room = [], None

    def _work(self) -> None:
        buffer: memoryview | None = None
        while (one := self._wanted.get()) is not None and not self._closed.is_set():
            if one.image in self._failed:
                continue
            try:
                part = self._place(one.end - one.begin)
                if self._closed.is_set():
                    return
                if part is None:
                    buffer = private_memory(BLOCK_BYTES) if buffer is None else buffer
                    part = buffer[: one.end - one.begin]
                one.opened.read(one.begin, part)
                if not one.opened.verified:
                    _check(one.opened, one.begin, part)
            except Exception as error:  # whatever it is, the one who waits is to hear of it
                self._failed.setdefault(one.image, error)
                continue
            with self._changed:
                self.read_bytes += part.nbytes
                uses = self._uses
                if uses is None:
                    self._held.append((one, part))
            if uses is not None:
                self._give(one, part, uses)

    def _place(self, nbytes: int) -> memoryview | None:
        """Where to hold a unit while nobody knows where it goes; None once that is known. Waits where all is full."""
        with self._changed:
            while self._uses is None and not self._closed.is_set() and self._used + nbytes > AHEAD_BYTES:
                self._changed.wait()
            if self._uses is not None or self._closed.is_set():
                return None
            if self._room is None:
                self._room = private_memory(AHEAD_BYTES)
            begin = self._used
            self._used += -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
            return self._room[begin : begin + nbytes]

    def _give(self, one: _Wanted, part: memoryview, uses: Mapping[int, Use]) -> None:
        try:
            if one.image in uses and one.image not in self._failed:
                uses[one.image](one.begin, part)
        except Exception as error:
            self._failed.setdefault(one.image, error)


def read_units(opened: Opened, units: Iterable[Unit], use: Use) -> int:
    """Read ranges of one image, verify them and give them to `use`; returns the bytes read.

    Raises DamagedImage as soon as something differs, and what reading raises.
    """
    uses = {0: use}
    reading = Reading(uses)
    try:
        reading.want(0, opened, units)
        for error in reading.finish(uses).values():
            raise error
    finally:
        reading.close()
    return reading.read_bytes


def read_whole(record: Record, level: str, read: Read, into: memoryview) -> None:
    """Fill `into` with an image, all of it verified. Raises as `read_units` does."""
    opened = Opened(record, level, read)

    def work(number: int) -> None:
        begin, end = block_range(number, record.image_bytes)
        read(begin, into[begin:end])
        _check(opened, begin, into[begin:end])

    with ThreadPoolExecutor(max(_READERS, cpu_threads()), thread_name_prefix="resilient-partial") as pool:
        for _ in pool.map(work, range(len(record.blocks))):
            pass


class Held:
    """Blocks of an image at their places in an otherwise empty one."""

    def __init__(self, image_bytes: int) -> None:
        self.view = private_memory(image_bytes)  # of the system only what is written

    def take(self, begin: int, portion: memoryview) -> None:
        self.view[begin : begin + portion.nbytes] = portion


def nothing(_begin: int, _portion: memoryview) -> None:
    """The use of blocks that are only to be verified."""


def blocks_of(spans: Iterable[Unit], image_bytes: int) -> NDArray[np.bool_]:
    """Which blocks of 64 KiB of an image spans of it lie in."""
    needed = np.zeros(fine_count(image_bytes), dtype=np.bool_)
    for begin, end in spans:
        needed[begin // FINE_BYTES : -(-end // FINE_BYTES)] = True
    return needed


def _check(opened: Opened, begin: int, part: memoryview) -> None:
    record, fine = opened.record, opened.fine
    whole = begin % BLOCK_BYTES == 0 and begin + part.nbytes in (begin + BLOCK_BYTES, record.image_bytes)
    coarse = fine is None or whole  # one long digest lets other threads run meanwhile
    bad = damaged_blocks(part, record.blocks, begin) if coarse else fine_damage(part, fine or b"", begin)
    if bad:
        raise DamagedImage(
            f"{record.image_name} at level {opened.level} is damaged at bytes {begin} to {begin + part.nbytes} "
            f"(step {record.step}, rank {record.rank}): use another level or snapshot"
        )
