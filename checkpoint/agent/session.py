"""One connection of a trainer to the agent, on the agent's side: frames in, frames out, never waiting.

A session ends when the trainer closes it, when the trainer's process ends (its forked children may still hold the
socket), when it sends what is no frame, or when it does not read what it is sent.
"""

import contextlib
import logging
import os
import select
import socket
import struct
from collections import deque
from collections.abc import Callable, Sequence

from resilient.checkpoint.agent.loop import READ, WRITE, Loop
from resilient.checkpoint.agent.protocol import (
    FIRST_FRAME_BYTES,
    FRAME_BYTES,
    FrameReader,
    Message,
    ProtocolError,
    encode,
)

_CREDENTIALS = struct.Struct("3i")
_RECEIVE_BYTES = 256 << 10
_UNSENT_BYTES = 2 * FRAME_BYTES  # a trainer that reads nothing for so long is let go

log = logging.getLogger(__name__)


class Session:
    """A connection. All methods are for the loop's thread."""

    def __init__(self, number: int, sock: socket.socket, loop: Loop) -> None:
        self.number = number
        self.rank: int | None = None  # set once the trainer has said hello
        self.pid, self.uid, _ = _CREDENTIALS.unpack(
            sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        )
        self.closed = False
        self._sock = sock
        self._loop = loop
        self._reader = FrameReader(FIRST_FRAME_BYTES)
        self._unsent: deque[tuple[memoryview, list[int]]] = deque()
        self._unsent_bytes = 0
        self._pidfd = -1

    def start(
        self, on_message: Callable[["Session", Message], None], on_closed: Callable[["Session", str], None]
    ) -> None:
        """Take messages from now on. `on_closed(session, reason)` is called once, whoever ends it."""
        self._on_message, self._on_closed = on_message, on_closed
        self._sock.setblocking(False)
        self._loop.watch(self._sock.fileno(), READ, self._ready)
        with contextlib.suppress(OSError):  # an old kernel, or another pid namespace: the socket's end has to do
            self._pidfd = os.pidfd_open(self.pid)
            self._loop.watch(self._pidfd, READ, self._process_ended)

    def trust(self) -> None:
        """The trainer has shown the token: take frames of full size."""
        self._reader.limit_bytes = FRAME_BYTES

    def send(self, message: Message, fds: Sequence[int] = ()) -> None:
        """Queue a message. The descriptors are copied; the caller keeps its own."""
        if self.closed:
            return
        frame = memoryview(encode({**message, "descriptors": len(fds)} if fds else message))
        self._unsent.append((frame, [os.dup(fd) for fd in fds]))
        self._unsent_bytes += len(frame)
        self._flush()
        if self._unsent_bytes > _UNSENT_BYTES:
            self.close("it does not read what it is sent")

    def end_if_dead(self) -> bool:
        """Close the session if the trainer's process has ended; whether it is closed now."""
        if self._pidfd >= 0 and not self.closed and select.select([self._pidfd], [], [], 0)[0]:
            self._process_ended(READ)
        return self.closed

    def close(self, reason: str) -> None:
        if self.closed:
            return
        self.closed = True
        self._loop.forget(self._sock.fileno())
        self._sock.close()
        if self._pidfd >= 0:
            self._loop.forget(self._pidfd)
            os.close(self._pidfd)
        for _, fds in self._unsent:
            for fd in fds:
                os.close(fd)
        self._unsent.clear()
        self._on_closed(self, reason)

    def _ready(self, events: int) -> None:
        if events & WRITE:
            self._flush()
        if events & READ and not self.closed:
            self._receive()

    def _receive(self) -> bool:
        """Take what there is; whether there was something."""
        try:
            data = self._sock.recv(_RECEIVE_BYTES)
        except BlockingIOError:
            return False
        except OSError as error:
            self.close(f"its connection broke ({error.strerror})")
            return False
        if not data:
            self.close("it ended its connection")
            return False
        try:
            self._reader.feed(data)
            for message, _ in self._reader.messages():
                self._on_message(self, message)
                if self.closed:
                    return False
        except ProtocolError as error:
            self.close(f"it sent what cannot be: {error}")
        except Exception:  # a mistake of ours in one trainer's request must not cost the others their snapshots
            log.exception("a request of pid %d failed", self.pid)
            self.close("its request could not be handled")
        return not self.closed

    def _process_ended(self, _events: int) -> None:
        while self._receive():  # what it still sent counts
            pass
        self.close(f"its process {self.pid} ended")

    def _flush(self) -> None:
        while self._unsent:
            frame, fds = self._unsent[0]
            try:
                sent = socket.send_fds(self._sock, [frame], fds) if fds else self._sock.send(frame)
            except BlockingIOError:
                break
            except OSError as error:
                self.close(f"its connection broke ({error.strerror})")
                return
            for fd in fds:
                os.close(fd)
            self._unsent.popleft()
            self._unsent_bytes -= sent
            if sent < len(frame):
                self._unsent.appendleft((frame[sent:], []))
        self._loop.watch(self._sock.fileno(), READ | WRITE if self._unsent else READ, self._ready)
