"""Where one rank's image comes from: memory or a store. No byte is used before its block matched its digest (law 5).

`span` gives a few bytes, for the header and the objects. `stream` gives all blocks, several at a time and in no order,
each as soon as it is there: the copy into the state then costs no second pass over memory, and runs during the reads.
"""

import json
import mmap
import queue
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress

from resilient.checkpoint.copying import cpu_threads
from resilient.checkpoint.digest import BLOCK_BYTES, block_range, damaged_blocks
from resilient.checkpoint.record import Record
from resilient.errors import DamagedImage

_UNIT_BYTES = 2 * BLOCK_BYTES  # what a thread takes at a time, and one read
_READERS = 6  # four keep a disk busy while the others digest and copy; more, or larger buffers, cost more to touch

Use = Callable[[int, memoryview], None]
"""Called from several threads with the offset of a block in the image, and its bytes, which change after the call."""


class Source(ABC):
    """One rank's image. `level` is for messages. Subclasses say how bytes are got."""

    def __init__(self, record: Record, level: str, threads: int) -> None:
        self.record = record
        self.level = level
        self._threads = threads
        self._begins = 0  # where the data starts, as far as it is known: only to name what is damaged

    def span(self, begin: int, end: int) -> memoryview:
        """Bytes [begin, end) of the image, until the next call. Raises DamagedImage, and what a store raises."""
        first, last = begin // BLOCK_BYTES, -(-end // BLOCK_BYTES)
        start = first * BLOCK_BYTES
        part = self._span(start, min(last * BLOCK_BYTES, self.record.image_bytes))
        bad = self._damaged(start, part)
        if not self._begins and start == 0:
            self._begins = 8 + int.from_bytes(part[:8], "little")
        if bad:
            raise DamagedImage(self._message(bad))
        return part[begin - start : end - start]

    def stream(self, use: Use) -> None:
        """Give every block of the image to `use`. Raises DamagedImage after all are read; others were used by then."""
        bad: list[int] = []

        def work(unit: int) -> None:
            begin, end = self._bounds(unit)
            with self._unit(unit) as part:
                for start in range(0, end - begin, BLOCK_BYTES):
                    block = part[start : min(start + BLOCK_BYTES, end - begin)]
                    found = self._damaged(begin + start, block)
                    bad.extend(found)
                    if not found:
                        use(begin + start, block)

        with ThreadPoolExecutor(self._threads) as pool:
            for _ in pool.map(work, range(-(-self.record.image_bytes // _UNIT_BYTES))):
                pass
        if bad:
            raise DamagedImage(self._message(sorted(bad)))

    def _bounds(self, unit: int) -> tuple[int, int]:
        return unit * _UNIT_BYTES, min((unit + 1) * _UNIT_BYTES, self.record.image_bytes)

    @abstractmethod
    def _span(self, begin: int, end: int) -> memoryview:
        """Bytes [begin, end) as they are there."""

    @abstractmethod
    def _unit(self, unit: int) -> AbstractContextManager[memoryview]:
        """The bytes of one unit as they are there, and as long as the context lasts."""

    def _damaged(self, begin: int, part: memoryview) -> list[int]:
        """The damaged blocks in a part of the image that begins at a block's begin."""
        return damaged_blocks(part, self.record.blocks, begin)

    def _message(self, blocks: list[int]) -> str:
        """What is damaged, by tensor: the record, which has a digest of its own, says where each lies."""
        record = self.record
        spans = [block_range(index, record.image_bytes) for index in blocks]
        names = [
            raw["key"]
            for raw in json.loads(record.pieces_text)
            if "nbytes" in raw and _meets(self._begins + raw["offset"], raw["nbytes"], spans)
        ]
        what = ", ".join(repr(name) for name in names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        return (
            f"{len(blocks)} of {len(record.blocks)} blocks of {record.image_name} at level {self.level} are damaged "
            f"(step {record.step}, rank {record.rank}; tensors: {what or 'none, but the header or the objects'})"
        )


class InMemory(Source):
    """An image that lies in memory as a whole. `verified`: every block has been compared already."""

    def __init__(self, record: Record, level: str, view: memoryview, *, verified: bool = False) -> None:
        super().__init__(record, level, cpu_threads())
        self.view = view[: record.image_bytes]
        self._verified = verified

    def verify(self) -> None:
        """Compare every block, so that nothing need be used before all are known to be well. Raises DamagedImage."""
        if not self._verified:
            self.stream(lambda begin, block: None)
            self._verified = True

    def _span(self, begin: int, end: int) -> memoryview:
        return self.view[begin:end]

    def _unit(self, unit: int) -> AbstractContextManager[memoryview]:
        begin, end = self._bounds(unit)
        return nullcontext(self.view[begin:end])

    def _damaged(self, begin: int, part: memoryview) -> list[int]:
        return [] if self._verified else super()._damaged(begin, part)


class InStore(Source):
    """An image on a store. `read(offset, part)` fills a part with raw bytes, from any thread. Close it in the end."""

    def __init__(self, record: Record, level: str, read: Callable[[int, memoryview], None]) -> None:
        super().__init__(record, level, _READERS)
        self._read = read
        # As many buffers as readers, used again and again: new memory would cost more to touch than to fill.
        self._free: queue.SimpleQueue[memoryview | None] = queue.SimpleQueue()
        for _ in range(_READERS):
            self._free.put(None)
        self._pool: ThreadPoolExecutor | None = None
        self._begun: dict[int, Future[memoryview]] = {}

    def begin(self) -> None:
        """Read the first units into the buffers, and the last one, where the objects are; `stream` goes on from there.

        So the store is busy while it is not yet known where the bytes go.
        """
        self._pool = ThreadPoolExecutor(_READERS, thread_name_prefix="resilient-read")
        last = -(-self.record.image_bytes // _UNIT_BYTES) - 1
        first = dict.fromkeys([0, last, *range(1, min(_READERS - 1, last))])  # each once, the first two at once
        self._begun = {unit: self._pool.submit(self._fetch, unit) for unit in first if unit >= 0}

    def close(self) -> None:
        """End what `begin` has started. Safe to repeat."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None

    def hold(self, room: memoryview) -> InMemory:
        """The whole image read into `room`, and verified. Raises DamagedImage, and what the store raises."""

        def keep(begin: int, block: memoryview) -> None:
            room[begin : begin + len(block)] = block

        self.stream(keep)
        return InMemory(self.record, self.level, room, verified=True)

    def _fetch(self, unit: int) -> memoryview:
        """A buffer with the bytes of a unit."""
        begin, end = self._bounds(unit)
        buffer = self._free.get()
        try:
            if buffer is None:
                buffer = private_memory(_UNIT_BYTES)
            self._read(begin, buffer[: end - begin])
        except BaseException:  # whatever it is: others wait for this buffer, and would wait for ever
            self._free.put(buffer)
            raise
        return buffer

    def _span(self, begin: int, end: int) -> memoryview:
        unit = begin // _UNIT_BYTES
        if unit in self._begun and end <= self._bounds(unit)[1]:
            start = begin - self._bounds(unit)[0]
            return self._begun[unit].result()[start : start + end - begin]
        part = private_memory(end - begin)
        self._read(begin, part)
        return part

    @contextmanager
    def _unit(self, unit: int) -> Iterator[memoryview]:
        begun = self._begun.pop(unit, None)
        buffer = self._fetch(unit) if begun is None else begun.result()
        try:
            yield buffer
        finally:
            self._free.put(buffer)


def private_memory(size: int) -> memoryview:
    """A page-aligned buffer of this process, in huge pages where they are to be had."""
    memory = mmap.mmap(-1, max(1, size), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(memory)


def _meets(begin: int, nbytes: int, spans: list[tuple[int, int]]) -> bool:
    return any(begin < stop and begin + nbytes > start for start, stop in spans)
