"""Connections to the peers: made when they are needed, kept while they are good, given up when an address changes.

A link serves one caller at a time; callers that come together get one each. What breaks on the way is `Broken`, what a
peer says is an error of the library. Trying again is the business of `tcp.py`.
"""

import contextlib
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from typing import NoReturn

from resilient.checkpoint.agent.protocol import ProtocolError
from resilient.checkpoint.peers.frames import Broken, Channel, Kind
from resilient.checkpoint.peers.handshake import HandshakeFailed, as_client
from resilient.checkpoint.peers.listener import prepare
from resilient.checkpoint.peers.pacing import Pace
from resilient.checkpoint.peers.requests import (
    Range,
    parse_error,
    parse_message,
    range_text,
    told_by,
)
from resilient.checkpoint.peers.sockets import Sockets
from resilient.checkpoint.peers.transport import Address, Message
from resilient.errors import LevelFailed, ResilientError

KEPT_IDLE = 4  # links to one peer that wait for the next caller


class Answered(Exception):
    """A peer replied with an error, `error`; the link is as good as before. Never leaves this package."""

    def __init__(self, error: ResilientError) -> None:
        super().__init__(str(error))
        self.error = error


class Link:
    """A connection to one peer. One thread at a time. Methods raise Broken, after which it is of no use."""

    def __init__(self, peer: str, address: Address, channel: Channel) -> None:
        self.peer = peer
        self.address = address
        self.channel = channel
        self.outstanding = 0  # replies that are still to come

    def ask(self, body: bytes) -> Message:
        """The answer to the message in `body`. Raises Answered, too."""
        self._request(Kind.ASK, body)
        try:
            answer = parse_message(self._reply(Kind.ANSWER, 0))
        except ProtocolError as error:
            raise Broken(str(error)) from error
        self.outstanding -= 1
        return answer

    def ask_for(self, wanted: Range) -> None:
        """Ask for bytes; `receive` them in the order in which they were asked for."""
        self._request(Kind.READ, range_text(wanted))

    def receive(self, into: memoryview) -> None:
        """Raises Answered, too."""
        self._reply(Kind.DATA, into.nbytes)
        self.channel.receive_into(into)
        self.outstanding -= 1

    def push(self, pushed: Range, data: memoryview) -> None:
        """Raises Answered, too."""
        self._request(Kind.PUSH, range_text(pushed), data)
        self._reply(Kind.TAKEN, 0)
        self.outstanding -= 1

    def _request(self, kind: Kind, body: bytes, data: memoryview | None = None) -> None:
        self.outstanding += 1  # before: whatever ends this in the middle, the link is not one to keep
        self.channel.send(kind, body, data)

    def _reply(self, expected: Kind, nbytes: int) -> bytes:
        """The text of the next reply."""
        kind, body, data_bytes = self.channel.receive()
        if kind is Kind.FAILED:
            self._failed(body)
        if (kind, data_bytes) != (expected, nbytes):
            raise Broken(f"it replied with {kind.name} and {data_bytes} bytes, not with {expected.name} and {nbytes}")
        return body

    def _failed(self, body: bytes) -> NoReturn:
        try:
            error = told_by(self.peer, parse_error(body))
        except ProtocolError as failure:
            raise Broken(str(failure)) from failure
        self.outstanding -= 1
        raise Answered(error)


class Links:
    """All links of a node. Any thread may call any method."""

    def __init__(self, node: str, token: bytes, pace: Pace, limit_s: float, connect_s: float) -> None:
        self._node = node
        self._token = token
        self._pace = pace
        self._limit_s = limit_s
        self._connect_s = connect_s
        self._lock = threading.Lock()
        self._addresses: dict[str, Address] = {}
        self._idle: dict[str, list[Link]] = {}
        self._sockets = Sockets()
        self._closed = False

    def set_addresses(self, addresses: Mapping[str, Address]) -> set[str]:
        """Whoever uses a link to an address that is not the peer's any more gets Broken. Returns whose that were."""
        with self._lock:
            changed = {peer for peer, address in self._addresses.items() if addresses.get(peer) != address}
            self._addresses = dict(addresses)
            idle = [link for peer in changed for link in self._idle.pop(peer, [])]
        self._sockets.interrupt(changed.__contains__)
        for link in idle:
            self._drop(link)
        return changed

    def take(self, peer: str) -> Link:
        """A link for the caller alone, who gives it back. Raises Broken, LevelFailed. Blocks."""
        while (link := self._take_idle(peer)) is not None:
            if link.channel.is_idle():
                return link
            self._drop(link)
        return self._make(peer)

    @contextlib.contextmanager
    def one(self, peer: str) -> Iterator[Link]:
        """`take` and `give_back`."""
        link = self.take(peer)
        try:
            yield link
        finally:
            self.give_back(link)

    def give_back(self, link: Link) -> None:
        """The caller is done. The link is kept for the next one, unless replies are still to come by it."""
        with self._lock:
            idle = self._idle.setdefault(link.peer, [])
            keep = not link.outstanding and len(idle) < KEPT_IDLE and self._is_current(link.peer, link.address)
            if keep:
                idle.append(link)
        if not keep:
            self._drop(link)

    def close(self) -> None:
        """Whoever uses a link gets Broken; nothing stays open that nobody uses. Safe to repeat."""
        with self._lock:
            self._closed = True
            idle = [link for links in self._idle.values() for link in links]
            self._idle.clear()
        self._sockets.end()
        for link in idle:
            self._drop(link)

    def _drop(self, link: Link) -> None:
        self._sockets.close(link.channel.sock)

    def _take_idle(self, peer: str) -> Link | None:
        with self._lock:
            idle = self._idle.get(peer)
            return idle.pop() if idle else None

    def _address(self, peer: str) -> Address:
        with self._lock:
            address = self._addresses.get(peer)
            if self._closed:
                raise LevelFailed(f"node {self._node} has closed its connections, the one to node {peer} too")
            if address is None:
                raise LevelFailed(f"node {peer} is not among the peers of node {self._node}: {sorted(self._addresses)}")
            return address

    def _is_current(self, peer: str, address: Address) -> bool:
        """With the lock held."""
        return not self._closed and self._addresses.get(peer) == address

    def _make(self, peer: str) -> Link:
        address = self._address(peer)
        deadline = time.monotonic() + self._connect_s
        where = f"{address.host}:{address.port}"
        try:
            sock = self._connect(peer, address)
        except OSError as error:
            raise _not_made(where, error) from error
        try:
            with self._lock:
                current = self._is_current(peer, address)
            if not current:  # from here on, a change of the address interrupts the socket
                raise EOFError("its address has changed")
            keys = as_client(sock, self._token, self._node, peer, deadline)
            return Link(peer, address, Channel(sock, keys, self._pace, self._limit_s))
        except (HandshakeFailed, OSError, EOFError) as error:
            self._sockets.close(sock)
            raise _not_made(where, error) from error

    def _connect(self, peer: str, address: Address) -> socket.socket:
        family, kind, proto, _, where = socket.getaddrinfo(*address, type=socket.SOCK_STREAM)[0]
        sock = socket.socket(family, kind, proto)
        self._sockets.add(sock, peer)
        try:
            sock.settimeout(self._connect_s)
            sock.connect(where)
            prepare(sock)
        except OSError:
            self._sockets.close(sock)
            raise
        return sock


def _not_made(where: str, error: HandshakeFailed | OSError | EOFError) -> Broken:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else error
    return Broken(f"{where}: {reason}", final=isinstance(error, HandshakeFailed | TimeoutError))
