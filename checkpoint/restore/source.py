"""Where one rank's image comes from: memory or a store. Every block is compared with its digest (law 5).

`span` gives a few bytes, for the header and the objects. `stream` gives all blocks, several at a time and in no order,
each as soon as it is there: the copy into the state then costs no second pass over memory, and runs during the reads.
Blocks are read into few small buffers, used again and again, which stay in the processor's cache.
"""

import queue
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from resilient.checkpoint.agent.memory import private_memory
from resilient.checkpoint.copying import cpu_threads
from resilient.checkpoint.digest import BLOCK_BYTES, block_count, block_range, damaged_blocks, digest_of
from resilient.checkpoint.image import data_start_of
from resilient.checkpoint.record import Record
from resilient.checkpoint.restore.scatter import Scatter
from resilient.errors import DamagedImage

_READERS = 4  # requests that keep a disk busy; more only make the first one, which all wait for, come later
_AHEAD = 8  # blocks that a store may be ahead of those that use them

Use = Callable[[int, memoryview], None]
"""Called from several threads with the offset of a block in the image, and its bytes, which change after the call."""
Read = Callable[[int, memoryview], None]
"""Fills a part with the image's raw bytes from an offset on. Called from several threads."""
ReadParts = Callable[[int, Sequence[Any]], None]
"""As Read, for several parts, one after the other."""


class Source(ABC):
    """One rank's image. `level` is for messages. Subclasses say how bytes are got."""

    def __init__(self, record: Record, level: str) -> None:
        self.record = record
        self.level = level
        self._begins = 0  # where the data starts, as far as it is known: only to name what is damaged

    def span(self, begin: int, end: int) -> memoryview:
        """Bytes [begin, end) of the image, until the next call. Raises DamagedImage, and what a store raises."""
        first, last = begin // BLOCK_BYTES, -(-end // BLOCK_BYTES)
        start = first * BLOCK_BYTES
        part = self._span(start, min(last * BLOCK_BYTES, self.record.image_bytes))
        bad = self._damaged(start, part)
        if not self._begins and start == 0:
            self._begins = data_start_of(part)
        if bad:
            raise DamagedImage(self._message(bad))
        return part[begin - start : end - start]

    def stream(self, use: Use) -> None:
        """Give every block of the image to `use`. Raises DamagedImage after all are read; others were used by then."""

        def work(number: int) -> bool:
            begin, _ = block_range(number, self.record.image_bytes)
            with self._block(number) as block:
                if self._damaged(begin, block):
                    return False
                use(begin, block)
            return True

        self._all_blocks(work)

    def load(self, scatter: Scatter) -> None:
        """Fill the ranges of a state. Raises DamagedImage after all are read; others are filled by then."""
        self.stream(scatter.take)

    def _all_blocks(self, work: Callable[[int], bool]) -> None:
        """Do something with each block, on several threads. `work` says whether it is well; raises DamagedImage."""
        order = self._order()
        with ThreadPoolExecutor(cpu_threads()) as pool:
            bad = [number for number, well in zip(order, pool.map(work, order), strict=True) if not well]
        if bad:
            raise DamagedImage(self._message(sorted(bad)))

    def _order(self) -> list[int]:
        """The numbers of all blocks, in the order in which they come."""
        return list(range(block_count(self.record.image_bytes)))

    @abstractmethod
    def _span(self, begin: int, end: int) -> memoryview:
        """Bytes [begin, end) as they are there."""

    @abstractmethod
    def _block(self, number: int) -> AbstractContextManager[memoryview]:
        """The bytes of one block as they are there, and as long as the context lasts."""

    def _damaged(self, begin: int, part: memoryview) -> list[int]:
        """The damaged blocks in a part of the image that begins at a block's begin."""
        return damaged_blocks(part, self.record.blocks, begin)

    def _message(self, blocks: list[int]) -> str:
        """What is damaged, by tensor: the record, which has a digest of its own, says where each lies."""
        record = self.record
        spans = [block_range(index, record.image_bytes) for index in blocks]
        what = listed(tensors_in(record, self._begins, spans))
        return (
            f"{len(blocks)} of {len(record.blocks)} blocks of {record.image_name} at level {self.level} are damaged "
            f"(step {record.step}, rank {record.rank}; tensors: {what or 'none, but the header or the objects'})"
        )


