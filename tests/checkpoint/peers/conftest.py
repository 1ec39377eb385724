"""Nodes over TCP on loopback, and what stands between and beside them; all gone when the test ends."""

import secrets
import socket
from collections.abc import Callable, Iterator

import pytest

from resilient.checkpoint.peers.transport import Address
from tests.checkpoint.peers.network import FakePeer, Nodes, Relay
from tests.conformance.transport_contract import BIG, Shelf


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    made = Nodes()
    yield made
    made.close()


@pytest.fixture
def relay() -> Iterator[Callable[..., Relay]]:
    made: list[Relay] = []

    def make(target: Address, cuts: dict[int, int] | None = None) -> Relay:
        made.append(Relay(target, cuts))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.fixture
def stranger() -> Iterator[Callable[[Address], socket.socket]]:
    """A raw connection to an address, with a time limit."""
    made: list[socket.socket] = []

    def connect(address: Address) -> socket.socket:
        made.append(socket.create_connection(address, timeout=20))
        return made[-1]

    yield connect
    for sock in made:
        sock.close()


@pytest.fixture
def fake_peer() -> Iterator[Callable[..., FakePeer]]:
    made: list[FakePeer] = []

    def make(play: Callable[[socket.socket], None]) -> FakePeer:
        made.append(FakePeer(play))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.fixture
def shelf() -> Shelf:
    """With an `image` of BIG random bytes."""
    found = Shelf()
    found.held["image"] = bytearray(secrets.token_bytes(BIG))
    return found
