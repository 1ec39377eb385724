"""Every transport of the library against the contract: in memory, and over TCP."""

import secrets
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from resilient.checkpoint.peers.memory import Network
from resilient.checkpoint.peers.tcp import TcpTransport
from tests.conformance.transport_contract import Join, TransportContract


class TestMemoryTransport(TransportContract):
    @pytest.fixture
    def join(self) -> Join:
        return Network().join


class TestTcpTransport(TransportContract):
    @pytest.fixture
    def join(self) -> Iterator[Join]:
        token = secrets.token_hex(32)
        with ExitStack() as made:
            yield lambda node, served: made.enter_context(TcpTransport(node, token, served, host="127.0.0.1"))
