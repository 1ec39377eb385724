"""Some of an image: only the blocks that are needed are read, verified (law 5) and given on."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from resilient.checkpoint.agent.memory import private_memory
from resilient.checkpoint.copying import cpu_threads
from resilient.checkpoint.digest import BLOCK_BYTES, block_range, damaged_blocks, fine_damage
from resilient.checkpoint.record import Record
from resilient.errors import DamagedImage

_READERS = 4

Read = Callable[[int, memoryview], None]
"""Fills a part with the image's raw bytes from an offset on. Called from several threads."""
Use = Callable[[int, memoryview], None]
"""Called from several threads with an offset in the image and the bytes there, which change after the call."""


def read_units(
    record: Record,
    level: str,
    read: Read,
    wanted: Sequence[tuple[int, int]],
    fine: bytes | None,
    use: Use,
    *,
    verified: bool = False,
) -> int:
    """Read ranges of an image, each within one block, verify them and give them to `use`; returns the bytes read.

    `fine`: the digests of the image's blocks of 64 KiB, on whose borders the ranges lie then; None: they are whole
    blocks of 4 MiB. `verified`: they have been compared where they lie. Raises DamagedImage as soon as something
    differs, and what `read` raises.
    """
    buffers = threading.local()

    def work(unit: tuple[int, int]) -> int:
        begin, end = unit
        buffer = getattr(buffers, "buffer", None)
        if buffer is None:
            buffer = buffers.buffer = private_memory(BLOCK_BYTES)
        part = buffer[: end - begin]
        read(begin, part)
        if not verified:
            _check(record, level, begin, part, fine)
        use(begin, part)
        return end - begin

    with ThreadPoolExecutor(max(_READERS, cpu_threads()), thread_name_prefix="resilient-partial") as pool:
        return sum(pool.map(work, wanted))


def read_whole(record: Record, level: str, read: Read, into: memoryview) -> None:
    """Fill `into` with an image, all of it verified. Raises as `read_units` does."""

    def work(number: int) -> None:
        begin, end = block_range(number, record.image_bytes)
        read(begin, into[begin:end])
        _check(record, level, begin, into[begin:end], None)

    with ThreadPoolExecutor(max(_READERS, cpu_threads()), thread_name_prefix="resilient-partial") as pool:
        for _ in pool.map(work, range(len(record.blocks))):
            pass


def _check(record: Record, level: str, begin: int, part: memoryview, fine: bytes | None) -> None:
    whole = begin % BLOCK_BYTES == 0 and begin + part.nbytes in (begin + BLOCK_BYTES, record.image_bytes)
    coarse = fine is None or whole  # one long digest lets other threads run meanwhile
    bad = damaged_blocks(part, record.blocks, begin) if coarse else fine_damage(part, fine or b"", begin)
    if bad:
        raise DamagedImage(
            f"{record.image_name} at level {level} is damaged at bytes {begin} to {begin + part.nbytes} "
            f"(step {record.step}, rank {record.rank}): use another level or snapshot"
        )
