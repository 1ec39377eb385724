"""Notices the end of other ranks' processes, by descriptors that the kernel makes readable then: nobody polls."""

import os
import select
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress

from resilient.errors import OverBudget, PeerGone
from resilient.kernels.symmetric.peers import Member


class Watch:
    """Of all ranks but the own one. `start` gives the thread its callback."""

    def __init__(self, members: Sequence[Member], rank: int) -> None:
        """Raises PeerGone for a process that is not there, OverBudget when no more descriptors may be open."""
        self._ranks: dict[int, int] = {}
        self._fds: list[int] = []
        self._thread: threading.Thread | None = None
        try:
            self._fds += os.pipe2(os.O_CLOEXEC)
            for other, member in enumerate(members):
                if other != rank:
                    self._fds.append(os.pidfd_open(member.pid))
                    self._ranks[self._fds[-1]] = other
        except ProcessLookupError as error:
            self._close()
            gone = members[other]
            raise PeerGone(f"rank {other} (process {gone.pid}) is gone", rank=other, host=gone.host) from error
        except OSError as error:
            self._close()
            raise OverBudget(
                f"the processes of {len(members)} ranks cannot be watched ({error.strerror}): raise the limit of files"
            ) from error

    def has_ended(self, rank: int) -> bool:
        """Whether a rank's process is over. Before `stop`."""
        poll = select.poll()
        for fd, one in self._ranks.items():
            if one == rank:
                poll.register(fd, select.POLLIN)
        return bool(poll.poll(0))

    def start(self, gone: Callable[[int], None]) -> None:
        """`gone(rank)` is called from a thread when a process has ended."""
        self._thread = threading.Thread(target=self._run, args=(gone,), name="resilient-symmetric", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread. Safe to repeat, and from the thread itself, where what is collected may be let go of."""
        if self._thread is None:
            self._close()
        elif self._fds:
            with suppress(OSError):
                os.write(self._fds[1], b"x")
            if self._thread is not threading.current_thread():
                self._thread.join()

    def _run(self, gone: Callable[[int], None]) -> None:
        wake = self._fds[0]
        poll = select.poll()
        for fd in (wake, *self._ranks):
            poll.register(fd, select.POLLIN)
        ready: list[int] = []
        while wake not in ready:
            ready = [fd for fd, _ in poll.poll()]
            for fd in ready:
                if fd != wake:
                    poll.unregister(fd)
                    gone(self._ranks[fd])
        self._close()

    def _close(self) -> None:
        fds, self._fds = self._fds, []
        for fd in fds:
            os.close(fd)
