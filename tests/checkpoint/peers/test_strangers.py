"""Who has no token gets nothing; who has it and sends what makes no sense loses one connection, not others."""

import contextlib
import secrets
import socket
import time
from collections.abc import Callable

import pytest

from resilient.checkpoint.peers.frames import Broken, Channel, Kind
from resilient.checkpoint.peers.handshake import as_client, as_server
from resilient.checkpoint.peers.listener import PEERS, STRANGERS
from resilient.checkpoint.peers.pacing import Pace
from resilient.checkpoint.peers.tcp import TcpTransport
from resilient.checkpoint.peers.transport import Address
from resilient.errors import LevelFailed
from tests.checkpoint.peers.network import FakePeer, Nodes, Relay, rest
from tests.conformance.transport_contract import Shelf, get, put

Eventually = Callable[..., None]
Stranger = Callable[[Address], socket.socket]
NONCE_BYTES = 32


def channel_to(nodes: Nodes, peer: TcpTransport, name: str, sock: socket.socket) -> Channel:
    """A connection of somebody who has the token, to do with as a test likes."""
    keys = as_client(sock, nodes.token.encode(), "alpha", name, time.monotonic() + 20)
    return Channel(sock, keys, Pace(), 20)


# Strangers


@pytest.mark.parametrize("said", [b"GET / HTTP/1.1\r\n\r\n" * 40, secrets.token_bytes(555), bytes(100_000)])
def test_a_stranger_gets_nothing_at_all(nodes: Nodes, shelf: Shelf, stranger: Stranger, said: bytes) -> None:
    sock = stranger(nodes.start("beta", shelf).address)
    with contextlib.suppress(OSError):  # it may hang up before all of it is sent
        sock.sendall(said)
    assert rest(sock) == b""
    assert shelf.asked == []


@pytest.mark.parametrize("said", [b"", b"RESILPEER"])
def test_a_stranger_who_does_not_go_on_is_hung_up_on(
    nodes: Nodes, stranger: Stranger, eventually: Eventually, said: bytes
) -> None:
    beta = nodes.start("beta", handshake_s=0.05)
    sock = stranger(beta.address)
    sock.sendall(said)
    assert rest(sock) == b""
    eventually(lambda: beta.connections == 0, "the connection is gone")


def test_an_agent_with_another_token_reads_pushes_and_asks_nothing(nodes: Nodes, shelf: Shelf) -> None:
    before = bytes(shelf.held["image"])
    beta = nodes.start("beta", shelf)
    alpha = nodes.start("alpha", token=secrets.token_hex(32))
    alpha.set_peers({"beta": beta.address})
    for attempt in (
        lambda: alpha.call("beta", {}),
        lambda: get(alpha, "beta", "image", 0, 10),
        lambda: put(alpha, "beta", "image", 0, b"x" * 100),
    ):
        with pytest.raises(LevelFailed, match="cannot reach node beta, tried 3 times: .* in the handshake"):
            attempt()
    assert (shelf.asked, shelf.most_out, bytes(shelf.held["image"])) == ([], 0, before)


def test_a_node_gives_nothing_to_one_that_only_poses_as_its_peer(
    nodes: Nodes, fake_peer: Callable[..., FakePeer]
) -> None:
    heard: list[bytes] = []

    def play(sock: socket.socket) -> None:
        sock.recv(555, socket.MSG_WAITALL)
        sock.sendall(bytes(NONCE_BYTES))
        sock.recv(32, socket.MSG_WAITALL)
        sock.sendall(bytes(32))
        heard.append(rest(sock))

    poser = fake_peer(play)
    alpha = nodes.start("alpha")
    alpha.set_peers({"beta": poser.address})
    with pytest.raises(LevelFailed, match="tried once: .* does not know this job's token"):
        alpha.call("beta", {"secret": 1})
    alpha.close()
    poser.close()
    assert heard == [b""]


def test_a_node_at_the_address_of_another_is_not_taken_for_it(nodes: Nodes, shelf: Shelf) -> None:
    alpha, gamma = nodes.start("alpha"), nodes.start("gamma", shelf)
    alpha.set_peers({"beta": gamma.address})
    with pytest.raises(LevelFailed, match="cannot reach node beta"):
        alpha.call("beta", {})
    assert shelf.asked == []


