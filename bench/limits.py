"""The physical limits that every result stands beside: one memory copy, one direct write, one direct read.

They are taken in the same round as what is compared with them. Each is the plainest loop that reaches the hardware;
nothing of the library or its peers is used.
"""

import mmap
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

import numpy as np
from torch import Tensor

PAGE_BYTES = 4096
REQUEST_BYTES = 16 << 20
DEPTHS = (2, 4)


def filled_buffer(size_bytes: int) -> mmap.mmap:
    """Page-aligned memory, every page touched, with bytes that no disk can compress away."""
    buffer = mmap.mmap(-1, -(-size_bytes // PAGE_BYTES) * PAGE_BYTES)
    view = np.frombuffer(buffer, dtype=np.uint8)
    pattern = np.random.default_rng(0).integers(0, 256, min(len(view), 32 << 20), dtype=np.uint8)
    for start in range(0, len(view), len(pattern)):
        part = view[start : start + len(pattern)]
        part[:] = pattern[: len(part)]
    return buffer


def timed(act: Callable[[], object]) -> float:
    started = time.perf_counter()
    act()
    return time.perf_counter() - started


def copy_flat(source: mmap.mmap, target: mmap.mmap) -> float:
    """Seconds of one copy of the whole buffer by one thread."""
    return timed(lambda: np.copyto(np.frombuffer(target, np.uint8), np.frombuffer(source, np.uint8)))


class TensorCopy:
    """Copies tensors one after the other into one buffer that is kept."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self._sources = [tensor.detach().contiguous().view(-1).numpy() for tensor in tensors]
        self._targets = [np.zeros_like(source) for source in self._sources]

    def __call__(self) -> None:
        for source, target in zip(self._sources, self._targets, strict=True):
            np.copyto(target, source)


def _requests(size_bytes: int) -> list[tuple[int, int]]:
    return [(start, min(start + REQUEST_BYTES, size_bytes)) for start in range(0, size_bytes, REQUEST_BYTES)]


def raw_write(path: Path, buffer: mmap.mmap, depth: int) -> float:
    """Seconds to write the buffer to a new file with O_DIRECT, `depth` requests at a time, and to fsync it."""
    started = time.perf_counter()
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_DIRECT, 0o600)
    try:
        os.posix_fallocate(file, 0, len(buffer))
        with memoryview(buffer) as view, ThreadPoolExecutor(depth) as pool:
            written = pool.map(lambda part: os.pwrite(file, view[part[0] : part[1]], part[0]), _requests(len(buffer)))
            assert sum(written) == len(buffer), "a short direct write: the disk is full"
        os.fsync(file)
    finally:
        os.close(file)
    return time.perf_counter() - started


def raw_read(path: Path, buffer: mmap.mmap, depth: int) -> float:
    """Seconds to fill the buffer from a file with O_DIRECT, `depth` requests at a time; the page cache has no part."""
    started = time.perf_counter()
    file = os.open(path, os.O_RDONLY | os.O_DIRECT)
    try:
        with memoryview(buffer) as view, ThreadPoolExecutor(depth) as pool:
            read = pool.map(lambda part: os.preadv(file, [view[part[0] : part[1]]], part[0]), _requests(len(buffer)))
            assert sum(read) == len(buffer), "a short direct read"
    finally:
        os.close(file)
    return time.perf_counter() - started


def best(measure: Callable[[int], float], times: int) -> float:
    """The median seconds at the queue depth that is fastest."""
    return min(median(measure(depth) for _ in range(times)) for depth in DEPTHS)


def measure(*, folder: str, size_bytes: int, times: int) -> dict[str, float]:
    """Seconds of every limit for `size_bytes`. Runs in a process of its own."""
    source, target = filled_buffer(size_bytes), filled_buffer(size_bytes)
    path = Path(folder) / "limit"
    copy_flat(source, target)
    limits = {
        "memcpy": median(copy_flat(source, target) for _ in range(times)),
        "raw write": best(lambda depth: raw_write(path, source, depth), times),
        "raw read": best(lambda depth: raw_read(path, target, depth), times),
    }
    path.unlink()
    return limits
