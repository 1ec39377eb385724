"""A real TCP proxy between an S3 client and its server that loses, delays, cuts and makes up answers as a test says.

Each connection carries one request (it is closed after the answer), so a fault belongs to one request and can be
chosen by what that asks for. `seen` lists every request that came, in order, for tests that count them.
"""

import re
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType

_LONG_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What the head of a request says."""

    method: str
    target: str
    number: int  # how many with this method and target came before

    @property
    def part(self) -> int | None:
        """The part of a multipart upload that it carries."""
        match = re.search(r"partNumber=(\d+)", self.target)
        return int(match[1]) if match else None

    @property
    def completes(self) -> bool:
        return self.method == "POST" and "uploadId=" in self.target


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """What happens to one request; the first one that is set counts."""

    hang: bool = False  # never answered
    answer: int | None = None  # answered with this status, the server never sees it
    drop_after: int | None = None  # connection cut after so many bytes of the body
    lose_answer: bool = False  # the server does it, the answer is lost
    cut_answer_after: int | None = None  # connection cut after so many bytes of the answer
    delay_s: float = 0.0  # before the server gets it


Choose = Callable[[Request], Fault | None]


class Proxy:
    """Listens on a free port of the loopback from `with` on; `choose` may be changed at any time."""

    def __init__(self, upstream: int, choose: Choose = lambda request: None) -> None:
        self.choose = choose
        self.seen: list[Request] = []
        self._upstream = upstream
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> "Proxy":
        self._spawn(self._accept)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._closing.set()
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join(_LONG_S)

    def _spawn(self, target: Callable[..., None], *args: object) -> threading.Thread:
        thread = threading.Thread(target=target, args=args, daemon=True)
        with self._lock:
            self._threads.append(thread)
        thread.start()
        return thread

    def _accept(self) -> None:
        while not self._closing.is_set():
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self._spawn(self._serve, client)

    def _serve(self, client: socket.socket) -> None:
        with client, suppress(OSError):
            client.settimeout(_LONG_S)
            head, rest = _read_head(client)
            if not head:
                return
            request = self._note(head)
            fault = self.choose(request) or Fault()
            if fault.hang:
                self._closing.wait(_LONG_S)
            elif fault.answer is not None:
                client.sendall(
                    f"HTTP/1.1 {fault.answer} Injected\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode()
                )
            else:
                self._closing.wait(fault.delay_s)
                self._forward(client, head, rest, fault)

    def _note(self, head: bytes) -> Request:
        method, target, _ = head.split(b"\r\n", 1)[0].decode().split(" ")
        with self._lock:
            number = sum(1 for old in self.seen if (old.method, old.target) == (method, target))
            request = Request(method=method, target=target, number=number)
            self.seen.append(request)
        return request

    def _forward(self, client: socket.socket, head: bytes, rest: bytes, fault: Fault) -> None:
        length = re.search(rb"(?i)\r\ncontent-length: *(\d+)", head)
        body_bytes = int(length[1]) if length else 0
        head, waits = re.subn(rb"(?i)\r\nexpect: [^\r]*", b"", head)
        if waits:  # answered here, so that the only answer of the server is the last one
            client.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        with socket.create_connection(("127.0.0.1", self._upstream), timeout=_LONG_S) as server:
            server.sendall(head[:-2] + b"Connection: close\r\n\r\n" + rest)
            limit = body_bytes if fault.drop_after is None else min(body_bytes, fault.drop_after)
            sender = self._spawn(_pump, client, server, limit - len(rest))
            if fault.drop_after is None:
                _pump(server, client, 0 if fault.lose_answer else fault.cut_answer_after, drain=True)
            else:
                sender.join()
            for end in (client, server):
                with suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
            sender.join()


def _read_head(client: socket.socket) -> tuple[bytes, bytes]:
    data = b""
    while b"\r\n\r\n" not in data:
        more = client.recv(65536)
        if not more:
            return b"", b""
        data += more
    head, _, rest = data.partition(b"\r\n\r\n")
    return head + b"\r\n\r\n", rest


def _pump(source: socket.socket, target: socket.socket, limit: int | None, drain: bool = False) -> None:
    """Carry up to `limit` bytes (None: all); with `drain`, read on to the end and throw the rest away."""
    with suppress(OSError):
        left = limit
        while drain or left is None or left > 0:
            data = source.recv(65536)
            if not data:
                return
            keep = data if left is None else data[: max(left, 0)]
            if keep:
                target.sendall(keep)
            if left is not None:
                left -= len(data)
                if left <= 0 and limit:
                    return
