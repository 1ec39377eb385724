"""What symmetric memory offers, whatever it is made of, and how a failure of its group is written down.

Every rank has a buffer and a pad of signals (int32 words, zero at the start). Any rank may read and write those of all
others, through tensors or, in kernels, through raw addresses. The first words of a pad have a meaning of their own.
Modelled after torch.distributed._symmetric_memory, which exists on CUDA only.
"""

import enum
from collections.abc import Sequence
from typing import NoReturn, Protocol

import torch
from torch import Tensor

from resilient.errors import CollectiveFailed, CollectiveMismatch, CollectiveTimeout, PeerGone

FAILURE_WORD = 0  # of every pad: once it is not zero, the group has failed and nobody waits any more
STATUS_WORD = 1  # why a wait of this rank was given up; written by this rank alone
FREE_WORD = 16  # the first word that users of the memory may use as they like
CHANNELS = 4  # of put_signal, wait_signal and barrier
_RANK_BITS = 16


class Cause(enum.IntEnum):
    """Why a group failed. A word holds the cause and the rank that it is about."""

    LATE = 1
    OTHER_CALL = 2
    GONE = 3

    def word(self, rank: int) -> int:
        return self << _RANK_BITS | rank


class SymmetricMemory(Protocol):
    """The memory of one rank and its view of all others'. One thread at a time, but for `close`.

    After a failure, which reaches all ranks, every wait raises: open another memory with the ranks that are left.
    """

    rank: int
    size: int
    device: torch.device
    buffer_bytes: int
    signal_words: int
    buffer_addresses: Tensor  # int64, one a rank, on the device; as this process sees the ranks' buffers
    signal_addresses: Tensor  # int64, the same of the pads

    def get_buffer(self, rank: int, shape: Sequence[int], dtype: torch.dtype, offset_bytes: int = 0) -> Tensor:
        """A tensor over a rank's buffer. Raises UsageError when it does not fit or is not aligned."""
        ...

    def get_signals(self, rank: int) -> Tensor:
        """A rank's pad: int32, `signal_words` long."""
        ...

    def put_signal(self, rank: int, channel: int = 0, timeout_s: float = 30.0) -> None:
        """Tell a rank; all that this rank wrote before is seen by who waits for it.

        Never waits on a host, where signals are counted. On CUDA there is one at a time: the stream waits until the
        rank has taken the one before, at most `timeout_s`, and a timeout ends the process's context.
        """
        ...

    def wait_signal(self, rank: int, channel: int = 0, timeout_s: float = 30.0) -> None:
        """Wait until a rank has signalled once more than was waited for. On CUDA the stream waits, not the caller.

        Raises PeerGone, CollectiveTimeout; on CUDA these end the process's context, as torch's do.
        """
        ...

    def barrier(self, channel: int = 0, timeout_s: float = 30.0) -> None:
        """Wait for all ranks, as `wait_signal` does for one."""
        ...

    def begin_call(self, number: int) -> None:
        """For who counts calls: this rank comes to this one. A rank that left before it is gone, to those that wait."""
        ...

    def end_call(self, number: int) -> None:
        """This rank needs nothing more of this call: if it leaves now, others may still finish it. Not for CUDA."""
        ...

    def close(self) -> None:
        """Let go of it, as the end of the process does. Tensors over it stay valid; safe to repeat.

        Others may still finish what needs this rank no more; who waits for it gets PeerGone (on CUDA, the timeout).
        """
        ...


def raise_failure(word: int, what: str, waited_s: float) -> NoReturn:
    """The error that a failure or status word stands for; `what` says what was being done."""
    cause, rank = word >> _RANK_BITS, word & ((1 << _RANK_BITS) - 1)
    after = "; the group cannot be used any more: form another one"
    if cause == Cause.GONE:
        raise PeerGone(f"rank {rank} is gone, so {what} cannot be completed{after}", rank=rank)
    if cause == Cause.OTHER_CALL:
        raise CollectiveMismatch(
            f"rank {rank} made another call than {what}: operation, shapes, dtype, bias and activation must be the "
            f"same on all ranks{after}"
        )
    if cause == Cause.LATE:
        raise CollectiveTimeout(
            f"rank {rank} has not come to {what} within about {waited_s:g} s: it is stuck, has left the call out, or "
            f"made one of another shape{after}",
            rank=rank,
        )
    raise CollectiveFailed(f"{what} failed for a reason that this version does not know ({word:#x}){after}")