def test_a_recorded_conversation_cannot_be_played_again(
    nodes: Nodes, shelf: Shelf, relay: Callable[..., Relay], stranger: Stranger
) -> None:
    beta = nodes.start("beta", shelf)
    between = relay(beta.address)
    alpha = nodes.start("alpha")
    alpha.set_peers({"beta": between.address})
    alpha.call("beta", {"n": 1})
    put(alpha, "beta", "image", 0, b"old")
    put(alpha, "beta", "image", 0, b"new")
    sock = stranger(beta.address)
    sock.sendall(between.asked)
    assert len(rest(sock)) <= NONCE_BYTES
    assert len(shelf.asked) == 1
    assert shelf.held["image"][:3] == b"new"


def test_strangers_who_stay_keep_nobody_out(
    nodes: Nodes, shelf: Shelf, stranger: Stranger, eventually: Eventually
) -> None:
    beta = nodes.start("beta", shelf, handshake_s=60)
    idlers = [stranger(beta.address) for _ in range(STRANGERS + 5)]
    alpha = nodes.start("alpha")
    alpha.set_peers({"beta": beta.address})
    assert alpha.call("beta", {"n": 1})["from"] == "alpha"
    for oldest in idlers[:5]:
        assert rest(oldest) == b""
    eventually(lambda: beta.connections <= STRANGERS + 1, "no more than are allowed")


def test_there_is_a_most_of_connections(nodes: Nodes, shelf: Shelf, stranger: Stranger, eventually: Eventually) -> None:
    beta = nodes.start("beta", shelf)
    held = [channel_to(nodes, beta, "beta", stranger(beta.address)) for _ in range(PEERS)]
    for channel in held:  # who is answered is no stranger any more
        channel.send(Kind.ASK, b"{}")
        assert channel.receive()[0] is Kind.ANSWER
    with pytest.raises((EOFError, OSError)):
        channel_to(nodes, beta, "beta", stranger(beta.address))
    held.pop().sock.close()
    eventually(lambda: beta.connections < PEERS, "one is free")
    assert channel_to(nodes, beta, "beta", stranger(beta.address))


# What a peer with the token may do wrong


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (Kind.ASK, b"{"),
        (Kind.ASK, b"[1]"),
        (Kind.ASK, b"[" * 100_000),
        (Kind.READ, b"{}"),
        (Kind.READ, b'{"name":"image","offset":-1,"nbytes":1,"digest":""}'),
        (Kind.READ, b'{"name":"image","offset":0,"nbytes":1e3,"digest":""}'),
        (Kind.READ, b'{"name":7,"offset":0,"nbytes":1,"digest":""}'),
        (Kind.PUSH, b'{"name":"image","offset":0,"nbytes":9,"digest":""}'),
        (Kind.ANSWER, b"{}"),
        (Kind.FAILED, b"{}"),
        (Kind.TAKEN, b""),
    ],
)
def test_a_request_that_makes_no_sense_ends_its_connection_only(
    nodes: Nodes, shelf: Shelf, stranger: Stranger, kind: Kind, text: bytes
) -> None:
    beta = nodes.start("beta", shelf)
    channel = channel_to(nodes, beta, "beta", stranger(beta.address))
    channel.send(kind, text)
    with pytest.raises(Broken):
        channel.receive()
    alpha = nodes.start("alpha")
    alpha.set_peers({"beta": beta.address})
    assert alpha.call("beta", {"n": 1})["heard"] == {"n": 1}
    assert (len(shelf.asked), shelf.most_out) == (1, 0)


@pytest.mark.parametrize(
    ("kind", "text", "data"),
    [
        (Kind.ANSWER, b"not JSON", b""),
        (Kind.DATA, b"", b"one byte too many"),
        (Kind.TAKEN, b"", b""),
        (Kind.FAILED, b'{"id":0}', b""),
        (Kind.FAILED, b"?", b""),
        (Kind.READ, b"{}", b""),
    ],
)
def test_replies_that_make_no_sense_are_asked_for_again_a_few_times(
    nodes: Nodes, fake_peer: Callable[..., FakePeer], kind: Kind, text: bytes, data: bytes
) -> None:
    def play(sock: socket.socket) -> None:
        _, keys = as_server(sock, nodes.token.encode(), "beta", time.monotonic() + 20)
        channel = Channel(sock, keys, Pace(), 20)
        with contextlib.suppress(Broken):
            channel.receive()
            channel.send(kind, text, memoryview(data))
            channel.receive()

    beta = fake_peer(play)
    alpha = nodes.start("alpha")
    alpha.set_peers({"beta": beta.address})
    attempts: dict[bool, Callable[[], object]] = {
        True: lambda: alpha.call("beta", {}),
        False: lambda: get(alpha, "beta", "image", 0, 16),
    }
    with pytest.raises(LevelFailed, match="cannot reach node beta, tried 3 times"):
        attempts[kind is Kind.ANSWER]()
    assert beta.accepted == 3