class InMemory(Source):
    """An image that lies in memory as a whole.

    `read(offset, parts)`: another way to the same bytes, which `stream` and `load` take: the pages of a new mapping
    cost more to fault in, each for the first time, than their bytes to copy. `verified`: every block has been compared
    already.
    """

    def __init__(
        self, record: Record, level: str, view: memoryview, *, read: ReadParts | None = None, verified: bool = False
    ) -> None:
        super().__init__(record, level)
        self.view = view[: record.image_bytes]
        self._read = read
        self._free: queue.SimpleQueue[memoryview] = queue.SimpleQueue()
        self._verified = verified

    def verify(self) -> None:
        """Compare every block, so that nothing need be used before all are known to be well. Raises DamagedImage."""
        if not self._verified:
            self.stream(lambda begin, block: None)
            self._verified = True

    def load(self, scatter: Scatter) -> None:
        """Reads straight into the state where it can: a damaged block is there too, then, when DamagedImage comes."""
        read = self._read
        if read is None:
            super().load(scatter)
            return

        def work(number: int) -> bool:
            begin, end = block_range(number, self.record.image_bytes)
            with self._buffer() as buffer:
                places = scatter.places(begin, end, buffer)
                read(begin, [buffer[: end - begin]] if places is None else places)
                if not self._verified and digest_of(places or [buffer[: end - begin]]) != self.record.blocks[number]:
                    return False
                if places is None:
                    scatter.take(begin, buffer[: end - begin])
            return True

        self._all_blocks(work)

    def _span(self, begin: int, end: int) -> memoryview:
        return self.view[begin:end]

    def _block(self, number: int) -> AbstractContextManager[memoryview]:
        begin, end = block_range(number, self.record.image_bytes)
        if self._read is None:
            return nullcontext(self.view[begin:end])
        return self._read_block(self._read, begin, end)

    @contextmanager
    def _read_block(self, read: ReadParts, begin: int, end: int) -> Iterator[memoryview]:
        with self._buffer() as buffer:
            read(begin, [buffer[: end - begin]])
            yield buffer[: end - begin]

    @contextmanager
    def _buffer(self) -> Iterator[memoryview]:
        try:
            buffer = self._free.get_nowait()
        except queue.Empty:  # each thread brings one
            buffer = private_memory(BLOCK_BYTES)
        try:
            yield buffer
        finally:
            self._free.put(buffer)

    def _damaged(self, begin: int, part: memoryview) -> list[int]:
        return [] if self._verified else super()._damaged(begin, part)


class InStore(Source):
    """An image on a store, which `read` reads. Close it in the end.

    A few threads read, block after block, into whatever buffer is free, and are ahead of those that use the blocks. A
    reader takes a buffer first and a number then, so that what is waited for is always read before what comes later.
    """

    def __init__(self, record: Record, level: str, read: Read) -> None:
        super().__init__(record, level)
        self._read = read
        self._pool: ThreadPoolExecutor | None = None
        self._free: queue.SimpleQueue[memoryview | None] = queue.SimpleQueue()
        self._blocks: dict[int, Future[memoryview]] = {}
        self._taking = threading.Lock()
        self._closed = False

    def begin(self) -> None:
        """Begin to read, so that the store is busy while it is not yet known where the bytes go."""
        self._blocks = {number: Future() for number in self._order()}
        self._closed = False
        self._free = queue.SimpleQueue()
        for _ in range(_READERS + _AHEAD + cpu_threads()):
            self._free.put(None)  # made when it is needed
        coming = iter(self._order())
        self._pool = ThreadPoolExecutor(_READERS, thread_name_prefix="resilient-read")
        for _ in range(_READERS):
            self._pool.submit(self._keep_reading, coming)

    def stream(self, use: Use) -> None:
        if self._pool is None:
            self.begin()
        try:
            super().stream(use)
        finally:
            self.close()

    def close(self) -> None:
        """End what `begin` has started. Safe to repeat."""
        pool, self._pool = self._pool, None
        if pool is not None:
            self._closed = True
            for _ in range(_READERS):
                self._free.put(None)
            pool.shutdown()
            self._blocks = {}

    def hold(self, room: memoryview) -> InMemory:
        """The whole image read into `room`, and verified. Raises DamagedImage, and what the store raises."""

        def keep(begin: int, block: memoryview) -> None:
            room[begin : begin + len(block)] = block

        self.stream(keep)
        return InMemory(self.record, self.level, room, verified=True)

    def _order(self) -> list[int]:
        """The last block comes with the first: the objects are there, and are wanted early."""
        numbers = super()._order()
        return numbers[:1] + numbers[-1:] + numbers[1:-1] if len(numbers) > 1 else numbers

    def _keep_reading(self, coming: Iterator[int]) -> None:
        while True:
            buffer = self._free.get()
            with self._taking:
                number = None if self._closed else next(coming, None)
            if number is None:
                return
            begin, end = block_range(number, self.record.image_bytes)
            try:
                if buffer is None:
                    buffer = private_memory(BLOCK_BYTES)
                self._read(begin, buffer[: end - begin])
            except BaseException as error:  # whoever waits for the block is to hear of it, whatever it is
                self._free.put(buffer)
                self._blocks[number].set_exception(error)
            else:
                self._blocks[number].set_result(buffer)

    def _span(self, begin: int, end: int) -> memoryview:
        number = begin // BLOCK_BYTES
        if number in self._order()[:2] and number in self._blocks and end <= (number + 1) * BLOCK_BYTES:
            return self._blocks[number].result()[: end - begin]
        part = private_memory(end - begin)
        self._read(begin, part)
        return part

    @contextmanager
    def _block(self, number: int) -> Iterator[memoryview]:
        buffer = self._blocks[number].result()
        begin, end = block_range(number, self.record.image_bytes)
        try:
            yield buffer[: end - begin]
        finally:
            self._free.put(buffer)


def tensors_in(record: Record, data_start: int, spans: Sequence[tuple[int, int]]) -> tuple[str, ...]:
    """The names of the tensors of which some bytes lie in these ranges [start, stop) of an image."""
    return tuple(
        raw["key"]
        for raw in record.pieces()
        if "nbytes" in raw and _meets(data_start + raw["offset"], raw["nbytes"], spans)
    )


def listed(names: Sequence[str]) -> str:
    """The first few of these names, for a message."""
    return ", ".join(repr(name) for name in names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _meets(begin: int, nbytes: int, spans: Sequence[tuple[int, int]]) -> bool:
    return any(begin < stop and begin + nbytes > start for start, stop in spans)
