"""Who has the token gets keys, and nobody else; a recorded, reflected or misdirected proof is worth nothing."""

import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from resilient.checkpoint.peers.handshake import HandshakeFailed, Keys, as_client, as_server

TOKEN = b"0123456789abcdef"
HELLO_BYTES, NONCE_BYTES, PROOF_BYTES = 555, 32, 32

Ends = tuple[socket.socket, socket.socket]


@pytest.fixture
def ends() -> Iterator[Ends]:
    client, server = socket.socketpair()
    with client, server:
        yield client, server


@pytest.fixture
def beside() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as pool:
        yield pool


def soon() -> float:
    return time.monotonic() + 20


def serve(beside: ThreadPoolExecutor, sock: socket.socket, token: bytes = TOKEN) -> Future[tuple[str, Keys]]:
    def work() -> tuple[str, Keys]:
        try:
            return as_server(sock, token, "beta", soon())
        finally:
            sock.shutdown(socket.SHUT_RDWR)

    return beside.submit(work)


def exactly(sock: socket.socket, nbytes: int) -> bytes:
    return sock.recv(nbytes, socket.MSG_WAITALL)


def test_two_that_know_the_token_agree_on_keys_of_their_own(ends: Ends, beside: ThreadPoolExecutor) -> None:
    served = serve(beside, ends[1])
    ours = as_client(ends[0], TOKEN, "älpha", "beta", soon())
    name, theirs = served.result()
    assert name == "älpha"
    assert (ours.sending, ours.receiving) == (theirs.receiving, theirs.sending)
    assert ours.sending != ours.receiving
    again, other = socket.socketpair()
    with again, other:
        served = serve(beside, other)
        assert as_client(again, TOKEN, "älpha", "beta", soon()).sending != ours.sending


def test_a_client_without_the_token_learns_one_random_number(ends: Ends, beside: ThreadPoolExecutor) -> None:
    served = serve(beside, ends[1])
    with pytest.raises(EOFError):
        as_client(ends[0], b"another token 123", "alpha", "beta", soon())
    with pytest.raises(HandshakeFailed, match="does not know"):
        served.result()


def test_a_server_without_the_token_is_found_out(ends: Ends, beside: ThreadPoolExecutor) -> None:
    client = beside.submit(as_client, ends[0], TOKEN, "alpha", "beta", soon())
    exactly(ends[1], HELLO_BYTES)
    ends[1].sendall(bytes(NONCE_BYTES))
    exactly(ends[1], PROOF_BYTES)
    ends[1].sendall(bytes(PROOF_BYTES))
    with pytest.raises(HandshakeFailed, match="does not know"):
        client.result()


def test_a_clients_own_proof_sent_back_proves_nothing(ends: Ends, beside: ThreadPoolExecutor) -> None:
    client = beside.submit(as_client, ends[0], TOKEN, "alpha", "beta", soon())
    exactly(ends[1], HELLO_BYTES)
    ends[1].sendall(bytes(NONCE_BYTES))
    ends[1].sendall(exactly(ends[1], PROOF_BYTES))
    with pytest.raises(HandshakeFailed):
        client.result()


def test_a_recorded_handshake_cannot_be_played_again(ends: Ends, beside: ThreadPoolExecutor) -> None:
    client = beside.submit(as_client, ends[0], TOKEN, "alpha", "beta", soon())
    hello = exactly(ends[1], HELLO_BYTES)
    ends[1].sendall(bytes(NONCE_BYTES))
    proof = exactly(ends[1], PROOF_BYTES)
    ends[1].close()
    with pytest.raises(EOFError):
        client.result()
    attacker, server = socket.socketpair()
    with attacker, server:
        served = serve(beside, server)
        attacker.sendall(hello + proof)
        with pytest.raises(HandshakeFailed):
            served.result()
        assert len(exactly(attacker, 100)) == NONCE_BYTES


@pytest.mark.parametrize(
    "change",
    [
        lambda hello: b"X" + hello[1:],  # another protocol
        lambda hello: hello[:10] + b"\x09" + hello[11:],  # another version
        lambda hello: hello.replace(b"beta", b"zeta"),  # meant for another node
    ],
)
def test_who_speaks_otherwise_or_means_another_node_gets_no_reply(
    ends: Ends, beside: ThreadPoolExecutor, change: Callable[[bytes], bytes]
) -> None:
    client = beside.submit(as_client, ends[0], TOKEN, "alpha", "beta", soon())
    hello = exactly(ends[1], HELLO_BYTES)
    ends[1].close()
    with pytest.raises(EOFError):
        client.result()
    assert change(hello) != hello
    attacker, server = socket.socketpair()
    with attacker, server:
        served = serve(beside, server)
        attacker.sendall(change(hello))
        with pytest.raises(HandshakeFailed, match="looks for node"):
            served.result()
        assert attacker.recv(1) == b""


@pytest.mark.parametrize("change", [lambda hello: hello.replace(b"alpha", b"gamma"), lambda hello: hello[:-1] + b"x"])
def test_a_hello_that_was_changed_on_the_way_fails(
    ends: Ends, beside: ThreadPoolExecutor, change: Callable[[bytes], bytes]
) -> None:
    client = beside.submit(as_client, ends[0], TOKEN, "alpha", "beta", soon())
    attacker, server = socket.socketpair()
    with attacker, server, ThreadPoolExecutor(1) as more:
        served = serve(more, server)
        attacker.sendall(change(exactly(ends[1], HELLO_BYTES)))
        ends[1].sendall(exactly(attacker, NONCE_BYTES))
        attacker.sendall(exactly(ends[1], PROOF_BYTES))
        with pytest.raises(HandshakeFailed):
            served.result()
        ends[1].close()
        with pytest.raises(EOFError):
            client.result()


def test_a_name_that_is_no_text_is_refused(ends: Ends, beside: ThreadPoolExecutor) -> None:
    class Name(str):
        def encode(self, *_: object) -> bytes:
            return b"\xff\xfe"

    served = serve(beside, ends[1])
    with pytest.raises(EOFError):
        as_client(ends[0], TOKEN, Name(), "beta", soon())
    with pytest.raises(HandshakeFailed, match="no text"):
        served.result()


@pytest.mark.parametrize("said", [b"", b"R", bytes(554)])
def test_who_does_not_finish_in_time_is_given_up(ends: Ends, said: bytes) -> None:
    ends[0].sendall(said)
    with pytest.raises(TimeoutError):
        as_server(ends[1], TOKEN, "beta", time.monotonic() + 0.05)
    with pytest.raises(TimeoutError, match="did not finish"):
        as_server(ends[1], TOKEN, "beta", time.monotonic())
