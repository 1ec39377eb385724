"""A trainer's connection to the agent: requests and their replies, one-way messages, and the thread that listens.

Knows frames and errors, not what the messages mean; that is `client.py`. When the agent is gone, everybody who waits is
told at once. A forked child cannot use its parent's connection, and cannot harm it.
"""

import contextlib
import os
import socket
import struct
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from resilient.checkpoint.agent.protocol import (
    FDS_PER_FRAME,
    FrameReader,
    Message,
    ProtocolError,
    encode,
    error_of,
)
from resilient.errors import AgentLost, ResilientError

REQUEST_S = 60.0
SEND_S = 5.0  # the agent reads at once, unless something is badly wrong
_RECEIVE_BYTES = 256 << 10

Take = Callable[[Message, list[int]], Any]


def dial(path: Path) -> socket.socket | None:
    """A connection to the agent's socket; None if nobody listens there."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.connect(str(path))
    except (FileNotFoundError, ConnectionRefusedError):
        sock.close()
        return None
    except OSError:
        sock.close()
        raise
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", int(SEND_S), 0))
    return sock


class Connection:
    """One connection. Methods may be called from any thread but the listening one, unless they say so."""

    def __init__(self, sock: socket.socket, who: str, on_event: Take, on_lost: Callable[[AgentLost], None]) -> None:
        """Takes the socket over. The callbacks are called on the listening thread; `who` opens messages of errors.

        `on_lost` may also be called on a thread that finds out by sending; once in all, and not after `hang_up`.
        """
        self.error: AgentLost | None = None
        self._sock = sock
        self._who = who
        self._on_event = on_event
        self._on_lost = on_lost
        self._pid = os.getpid()
        self._sending = threading.Lock()
        self._changing = threading.Lock()
        self._next_id = 1
        self._waiting: dict[int, tuple[Future[Any], Take]] = {}
        self._hung_up = False
        self._listener = threading.Thread(target=self._listen, name="resilient-agent-client", daemon=True)

    @property
    def is_ours(self) -> bool:
        """False in a forked child."""
        return os.getpid() == self._pid

    def start(self) -> None:
        """Begin to listen. From here on the listening thread closes the socket at its end."""
        self._listener.start()

    def check(self) -> None:
        """Raises AgentLost if nothing can be sent. Any thread."""
        if self._hung_up:
            raise AgentLost(f"{self._who}: the connection to the agent was closed; connect again")
        if self.error is not None:
            raise AgentLost(str(self.error))  # a new one each time: a traceback keeps all that its frames hold
        if not self.is_ours:
            raise AgentLost(
                f"{self._who}: a forked child cannot use its parent's connection to the agent; make another"
            )

    def send(self, operation: str, **fields: Any) -> None:
        """Send a message that gets no reply. Waits a few seconds at most. Raises AgentLost. Any thread."""
        frame = encode({"op": operation, **fields})
        self.check()
        with self._sending:
            try:
                self._sock.sendall(frame)
                return
            except OSError as error:
                failure = error
        self._lose(f"it takes no messages ({failure.strerror or failure})")
        self.check()

    def request(
        self, operation: str, *, take: Take = lambda reply, _: reply, within_s: float | None = None, **fields: Any
    ) -> Any:
        """What `take(reply, descriptors)` makes of the reply; it is called on the listening thread, so that no event
        overtakes it. Raises the error that the agent replies, AgentLost, and, only with `within_s`, TimeoutError.
        """
        assert threading.current_thread() is not self._listener, f"{operation} would wait for its own thread"
        self.check()
        future: Future[Any] = Future()
        with self._changing:
            request_id, self._next_id = self._next_id, self._next_id + 1
            self._waiting[request_id] = future, take
        try:
            self.send(operation, id=request_id, **fields)
            return future.result(REQUEST_S if within_s is None else within_s)
        except TimeoutError:
            reason = f"it did not answer {operation} within {within_s or REQUEST_S:g} s"
            if within_s is None:
                self._lose(reason)
                self.check()
            raise TimeoutError(f"{self._who}: the agent of its node: {reason}") from None
        finally:
            with self._changing:
                self._waiting.pop(request_id, None)

    def hang_up(self) -> None:
        """End the connection; on return the listening thread has ended. Safe to repeat. Not for forked children."""
        self._hung_up = True
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        if self._listener.is_alive() and threading.current_thread() is not self._listener:
            self._listener.join()

    def _lose(self, reason: str) -> None:
        """The agent is gone: tell everybody who waits. Once."""
        with self._changing:
            if self.error is not None:
                return
            self.error = AgentLost(
                f"{self._who} lost the agent of its node: {reason}; the images in its memory are gone, "
                "connecting again starts another agent"
            )
            waiting = list(self._waiting.values())
            self._waiting.clear()
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        for future, _ in waiting:
            future.set_exception(AgentLost(str(self.error)))
        if not self._hung_up:
            self._on_lost(self.error)

    def _listen(self) -> None:
        reader = FrameReader()
        reason = "it closed the connection"
        try:
            while self._receive(reader):
                for message, fds in reader.messages():
                    if "event" in message:
                        self._on_event(message, fds)
                    else:
                        self._take_reply(message, fds)
        except (OSError, ProtocolError) as error:
            reason = str(error)
        reader.close()
        self._lose(reason)
        with self._sending:
            self._sock.close()

    def _receive(self, reader: FrameReader) -> bool:
        data, fds, _, _ = socket.recv_fds(self._sock, _RECEIVE_BYTES, FDS_PER_FRAME)
        reader.feed(data, fds)
        return bool(data)

    def _take_reply(self, message: Message, fds: list[int]) -> None:
        with self._changing:
            future, take = self._waiting.pop(message["id"], (None, None))
        if future is None or take is None:  # nobody waits any more
            for fd in fds:
                os.close(fd)
            return
        try:
            error = error_of(message)
            if error is not None:
                raise error
            future.set_result(take(message, fds))
        except (ResilientError, OSError) as failure:  # OSError: this process has no room for a mapping
            future.set_exception(failure)
