"""Private memory of the agent, for parity and for blocks on their way: in huge pages, and used again and again.

The first touch of a page costs more than the work that is done on it, so memory that is given back is kept for the next
taker. Copies release the interpreter lock.
"""

import ctypes
import threading
from collections import defaultdict

from resilient.checkpoint.agent.memory import private_memory
from resilient.checkpoint.levels.direct import address_of


def copy(target: memoryview, source: memoryview) -> None:
    """target[:] = source, without the interpreter lock."""
    if target.nbytes != source.nbytes:
        raise ValueError(f"{source.nbytes} bytes into {target.nbytes}")
    if target.nbytes:
        ctypes.memmove(address_of(target), address_of(source), target.nbytes)


def zero(target: memoryview) -> None:
    """Fill with zeros, without the interpreter lock."""
    if target.nbytes:
        ctypes.memset(address_of(target), 0, target.nbytes)


class Blocks:
    """Buffers for `at_once` blocks each. Any thread may take and give; `kept` idle ones stay."""

    def __init__(self, block_bytes: int, kept: int, at_once: int = 1) -> None:
        self.block_bytes = block_bytes
        self.at_once = at_once
        self.buffer_bytes = at_once * block_bytes
        self.kept = kept
        self._lock = threading.Lock()
        self._idle: list[memoryview] = []
        self._zeros: memoryview | None = None

    def take(self) -> memoryview:
        with self._lock:
            if self._idle:
                return self._idle.pop()
        return private_memory(self.buffer_bytes)

    def give(self, buffer: memoryview) -> None:
        """Nobody may look at the buffer any more."""
        with self._lock:
            if len(self._idle) < self.kept:
                self._idle.append(buffer)

    def zeros(self) -> memoryview:
        """A buffer of zeros, for reading."""
        with self._lock:
            if self._zeros is None:
                self._zeros = private_memory(self.buffer_bytes).toreadonly()
            return self._zeros

    @property
    def idle_bytes(self) -> int:
        with self._lock:
            return len(self._idle) * self.buffer_bytes


class Arenas:
    """Larger pieces of any size. What is idle is at most as much as what is in use; the largest goes first."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._idle: dict[int, list[memoryview]] = defaultdict(list)
        self._idle_bytes = 0
        self._used_bytes = 0

    @property
    def total_bytes(self) -> int:
        with self._lock:
            return self._idle_bytes + self._used_bytes

    @property
    def used_bytes(self) -> int:
        with self._lock:
            return self._used_bytes

    def take(self, nbytes: int) -> memoryview:
        """A piece of at least so many bytes, with whatever was in it."""
        with self._lock:
            fitting = [size for size, pieces in self._idle.items() if pieces and nbytes <= size <= nbytes * 5 // 4]
            if fitting:
                piece = self._idle[min(fitting)].pop()
                self._idle_bytes -= piece.nbytes
            else:
                piece = private_memory(nbytes)
            self._used_bytes += piece.nbytes
            return piece

    def give(self, piece: memoryview) -> None:
        with self._lock:
            self._used_bytes -= piece.nbytes
            self._idle_bytes += piece.nbytes
            self._idle[piece.nbytes].append(piece)
            self._trim(max(self._used_bytes, piece.nbytes))

    def clear(self) -> None:
        with self._lock:
            self._idle.clear()
            self._idle_bytes = 0

    def _trim(self, allowed: int) -> None:
        while self._idle_bytes > allowed:
            largest = max(size for size, pieces in self._idle.items() if pieces)
            self._idle_bytes -= self._idle[largest].pop().nbytes
