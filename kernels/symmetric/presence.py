"""Who of a host's ranks is still there, as words in all pads: who has failed the group, who has left it in order.

A rank that closes its memory or exits says in every pad that it leaves, and after which call. It is missed only by who
waits for more of it: its end is no failure for the ranks that still finish that call among themselves.
"""

import ctypes
from collections.abc import Sequence

from torch import Tensor

from resilient.kernels.symmetric.memory import FAILURE_WORD, Cause


class Presence:
    """Of one rank. `words(size)` words of each pad, from `first` on, are its own. Any thread."""

    def __init__(self, rank: int, pads: Sequence[Tensor], first: int) -> None:
        self._rank, self._pads, self._first = rank, pads, first
        self.begun = self.ended = 0  # numbers of calls, where the memory's user counts any

    @staticmethod
    def words(size: int) -> int:
        """Whether each rank has left, and after which call."""
        return 2 * size

    def fail(self, word: int) -> None:
        """End every wait of the group, here and elsewhere. The first cause stays."""
        for pad in self._pads:
            if not int(pad[FAILURE_WORD]):
                pad[FAILURE_WORD] = word

    def leave(self) -> None:
        """Say that this rank is done."""
        for rank, pad in enumerate(self._pads):
            if rank != self._rank:
                pad[self._first + len(self._pads) + self._rank] = self.ended
                fence()
                pad[self._first + self._rank] = 1

    def has_left(self, rank: int) -> bool:
        left = bool(self._pads[self._rank][self._first + rank])
        fence()
        return left

    def begin(self, number: int) -> None:
        """From now on the other ranks are needed for this call: those that have left before it have failed it."""
        self.begun = number
        fence()
        for rank in range(len(self._pads)):
            if self.has_left(rank):
                self.gone(rank)

    def gone(self, rank: int) -> None:
        """A rank has ended, or has left: fail the group if this rank is in a call that it did not finish."""
        after = self._pads[self._rank][self._first + len(self._pads) + rank]
        if not self.has_left(rank) or int(after) != self.begun:
            self.fail(Cause.GONE.word(rank))


_foreign = ctypes.CDLL(None)  # any call of the system; see fence


def fence() -> None:
    """Order this thread's loads and stores. x86 orders what is needed; a system call does so on weaker machines."""
    _foreign.sched_yield()
