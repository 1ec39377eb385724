"""Symmetric memory among the processes of one host: a memory file for each rank, mapped by all.

A memory file has no name, so nothing is left behind however a process ends, and only the user's own processes can open
it (through /proc). Ranks find one another through the group's store (`peers.py`). A thread watches the other processes:
when one ends, the failure word is set and whoever waits here stops, in a kernel as well.
"""

import ctypes
import time
from collections.abc import Callable, Sequence
from math import prod

import torch
from torch import Tensor

from resilient.errors import UsageError
from resilient.kernels.symmetric.memory import CHANNELS, FAILURE_WORD, Cause, raise_failure
from resilient.kernels.symmetric.peers import Segment, Store, Watch, make_segment, meet, open_segments

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
    pad_bytes = _whole((signal_words + CHANNELS * size) * _WORD_BYTES)
    own = make_segment(pad_bytes + _whole(buffer_bytes), name)
    watch: Watch | None = None
    try:
        members = meet(store, rank, size, own, name=name, sizes=sizes, timeout_s=timeout_s, waiting=waiting)
        watch = Watch(members, rank)  # first, so that what is opened is known to belong to who is watched
        segments = open_segments(members, rank, own)
    except BaseException:
        own.close()
        if watch is not None:
            watch.stop()
        raise
    memory = HostMemory(rank, segments, pad_bytes, buffer_bytes, signal_words, watch)
    watch.start(memory.fail)
    return memory


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
        self._watch, self._own = watch, segments[rank]
        self._pads = [one.bytes[:pad_bytes].view(torch.int32) for one in segments]
        self._buffers = [one.bytes[pad_bytes:] for one in segments]
        self.buffer_addresses = torch.tensor([one.data_ptr() for one in self._buffers], dtype=torch.int64)
        self.signal_addresses = torch.tensor([one.data_ptr() for one in self._pads], dtype=torch.int64)
        self._put = [[0] * self.size for _ in range(CHANNELS)]
        self._taken = [[0] * self.size for _ in range(CHANNELS)]

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

    def put_signal(self, rank: int, channel: int = 0) -> None:
        self._put[channel][rank] = _after(self._put[channel][rank])
        _fence()
        self._pads[rank][self._word(channel, self.rank)] = _signed(self._put[channel][rank])

    def wait_signal(self, rank: int, channel: int = 0, timeout_s: float = 30.0) -> None:
        target = _after(self._taken[channel][rank])
        word = self._pads[self.rank][self._word(channel, rank)]
        end, tries = time.monotonic() + timeout_s, 0
        while not _reached(int(word), target):
            self._give_up_if_failed(f"a wait for rank {rank}'s signal", timeout_s)
            tries += 1
            if time.monotonic() > end:
                self.fail(Cause.LATE.word(rank))
            elif tries > _SPINS:
                time.sleep(min(_LONGEST_NAP_S, 1e-6 * tries))
        _fence()
        self._taken[channel][rank] = target

    def barrier(self, channel: int = 0, timeout_s: float = 30.0) -> None:
        others = [(self.rank + step) % self.size for step in range(1, self.size)]
        for other in others:
            self.put_signal(other, channel)
        end = time.monotonic() + timeout_s
        for other in others:
            self.wait_signal(other, channel, max(0.0, end - time.monotonic()))

    def fail(self, word: int) -> None:
        """End every wait of the group, here and elsewhere. The first cause stays. Any thread."""
        for pad in self._pads:
            if not int(pad[FAILURE_WORD]):
                pad[FAILURE_WORD] = word

    def close(self) -> None:
        self._watch.stop()
        self._own.close()

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


_lock_free = ctypes.CDLL(None)  # any foreign call; see _fence


def _fence() -> None:
    """Order this thread's loads and stores. x86 orders what is needed; a system call does so on weaker machines."""
    _lock_free.sched_yield()
