"""The open sockets of one side, so that any thread can end the waits of the others, and nothing stays open.

A socket is closed by the thread that uses it; other threads only interrupt it. Both happen under one lock: an interrupt
must not meet the next file that gets a closed socket's number.
"""

import contextlib
import socket
import threading
from collections.abc import Callable


class Sockets:
    """Sockets with a label each. Any thread may call any method; none blocks."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: dict[socket.socket, str] = {}  # in the order they came
        self._ended = False

    def add(self, sock: socket.socket, label: str) -> None:
        """Watch over a socket, or give it another label. After `end` it is interrupted at once."""
        with self._lock:
            self._open[sock] = label
            if self._ended:
                _interrupt(sock)

    def close(self, sock: socket.socket) -> None:
        """Close a socket and forget it. Safe to repeat."""
        with self._lock:
            self._open.pop(sock, None)
            sock.close()

    def interrupt(self, which: Callable[[str], bool], most: int | None = None) -> None:
        """End all waits, now and later, on the sockets whose label is chosen; on the `most` oldest of them."""
        with self._lock:
            for sock in [sock for sock, label in self._open.items() if which(label)][:most]:
                _interrupt(sock)

    def count(self, which: Callable[[str], bool] = lambda _: True) -> int:
        with self._lock:
            return sum(map(which, self._open.values()))

    def end(self) -> None:
        """Interrupt all, and whatever is added later. Safe to repeat."""
        with self._lock:
            self._ended = True
        self.interrupt(lambda _: True)


def _interrupt(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):  # it is not connected (any more)
        sock.shutdown(socket.SHUT_RDWR)
