"""The serving side of the TCP transport: one thread a connection, bytes straight from and into the memory of `Served`.

Nobody is served before the handshake; until then a connection has a few seconds, and there are few of them: where more
come, the oldest gives way, so that strangers who keep theirs open keep nobody out. Threads end with their connections:
when the peer hangs up, sends what no correct peer sends, or asks for nothing for the time limit.
"""

import contextlib
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterable

from resilient.checkpoint.agent.protocol import ProtocolError
from resilient.checkpoint.digest import digest
from resilient.checkpoint.peers.frames import Broken, Channel, Kind
from resilient.checkpoint.peers.handshake import HandshakeFailed, as_server
from resilient.checkpoint.peers.pacing import Pace, yield_to_others
from resilient.checkpoint.peers.requests import (
    Range,
    as_failure,
    check_digest,
    check_size,
    error_text,
    message_text,
    parse_message,
    parse_range,
)
from resilient.checkpoint.peers.sockets import Sockets
from resilient.checkpoint.peers.transport import Address, Served
from resilient.checkpoint.priority import run_behind

HANDSHAKE_S = 5.0
STRANGERS = 16
PEERS = 256
NICE = 10
_AFTER_FAILED_ACCEPT_S = 0.1
_STRANGER, _LISTENING, _PEER = "stranger", "listening", "peer "

log = logging.getLogger(__name__)


