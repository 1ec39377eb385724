"""What tests of the TCP transport put between and beside real nodes: a relay that cuts, a peer that plays a part."""

import contextlib
import secrets
import socket
import threading
from collections.abc import Callable
from typing import Any

from resilient.checkpoint.peers.tcp import TcpTransport
from resilient.checkpoint.peers.transport import Address, Served
from tests.conformance.transport_contract import Shelf

HOST = "127.0.0.1"


class Nodes:
    """TCP nodes that share a token; all closed by the fixture."""

    def __init__(self) -> None:
        self.token = secrets.token_hex(32)
        self._made: list[TcpTransport] = []

    def start(self, node: str, served: Served | None = None, **options: Any) -> TcpTransport:
        options = {"host": HOST, "token": self.token, **options}
        transport = TcpTransport(node, served=served or Shelf(), **options)
        transport.start()
        self._made.append(transport)
        return transport

    def close(self) -> None:
        for transport in self._made:
            transport.close()


class Relay:
    """Listens, and passes on to a target what comes, until it is told to cut.

    `cuts[n]` is after how many bytes from the target connection n is cut; without an entry it is not.
    """

    def __init__(self, target: Address, cuts: dict[int, int] | None = None) -> None:
        self.cuts = cuts or {}
        self.asked = bytearray()  # all that came from the clients
        self.accepted = 0
        self._target = target
        self._listening = socket.create_server((HOST, 0))
        self._open = [self._listening]
        self._threads: list[threading.Thread] = []
        self._run(self._accept)

    @property
    def address(self) -> Address:
        return Address(HOST, self._listening.getsockname()[1])

    def close(self) -> None:
        for sock in self._open:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        for sock in self._open:
            sock.close()

    def _run(self, work: Callable[..., None], *arguments: object) -> None:
        self._threads.append(threading.Thread(target=work, args=arguments, name="relay"))
        self._threads[-1].start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listening.accept()
                server = socket.create_connection(self._target)
                self._open += [client, server]
                left = self.cuts.get(self.accepted, 1 << 60)
                self.accepted += 1
                self._run(self._pass, client, server, 1 << 60, self.asked)
                self._run(self._pass, server, client, left, None)

    def _pass(self, source: socket.socket, target: socket.socket, left: int, record: bytearray | None) -> None:
        with contextlib.suppress(OSError):
            while left and (data := source.recv(min(left, 1 << 16))):
                left -= len(data)
                if record is not None:
                    record += data
                with contextlib.suppress(OSError):  # it is cut: what still comes goes nowhere
                    target.sendall(data)
        with contextlib.suppress(OSError):
            source.shutdown(socket.SHUT_RDWR)
        with contextlib.suppress(OSError):  # a client still gets all that was sent to it
            target.shutdown(socket.SHUT_WR if record is None else socket.SHUT_RDWR)


class FakePeer:
    """Listens, and has `play(socket)` do as it likes with each connection, one after the other."""

    def __init__(self, play: Callable[[socket.socket], None]) -> None:
        self.accepted = 0
        self._play = play
        self._listening = socket.create_server((HOST, 0))
        self._thread = threading.Thread(target=self._run, name="fake peer")
        self._thread.start()

    @property
    def address(self) -> Address:
        return Address(HOST, self._listening.getsockname()[1])

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listening.close()

    def _run(self) -> None:
        while True:
            try:
                sock, _ = self._listening.accept()
            except OSError:
                return
            self.accepted += 1
            with sock, contextlib.suppress(OSError, EOFError):
                self._play(sock)


def rest(sock: socket.socket) -> bytes:
    """All that still comes before the other side hangs up."""
    held = b""
    with contextlib.suppress(ConnectionResetError):  # it hung up without having read all that we sent
        while data := sock.recv(1 << 16):
            held += data
    return held
