"""The transport without a network: nodes of one process, for tests and simulations. Keeps what `tcp.py` keeps.

Every method is a plain call into the other node's `Served`, on the caller's thread: a simulation needs no threads, and
the same seed gives the same run. `Network.cut` makes nodes unreachable; a `fault` sees all that passes, and may lose
it, damage it, or let time pass.
"""

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Literal

from resilient.checkpoint.digest import digest as digest_of
from resilient.checkpoint.peers.requests import (
    ASKED_AHEAD,
    as_failure,
    check_digest,
    check_size,
    message_text,
    parse_message,
    told_by,
)
from resilient.checkpoint.peers.transport import Address, Message, Served, Transport, Wanted
from resilient.errors import LevelFailed, ResilientError


@dataclass(frozen=True, slots=True, kw_only=True)
class Passage:
    """Something on its way from one node to another, as a fault sees it.

    `data` is what arrives, writable, where image or parity bytes pass: the reply to a read, the request of a push. (The
    reply to a read lies where the reader wanted it: what is lost on the way may have been put there in part.)
    """

    sender: str
    receiver: str
    what: Literal["call", "read", "push"]
    phase: Literal["request", "reply"]
    data: memoryview | None = None


Fault = Callable[[Passage], None]


def no_fault(_: Passage) -> None:
    """All is well."""


class Network:
    """What joins the nodes. `fault` raises LevelFailed for what is to be lost; it may be replaced at any time."""

    def __init__(self, fault: Fault = no_fault) -> None:
        self.fault = fault
        self._lock = threading.Lock()
        self._served: dict[str, Served] = {}
        self._cuts: set[frozenset[str]] = set()

    def join(self, node: str, served: Served) -> "MemoryTransport":
        """A node's transport. The same name again takes the place of the node before, as a restarted agent does."""
        with self._lock:
            self._served[node] = served
        return MemoryTransport(self, node, served)

    def leave(self, node: str, served: Served) -> None:
        """The node serves nobody any more, if it is still the one that joined with `served`. Safe to repeat."""
        with self._lock:
            if self._served.get(node) is served:
                del self._served[node]

    def cut(self, node: str, other: str | None = None) -> None:
        """Let nothing pass between two nodes, or between one and all."""
        with self._lock:
            self._cuts.add(_between(node, other))

    def mend(self, node: str, other: str | None = None) -> None:
        """Take back the `cut` of the same arguments. Safe to repeat."""
        with self._lock:
            self._cuts.discard(_between(node, other))

    def serving(self, sender: str, receiver: str) -> Served:
        """Raises LevelFailed where the sender cannot reach the receiver."""
        with self._lock:
            served = self._served.get(receiver)
            cut = not self._cuts.isdisjoint(
                (_between(sender, None), _between(receiver, None), _between(sender, receiver))
            )
        if served is None or cut:
            reason = "the network is cut" if cut else "nobody is there"
            raise LevelFailed(f"node {sender} cannot reach node {receiver}: {reason}")
        return served


def _between(node: str, other: str | None) -> frozenset[str]:
    return frozenset((node, other or node))


class MemoryTransport(Transport):
    """One node's transport; `Network.join` makes it. Of the addresses of peers only the names count."""

    def __init__(self, network: Network, node: str, served: Served) -> None:
        self._network = network
        self._node = node
        self._served = served
        self._peers: frozenset[str] = frozenset()
        self._closed = False

    @property
    def address(self) -> Address:
        return Address(self._node, 0)

    def set_peers(self, peers: Mapping[str, Address]) -> None:
        self._peers = frozenset(peers)

    def call(self, peer: str, message: Message) -> Message:
        served = self._reach(peer, "call")
        asked = parse_message(message_text(message))
        try:
            answer = message_text(served.answer(self._node, asked))
        except Exception as error:
            raise self._told(peer, error) from None
        self._come_back(peer, "call")
        return parse_message(answer)

    def read(self, peer: str, wanted: Iterable[Wanted]) -> Iterator[Wanted]:
        source = iter(wanted)
        asked: list[Wanted] = []
        while True:
            asked.extend(islice(source, ASKED_AHEAD - len(asked)))
            if not asked:
                return
            self._read(peer, asked[0])
            yield asked.pop(0)

    def push(self, peer: str, name: str, offset: int, data: memoryview, digest: str) -> None:
        arriving = bytearray(data)
        served = self._reach(peer, "push", memoryview(arriving))
        try:
            with served.take(self._node, name, offset, len(arriving)) as into:
                check_size(into, len(arriving))
                into.cast("B")[:] = arriving
                check_digest(digest_of(into), digest, self._node, name, offset)
        except Exception as error:
            raise self._told(peer, error) from None
        self._come_back(peer, "push")

    def close(self) -> None:
        self._closed = True
        self._network.leave(self._node, self._served)

    def _read(self, peer: str, wanted: Wanted) -> None:
        served = self._reach(peer, "read")
        into = wanted.into.cast("B")
        try:
            with served.lend(self._node, wanted.name, wanted.offset, into.nbytes) as lent:
                check_size(lent, into.nbytes)
                into[:] = lent.cast("B")
        except Exception as error:
            raise self._told(peer, error) from None
        self._come_back(peer, "read", into)

    def _reach(self, peer: str, what: Literal["call", "read", "push"], data: memoryview | None = None) -> Served:
        if self._closed:
            raise LevelFailed(f"node {self._node} has closed its connections, the one to node {peer} too")
        if peer not in self._peers:
            raise LevelFailed(f"node {peer} is not among the peers of node {self._node}: {sorted(self._peers)}")
        served = self._network.serving(self._node, peer)
        self._network.fault(Passage(sender=self._node, receiver=peer, what=what, phase="request", data=data))
        return served

    def _come_back(self, peer: str, what: Literal["call", "read", "push"], data: memoryview | None = None) -> None:
        """The reply is under way: the node, or the network, may have gone in between."""
        self._network.serving(self._node, peer)
        self._network.fault(Passage(sender=peer, receiver=self._node, what=what, phase="reply", data=data))

    def _told(self, peer: str, error: Exception) -> ResilientError:
        return told_by(peer, as_failure(peer, error))
