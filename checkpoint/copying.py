"""Copies of host memory in bounded chunks, shared by the threads that want to help.

Used by capture (tensors → image, while the training goes on); restore uses single moves (image → tensors). Large chunks
release the interpreter lock, small ones keep it: handing the lock over costs more than copying them.
"""

import ctypes
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

CHUNK_BYTES = 2 << 20
_KEEP_LOCK_BYTES = 64 << 10
_BATCH_BYTES = 256 << 10
_BATCH_MOVES = 128
_move = ctypes.memmove
_move_holding_lock = ctypes.PyDLL(None).memmove
_move_holding_lock.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
_move_holding_lock.restype = None


@dataclass(frozen=True, slots=True)
class Move:
    """Copy `nbytes` from address `source` to address `target`; or, for what is not contiguous, `tensor` to there."""

    target: int
    source: int
    nbytes: int
    tensor: torch.Tensor | None = None

    def run(self) -> None:
        if self.tensor is not None:
            flat_view(self.target, self.tensor).copy_(self.tensor)
        elif self.nbytes > _KEEP_LOCK_BYTES:
            _move(self.target, self.source, self.nbytes)
        else:
            _move_holding_lock(self.target, self.source, self.nbytes)


@dataclass(frozen=True, slots=True)
class Batch:
    """Small moves that are done as one, so that handing out work does not cost more than the work."""

    moves: tuple[Move, ...]

    def run(self) -> None:
        for move in self.moves:
            move.run()


def batched(moves: Sequence[Move]) -> list[Move | Batch]:
    """The same moves in the same order, with runs of small ones put together."""
    out: list[Move | Batch] = []
    small: list[Move] = []
    held = 0
    for move in moves:
        if move.nbytes >= _BATCH_BYTES:
            out += [Batch(tuple(small)), move] if small else [move]
            small, held = [], 0
            continue
        small.append(move)
        held += move.nbytes
        if held >= _BATCH_BYTES or len(small) >= _BATCH_MOVES:
            out.append(Batch(tuple(small)))
            small, held = [], 0
    return out + ([Batch(tuple(small))] if small else [])


def flat_view(address: int, like: torch.Tensor) -> torch.Tensor:
    """A contiguous tensor at a host address, with the shape and dtype of `like`. The caller keeps the memory alive."""
    raw = (ctypes.c_uint8 * like.nbytes).from_address(address)
    return torch.frombuffer(raw, dtype=torch.uint8).view(like.dtype).view(like.shape)


def chunks(target: int, source: int, nbytes: int) -> list[Move]:
    """One contiguous copy, cut so that each chunk is short."""
    return [
        Move(target + begin, source + begin, min(CHUNK_BYTES, nbytes - begin))
        for begin in range(0, nbytes, CHUNK_BYTES)
    ]


class SharedWork:
    """A list of moves that several threads work off together, in order.

    `progress` is called, from whichever thread, with the number of moves from the beginning that are all done.
    `stop()` makes every helper return after its current move. Any thread may call any method.
    """

    def __init__(self, moves: Sequence[Move | Batch], progress: Callable[[int], None] | None = None) -> None:
        self._moves = moves
        self._progress = progress
        self._lock = threading.Lock()
        self._next = 0
        self._running: set[int] = set()
        self._stopped = False
        self._error: BaseException | None = None
        self._finished = threading.Event()
        if not moves:
            self._finished.set()

    def help(self) -> None:
        """Take moves until none is left to take. Returns while others may still be busy with their last one."""
        while (number := self._take()) is not None:
            try:
                self._moves[number].run()
            except BaseException as error:  # kept for `wait`: a helper's error must not be lost with its thread
                self._fail(error)
            self._put(number)

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until all moves are done; False on timeout. Raises what a move raised."""
        finished = self._finished.wait(timeout_s)
        if self._error is not None:
            raise self._error
        return finished

    def release(self) -> None:
        """Forget who listens, after `wait`: whoever has this work to help with must not keep what they hold."""
        self._progress = None

    def stop(self) -> None:
        with self._lock:
            self._stopped = True
            if not self._running:
                self._finished.set()

    def _take(self) -> int | None:
        with self._lock:
            if self._stopped or self._next >= len(self._moves):
                return None
            number = self._next
            self._next += 1
            self._running.add(number)
            return number

    def _put(self, number: int) -> None:
        with self._lock:
            self._running.remove(number)
            done = min(self._running, default=self._next)
        try:
            if (progress := self._progress) is not None:
                progress(done)
        except Exception as error:  # of whoever listens, an agent that dies say: no helper's business either
            self._fail(error)
        with self._lock:
            if not self._running and (self._stopped or self._next >= len(self._moves)):
                self._finished.set()

    def _fail(self, error: BaseException) -> None:
        self._error = error
        self.stop()


def cpu_threads() -> int:
    """Threads worth using for memory copies: the CPUs this process may run on, at most eight."""
    return min(8, len(os.sched_getaffinity(0)))


def help_with_threads(work: SharedWork, threads: int) -> None:
    """Help from the calling thread and `threads - 1` more until no move is left to take."""
    helpers = [threading.Thread(target=work.help, daemon=True) for _ in range(threads - 1)]
    for helper in helpers:
        helper.start()
    work.help()
    for helper in helpers:
        helper.join()
