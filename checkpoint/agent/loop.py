"""The agent's event loop: one thread that owns all state, woken by sockets, by ended processes and by other threads.

Threads that write, digest or prefault hand their results over with `post`, so nothing else needs a lock. Nothing that
runs on the loop may block. Connections are in `session.py`.
"""

import contextlib
import os
import selectors
import threading
from collections import deque
from collections.abc import Callable

READ, WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE


class Loop:
    """A selector, and a queue of calls from other threads."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._posted: deque[Callable[[], None]] = deque()
        self._waking = threading.Lock()
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._selector.register(self._wake_fd, READ, self._drain)

    def post(self, call: Callable[[], None]) -> None:
        """Have `call` run on the loop. From any thread; dropped silently once the loop is closed."""
        self._posted.append(call)
        self.wake()

    def wake(self) -> None:
        """Make the loop go round once. From any thread, but not from a signal handler: it takes a lock."""
        with self._waking:
            if self._wake_fd >= 0:
                os.eventfd_write(self._wake_fd, 1)

    def watch(self, fd: int, interest: int, ready: Callable[[int], None]) -> None:
        """Call `ready(READ or WRITE or both)` whenever the descriptor is; replaces an earlier watch."""
        try:
            self._selector.modify(fd, interest, ready)
        except KeyError:
            self._selector.register(fd, interest, ready)

    def forget(self, fd: int) -> None:
        """Watch a descriptor no more; call it before closing one. Safe to repeat."""
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(fd)

    def turn(self, timeout_s: float) -> None:
        """Wait for something to happen, at most so long, and run what follows from it."""
        for key, events in self._selector.select(timeout_s):
            if key.fd in self._selector.get_map():  # an earlier call of this round may have ended it
                key.data(events)
        for _ in range(len(self._posted)):
            self._posted.popleft()()

    def close(self) -> None:
        self._selector.close()
        with self._waking:
            os.close(self._wake_fd)
            self._wake_fd = -1

    def _drain(self, _events: int) -> None:
        os.eventfd_read(self._wake_fd)