class Listener:
    """Serves peers on one address. `start` and `close` by the owner; the rest happens on threads of its own."""

    def __init__(
        self, node: str, token: bytes, served: Served, pace: Pace, limit_s: float, handshake_s: float = HANDSHAKE_S
    ) -> None:
        self._node = node
        self._token = token
        self._served = served
        self._pace = pace
        self._limit_s = limit_s
        self._handshake_s = handshake_s
        self._sockets = Sockets()
        self._accepting: threading.Thread | None = None
        self._threads: list[threading.Thread] = []  # changed by the accepting thread only
        self._closed = threading.Event()

    def start(self, host: str, port: int) -> Address:
        """Listen at `host`, and nowhere else. Raises OSError."""
        family, kind, proto, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        sock = socket.socket(family, kind, proto)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(where)
            sock.listen(STRANGERS)
        except OSError:
            sock.close()
            raise
        self._sockets.add(sock, _LISTENING)
        self._accepting = self._run(self._accept, sock, "accept")
        return Address(host, sock.getsockname()[1])

    def close(self) -> None:
        """On return nothing listens, all connections are closed and all threads have ended. Safe to repeat.

        A thread that `Served` keeps is waited for as long as the time limit.
        """
        self._closed.set()
        self._sockets.end()
        if self._accepting is not None:
            self._accepting.join()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(self._limit_s)

    def interrupt(self, peers: Iterable[str]) -> None:
        """Serve these no more where they were: what is lent to a host that was switched off is wanted back at once."""
        labels = {_PEER + peer for peer in peers}
        self._sockets.interrupt(labels.__contains__)

    def connections(self) -> int:
        """How many there are, those of strangers included."""
        return self._sockets.count(lambda label: label != _LISTENING)

    def _run(self, work: Callable[[socket.socket], None], sock: socket.socket, name: str) -> threading.Thread:
        """Do the work on a thread, which closes the socket at its end. Raises RuntimeError where none can be had."""

        def run() -> None:
            run_behind(NICE)
            try:
                work(sock)
            finally:
                self._sockets.close(sock)

        thread = threading.Thread(target=run, name=f"resilient-peer-{name}", daemon=True)
        thread.start()
        return thread

    def _accept(self, listening: socket.socket) -> None:
        while not self._closed.is_set():
            try:
                self._take_in(listening.accept()[0])
            except (OSError, RuntimeError) as error:  # closed; or there are no descriptors or threads to be had
                if not self._closed.wait(_AFTER_FAILED_ACCEPT_S):
                    log.warning("node %s could not take a connection from a peer: %s", self._node, error)

    def _take_in(self, sock: socket.socket) -> None:
        """Give a new connection its thread; the oldest of too many strangers gives way. Raises RuntimeError."""
        self._threads = [thread for thread in self._threads if thread.is_alive()]
        strangers = self._sockets.count(_is_stranger)
        if self.connections() - strangers >= PEERS:
            log.warning("node %s has %d connections from peers and takes no more", self._node, PEERS)
            sock.close()
            return
        self._sockets.interrupt(_is_stranger, max(0, strangers + 1 - STRANGERS))
        self._sockets.add(sock, _STRANGER)
        try:
            self._threads.append(self._run(self._welcome, sock, "serve"))
        except RuntimeError:
            self._sockets.close(sock)
            raise

    def _welcome(self, sock: socket.socket) -> None:
        """All of one connection's life."""
        try:
            prepare(sock)
            peer, keys = as_server(sock, self._token, self._node, time.monotonic() + self._handshake_s)
        except (HandshakeFailed, OSError, EOFError) as error:
            if not self._closed.is_set():
                log.warning("node %s refused a connection: %s", self._node, error)
            return
        self._sockets.add(sock, _PEER + peer)
        try:
            self._serve(Channel(sock, keys, self._pace, self._limit_s), peer)
        except (Broken, ProtocolError) as error:
            log.debug("node %s: the connection from node %s has ended: %s", self._node, peer, error)

    def _serve(self, channel: Channel, peer: str) -> None:
        """Reply to one request after the other, until Broken or ProtocolError."""
        while True:
            kind, body, data_bytes = channel.receive()
            if kind is Kind.ASK:
                self._answer(channel, peer, body)
            elif kind is Kind.READ:
                self._lend(channel, peer, parse_range(body))
            elif kind is Kind.PUSH:
                self._take(channel, peer, parse_range(body), data_bytes)
            else:
                raise ProtocolError(f"a {kind.name} that nobody asked for")

    def _answer(self, channel: Channel, peer: str, body: bytes) -> None:
        message = parse_message(body)
        try:
            answer = message_text(self._served.answer(peer, message))
        except Exception as error:
            self._fail(channel, peer, error)
        else:
            channel.send(Kind.ANSWER, answer)

    def _lend(self, channel: Channel, peer: str, wanted: Range) -> None:
        with contextlib.ExitStack() as lending:
            try:
                lent = lending.enter_context(self._served.lend(peer, wanted.name, wanted.offset, wanted.nbytes))
                check_size(lent, wanted.nbytes)
            except Exception as error:
                self._fail(channel, peer, error)
                return
            with lent.cast("B") as data:
                channel.send(Kind.DATA, data=data)

    def _take(self, channel: Channel, peer: str, pushed: Range, data_bytes: int) -> None:
        if data_bytes != pushed.nbytes:
            raise ProtocolError(f"{data_bytes} bytes of data for {pushed}")
        left = data_bytes
        try:
            with self._served.take(peer, pushed.name, pushed.offset, pushed.nbytes) as into:
                check_size(into, pushed.nbytes)
                channel.receive_into(into.cast("B"))
                left = 0
                check_digest(digest(into), pushed.digest, peer, pushed.name, pushed.offset)
        except Broken:
            raise
        except Exception as error:
            channel.drain(left)
            self._fail(channel, peer, error)
        else:
            channel.send(Kind.TAKEN)

    def _fail(self, channel: Channel, peer: str, error: Exception) -> None:
        failure = as_failure(self._node, error)
        if failure is not error:
            log.error("a request of node %s failed", peer, exc_info=error)
        channel.send(Kind.FAILED, error_text(failure))


def prepare(sock: socket.socket) -> None:
    """What both sides set on a connection."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    yield_to_others(sock)


def _is_stranger(label: str) -> bool:
    return label == _STRANGER
