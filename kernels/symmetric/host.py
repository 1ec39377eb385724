"""Symmetric memory among the processes of one host: a memory file for each rank, mapped by all.

A memory file has no name, so nothing is left behind however a process ends, and only the user's own processes can open
it (through /proc). Ranks find one another through the group's store (`peers.py`). A thread watches the other processes:
when one ends without having left (`presence.py`), the failure word is set and whoever waits stops, in a kernel as well.
"""

import ctypes
import os
import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from math import prod

import torch
from torch import Tensor

from resilient.errors import CollectiveFailed, ResilientError, UsageError
from resilient.kernels.symmetric.memory import CHANNELS, FAILURE_WORD, Cause, raise_failure
from resilient.kernels.symmetric.peers import (
    Member,
    Segment,
    Store,
    await_outcomes,
    make_segment,
    meet,
    open_segments,
    outcome_told,
)
from resilient.kernels.symmetric.presence import Presence, fence
from resilient.kernels.symmetric.watch import Watch

_WORD_BYTES = 4
_ALIGN_BYTES = 4096
_LONGEST_NAP_S = 0.001
_SPINS = 200


def open_host(
    store: Store,
    rank: int,
    size: int,
    *,
    name: str,
    buffer_bytes: int,
    signal_words: int,
    timeout_s: float,
    waiting: Callable[[], None],
) -> "HostMemory":
    """As `open_symmetric`. `store` is the group's."""
    sizes = (buffer_bytes, signal_words)
    pad_bytes = _whole((signal_words + CHANNELS * size + Presence.words(size)) * _WORD_BYTES)
    own = make_segment(pad_bytes + _whole(buffer_bytes), name)
    watch: Watch | None = None
    try:
        members = meet(store, rank, size, own, name=name, sizes=sizes, timeout_s=timeout_s, waiting=waiting)
        try:
            with outcome_told(store, rank, name):
                watch, segments = _opened(members, rank, own)
        except ResilientError:
            with suppress(CollectiveFailed):  # others may be about to open this rank's
                await_outcomes(store, size, name=name, timeout_s=timeout_s, waiting=waiting)
            raise
        await_outcomes(store, size, name=name, timeout_s=timeout_s, waiting=waiting, ended=watch.has_ended)
    except BaseException:
        own.close()
        if watch is not None:
            watch.stop()
        raise
    return HostMemory(rank, segments, pad_bytes, buffer_bytes, signal_words, watch)


def _opened(members: Sequence[Member], rank: int, own: Segment) -> tuple[Watch, list[Segment]]:
    watch = Watch(members, rank)  # first, so that what is opened is known to belong to who is watched
    try:
        return watch, open_segments(members, rank, own)
    except BaseException:
        watch.stop()
        raise


class HostMemory:
    """See SymmetricMemory. Stores become visible in order on x86; elsewhere a signal fences by an atomic of its own."""

    def __init__(
        self,
        rank: int,
        segments: Sequence[Segment],
        pad_bytes: int,
        buffer_bytes: int,
        signal_words: int,
        watch: Watch,
    ) -> None:
        self.rank, self.size = rank, len(segments)
        self.device = torch.device("cpu")
        self.buffer_bytes, self.signal_words = buffer_bytes, signal_words
        self._pads = [one.bytes[:pad_bytes].view(torch.int32) for one in segments]
        self._buffers = [one.bytes[pad_bytes:] for one in segments]
        self.buffer_addresses = torch.tensor([one.data_ptr() for one in self._buffers], dtype=torch.int64)
        self.signal_addresses = torch.tensor([one.data_ptr() for one in self._pads], dtype=torch.int64)
        self._put = [[0] * self.size for _ in range(CHANNELS)]
        self._taken = [[0] * self.size for _ in range(CHANNELS)]
        self._presence = Presence(rank, self._pads, signal_words + CHANNELS * self.size)
        watch.start(self._presence.gone)  # which does not hold this memory
        self._let_go = weakref.finalize(self, _let_go, os.getpid(), self._presence, watch, segments[rank])

    def get_buffer(self, rank: int, shape: Sequence[int], dtype: torch.dtype, offset_bytes: int = 0) -> Tensor:
        nbytes = prod(shape) * dtype.itemsize
        if offset_bytes < 0 or offset_bytes + nbytes > self.buffer_bytes or offset_bytes % dtype.itemsize:
            raise UsageError(
                f"{nbytes} bytes at {offset_bytes} do not lie in a buffer of {self.buffer_bytes}, "
                f"aligned to {dtype.itemsize}"
            )
        return self._buffers[rank][offset_bytes : offset_bytes + nbytes].view(dtype).view(*shape)

    def get_signals(self, rank: int) -> Tensor:
        return self._pads[rank][: self.signal_words]

    def put_signal(self, rank: int, channel: int = 0, timeout_s: float = 30.0) -> None:
        self._put[channel][rank] = _after(self._put[channel][rank])
        fence()
        self._pads[rank][self._word(channel, self.rank)] = _signed(self._put[channel][rank])

    def wait_signal(self, rank: int, channel: int = 0, timeout_s: float = 30.0) -> None:
        target = _after(self._taken[channel][rank])
        word = self._pads[self.rank][self._word(channel, rank)]
        end, tries = time.monotonic() + timeout_s, 0
        while not _reached(int(word), target):
            self._give_up_if_failed(f"a wait for rank {rank}'s signal", timeout_s)
            tries += 1
            if self._presence.has_left(rank) and not _reached(int(word), target):
                self._presence.fail(Cause.GONE.word(rank))
            elif time.monotonic() > end:
                self._presence.fail(Cause.LATE.word(rank))
            elif tries > _SPINS:
                time.sleep(min(_LONGEST_NAP_S, 1e-6 * tries))
        fence()
        self._taken[channel][rank] = target

    def barrier(self, channel: int = 0, timeout_s: float = 30.0) -> None:
        others = [(self.rank + step) % self.size for step in range(1, self.size)]
        for other in others:
            self.put_signal(other, channel)
        end = time.monotonic() + timeout_s
        for other in others:
            self.wait_signal(other, channel, max(0.0, end - time.monotonic()))

    def begin_call(self, number: int) -> None:
        self._presence.begin(number)

    def end_call(self, number: int) -> None:
        self._presence.ended = number

    def close(self) -> None:
        self._let_go()

    def _word(self, channel: int, rank: int) -> int:
        return self.signal_words + channel * self.size + rank

    def _give_up_if_failed(self, what: str, timeout_s: float) -> None:
        word = int(self._pads[self.rank][FAILURE_WORD])
        if word:
            raise_failure(word, what, timeout_s)


def _whole(nbytes: int) -> int:
    return -(-max(nbytes, 1) // _ALIGN_BYTES) * _ALIGN_BYTES


def _after(count: int) -> int:
    return (count + 1) & 0xFFFFFFFF


def _signed(count: int) -> int:
    return ctypes.c_int32(count).value


def _reached(word: int, target: int) -> bool:
    """Whether a counter that wraps around is at the target or beyond."""
    return ctypes.c_int32(word - target).value >= 0


def _let_go(process: int, presence: Presence, watch: Watch, own: Segment) -> None:
    if os.getpid() != process:
        return  # forked off: the memory, and the pipe that ends the watch, are its parent's
    presence.leave()
    watch.stop()
    own.close()
