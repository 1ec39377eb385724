"""What agents of different nodes can ask of one another: the seam, and its values. No sockets here.

`tcp.py` is the real one, `memory.py` the one for tests and simulations; `tests/conformance/` holds what both promise.
A node is named as `World.nodes` names it. Messages are small JSON objects; bytes are named ranges, so that nothing is
copied that need not be: reads land where the reader wants them, pushes where the receiver does.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

Message = dict[str, Any]


class Address(NamedTuple):
    """Where an agent listens for its peers."""

    host: str
    port: int


@dataclass(slots=True, kw_only=True)
class Wanted:
    """Bytes [offset, offset + len(into)) of what a peer calls `name`, to be put into `into`."""

    name: str
    offset: int
    into: memoryview


class Served(Protocol):
    """What a node offers to its peers. Called on the transport's threads, several at a time.

    Whatever ResilientError it raises is raised by the caller's method, as the same class.
    """

    def answer(self, peer: str, message: Message) -> Message:
        """The answer to a question. Returns soon."""
        ...

    def lend(self, peer: str, name: str, offset: int, nbytes: int) -> AbstractContextManager[memoryview]:
        """The bytes to send, which stay as they are while the context lasts. LevelFailed where there are none."""
        ...

    def take(self, peer: str, name: str, offset: int, nbytes: int) -> AbstractContextManager[memoryview]:
        """Where pushed bytes go. The context ends without an exception once they are there and match their digest."""
        ...


class Transport(ABC):
    """The way to the peers. Any thread may call any method. Failures are LevelFailed, and name the peer.

    Nothing waits longer than the time limit that the transport was made with, without a byte moving; what can be
    tried again is, a bounded number of times.
    """

    @abstractmethod
    def set_peers(self, peers: Mapping[str, Address]) -> None:
        """Whom there is to talk to, and where.

        Connections with a peer that is left out, or whose address has changed, are given up, in both directions.
        """

    @abstractmethod
    def call(self, peer: str, message: Message) -> Message:
        """Ask a peer. A question may be asked twice when the connection breaks: answers must allow that. Blocks."""

    @abstractmethod
    def read(self, peer: str, wanted: Iterable[Wanted]) -> Iterator[Wanted]:
        """Read ranges, in order; each is given back as soon as its bytes are there. A few are asked for ahead.

        The bytes are not verified: whoever knows their digest does that (law 5).
        """

    @abstractmethod
    def push(self, peer: str, name: str, offset: int, data: memoryview, digest: str) -> None:
        """Have a peer take bytes. On return they are there, and matched the digest (`checkpoint/digest.py`). Blocks."""

    @abstractmethod
    def close(self) -> None:
        """Give all connections up; whoever waits gets LevelFailed. Safe to repeat."""
