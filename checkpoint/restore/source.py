"""Where one rank's image comes from: memory or a store. No byte is used before its block matched its digest (law 5).

`span` gives a few bytes, for the header and the objects. `stream` gives all blocks, several at a time and in no order,
each as soon as it is there: the copy into the state then costs no second pass over memory, and runs during the reads.
"""

import json
import mmap
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from resilient.checkpoint.copying import cpu_threads
from resilient.checkpoint.digest import BLOCK_BYTES, block_count, block_range, damaged_blocks
from resilient.checkpoint.record import Record
from resilient.errors import DamagedImage

_UNIT_BLOCKS = 4  # what a thread takes at a time, and one read: 16 MiB
_READERS = 8  # four reads keep a disk busy; the others digest and copy meanwhile

Use = Callable[[int, memoryview], None]
"""Called from several threads with the offset of a block in the image, and its bytes, which change after the call."""


class Source:
    """One rank's image. `level` is for messages. Subclasses say how bytes are got."""

    def __init__(self, record: Record, level: str, threads: int) -> None:
        self.record = record
        self.level = level
        self._threads = threads
        self._begins = 0  # where the data starts, as far as it is known: only to name what is damaged

    def span(self, begin: int, end: int) -> bytes:
        """Bytes [begin, end) of the image. Raises DamagedImage, and what the store raises."""
        first, last = begin // BLOCK_BYTES, -(-end // BLOCK_BYTES)
        start = first * BLOCK_BYTES
        part = self._part(start, min(last * BLOCK_BYTES, self.record.image_bytes))
        bad = self._damaged(start, part)
        if not self._begins and start == 0:
            self._begins = 8 + int.from_bytes(part[:8], "little")
        if bad:
            raise DamagedImage(self._message(bad))
        return bytes(part[begin - start : end - start])

    def stream(self, use: Use) -> None:
        """Give every block of the image to `use`. Raises DamagedImage after all are read; others were used by then."""
        bad: list[int] = []

        def work(unit: int) -> None:
            begin = unit * _UNIT_BLOCKS * BLOCK_BYTES
            part = self._part(begin, min(begin + _UNIT_BLOCKS * BLOCK_BYTES, self.record.image_bytes))
            for start in range(0, len(part), BLOCK_BYTES):
                block = part[start : start + BLOCK_BYTES]
                found = self._damaged(begin + start, block)
                bad.extend(found)
                if not found:
                    use(begin + start, block)

        with ThreadPoolExecutor(self._threads) as pool:
            for _ in pool.map(work, range(-(-block_count(self.record.image_bytes) // _UNIT_BLOCKS))):
                pass
        if bad:
            raise DamagedImage(self._message(sorted(bad)))

    def _part(self, begin: int, end: int) -> memoryview:
        """Bytes [begin, end) as they are there, from a block's begin on. They stay until the thread's next call."""
        raise NotImplementedError

    def _damaged(self, begin: int, part: memoryview) -> list[int]:
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

    def _part(self, begin: int, end: int) -> memoryview:
        return self.view[begin:end]

    def _damaged(self, begin: int, part: memoryview) -> list[int]:
        return [] if self._verified else super()._damaged(begin, part)


class InStore(Source):
    """An image on a store. `read(offset, part)` fills a part with raw bytes, from any thread."""

    def __init__(self, record: Record, level: str, read: Callable[[int, memoryview], None]) -> None:
        super().__init__(record, level, _READERS)
        self._read = read
        self._buffers = threading.local()

    def hold(self, room: memoryview) -> InMemory:
        """The whole image read into `room`, and verified. Raises DamagedImage, and what the store raises."""

        def keep(begin: int, block: memoryview) -> None:
            room[begin : begin + len(block)] = block

        self.stream(keep)
        return InMemory(self.record, self.level, room, verified=True)

    def _part(self, begin: int, end: int) -> memoryview:
        # A buffer for each thread, used again and again: new memory would cost more to touch than to fill.
        buffer: memoryview | None = getattr(self._buffers, "view", None)
        if buffer is None or len(buffer) < end - begin:
            buffer = self._buffers.view = private_memory(max(end - begin, _UNIT_BLOCKS * BLOCK_BYTES))
        part = buffer[: end - begin]
        self._read(begin, part)
        return part


def private_memory(size: int) -> memoryview:
    """A page-aligned buffer of this process, in huge pages where they are to be had."""
    memory = mmap.mmap(-1, max(1, size), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(memory)


def _meets(begin: int, nbytes: int, spans: list[tuple[int, int]]) -> bool:
    return any(begin < stop and begin + nbytes > start for start, stop in spans)
