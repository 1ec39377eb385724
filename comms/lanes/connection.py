"""One TCP flow, non-blocking: frames in, frames out. What they mean is for `sending` and `receiving` to say."""

import socket
import time
from collections import deque
from collections.abc import Callable

from resilient.comms.lanes.messages import Name
from resilient.comms.lanes.wire import HEADER, Header, Kind, unpack

_MOST_READS = 64  # of one connection before others get their turn


class Connection:
    """`sending`: DATA goes out here; else it comes in. `path`: which lane it is.

    `place` gives the memory for a DATA payload, or None to stop reading until `resume`; `take` gets each whole frame
    (the payload is empty for DATA, which is in its place already).
    """

    def __init__(self, sock: socket.socket, peer: int, path: int, *, sending: bool) -> None:
        self.sock, self.peer, self.path, self.sending = sock, peer, path, sending
        self.heard_at = time.monotonic()
        self.paused = False
        self.chunks_in = 0
        self.announced: set[Name] = set()  # operations
        self._out: deque[memoryview] = deque()
        self._raw = bytearray(HEADER.size)
        self._header: Header | None = None
        self._into: memoryview = memoryview(self._raw)
        self._filled = 0
        self._payload = bytearray()

    @property
    def closed(self) -> bool:
        return self.sock.fileno() < 0

    @property
    def unsent(self) -> bool:
        return bool(self._out)

    @property
    def filling(self) -> Header | None:
        """The DATA whose payload is on its way into memory."""
        return self._header if self._header is not None and self._header.kind == Kind.DATA and not self.paused else None

    def put(self, *parts: bytes | memoryview) -> None:
        self._out.extend(memoryview(part) for part in parts if len(part))

    def flush(self) -> None:
        """Send what the socket takes now. Raises OSError when the connection is broken."""
        while self._out:
            try:
                sent = self.sock.sendmsg(list(self._out)[:16])
            except BlockingIOError:
                return
            while sent:
                first = self._out[0]
                if sent < len(first):
                    self._out[0] = first[sent:]
                    return
                sent -= len(first)
                self._out.popleft()

    def read(
        self,
        place: Callable[["Connection", Header], memoryview | None],
        take: Callable[["Connection", Header, bytes], None],
    ) -> None:
        """Read what is there. Raises OSError or Garbled when the connection is broken, EOFError at its end."""
        for _ in range(_MOST_READS):
            if self.paused:
                return
            try:
                count = self.sock.recv_into(self._into[self._filled :])
            except BlockingIOError:
                return
            if not count:
                raise EOFError
            self.heard_at = time.monotonic()
            self._filled += count
            while not self.paused and self._filled == len(self._into):
                self._step(place, take)

    def resume(
        self,
        place: Callable[["Connection", Header], memoryview | None],
        take: Callable[["Connection", Header, bytes], None],
    ) -> bool:
        """Ask again for a place; whether there is one now."""
        assert self._header is not None
        into = place(self, self._header)
        if into is None:
            return False
        self.paused = False
        self._into, self._filled = into, 0
        return True

    def divert(self) -> None:
        """What is being filled belongs to somebody else from now on: the rest goes nowhere."""
        assert self._header is not None
        if self._into.obj is not self._raw:
            self._into = memoryview(bytearray(len(self._into)))

    def let_go(self) -> None:
        """Of the memory of others: it may change from now on, and must not be changed."""
        self._out = deque(memoryview(bytes(part)) for part in self._out)
        if self.filling is not None:
            self.divert()

    def close(self) -> None:
        self.sock.close()

    def _step(
        self,
        place: Callable[["Connection", Header], memoryview | None],
        take: Callable[["Connection", Header, bytes], None],
    ) -> None:
        """A header is whole, or a payload is."""
        if self._header is None:
            self._header = header = unpack(self._raw)
            if header.length and header.kind == Kind.DATA:
                into = place(self, header)
                self.paused = into is None
                if into is not None:
                    self._into, self._filled = into, 0
                return
            if header.length:
                self._payload = bytearray(header.length)
                self._into, self._filled = memoryview(self._payload), 0
                return
        header, payload = self._header, b"" if self._header.kind == Kind.DATA else bytes(self._payload)
        self._header, self._payload = None, bytearray()
        self._into, self._filled = memoryview(self._raw), 0
        take(self, header, payload)
