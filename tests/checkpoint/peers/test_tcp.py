"""What only the TCP transport can get wrong: broken and slow connections, changes, and what is left behind.

What every transport promises is in tests/conformance; strangers and liars are in test_strangers.py.
"""

import contextlib
import gc
import logging
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import pytest

from resilient.checkpoint.peers.links import KEPT_IDLE
from resilient.checkpoint.peers.pacing import Pace
from resilient.checkpoint.peers.tcp import TcpTransport
from resilient.checkpoint.peers.transport import Address
from resilient.errors import LevelFailed, UsageError
from tests.checkpoint.peers.network import HOST, FakePeer, Nodes, Relay
from tests.conformance.transport_contract import BIG, Shelf, get, put, wanted

Eventually = Callable[..., None]
Stranger = Callable[[Address], socket.socket]


class Waiting(Shelf):
    """Lends only when it is let; `entered` says that somebody waits."""

    def __init__(self) -> None:
        super().__init__()
        self.entered, self.go = threading.Event(), threading.Event()

    @contextlib.contextmanager
    def lend(self, peer: str, name: str, offset: int, nbytes: int) -> Iterator[memoryview]:
        self.entered.set()
        assert self.go.wait(60)
        with super().lend(peer, name, offset, nbytes) as lent:
            yield lent


# Connections that break, and peers that die


@pytest.mark.parametrize("after", [0, 31, 64, 100, 1000, 3 << 20, 3 * BIG])
def test_a_read_goes_on_where_a_connection_broke(
    nodes: Nodes, shelf: Shelf, relay: Callable[..., Relay], after: int
) -> None:
    between = relay(nodes.start("beta", shelf).address, {0: after})
    alpha = nodes.start("alpha")
    alpha.set_peers({"beta": between.address})
    bounds = [(offset, 1 << 20) for offset in range(0, 8 << 20, 1 << 20)]
    found = [bytes(each.into) for each in alpha.read("beta", [wanted("image", *each) for each in bounds])]
    assert found == [bytes(shelf.held["image"][offset : offset + nbytes]) for offset, nbytes in bounds]
    assert between.accepted == (1 if after == 3 * BIG else 2)


@pytest.mark.parametrize("after", [0, 64, 100])
def test_questions_and_pushes_are_tried_again(
    nodes: Nodes, shelf: Shelf, relay: Callable[..., Relay], after: int
) -> None:
    between = relay(nodes.start("beta", shelf).address, {0: after, 2: after})
    alpha = nodes.start("alpha")
    alpha.set_peers({"beta": between.address})
    put(alpha, "beta", "image", 0, b"x" * BIG)
    assert shelf.held["image"] == b"x" * BIG
    alpha.set_peers({})
    alpha.set_peers({"beta": between.address})
    assert alpha.call("beta", {"n": 1})["heard"] == {"n": 1}
    assert between.accepted == 4


def test_a_read_that_gets_on_a_little_each_time_is_not_given_up(
    nodes: Nodes, shelf: Shelf, relay: Callable[..., Relay]
) -> None:
    between = relay(nodes.start("beta", shelf).address, dict.fromkeys(range(100), 250_000))
    alpha = nodes.start("alpha")
    alpha.set_peers({"beta": between.address})
    found = list(alpha.read("beta", [wanted("image", number * 100_000, 100_000) for number in range(12)]))
    assert b"".join(each.into for each in found) == shelf.held["image"][:1_200_000]
    assert between.accepted == 6


def test_tries_are_counted_and_end(nodes: Nodes, fake_peer: Callable[..., FakePeer]) -> None:
    beta = fake_peer(lambda sock: None)
    alpha = nodes.start("alpha", attempts=4)
    alpha.set_peers({"beta": beta.address})
    with pytest.raises(LevelFailed, match="node alpha cannot reach node beta, tried 4 times"):
        get(alpha, "beta", "x", 0, 1)
    assert beta.accepted == 4
    nobody = Address(HOST, beta.address.port)
    beta.close()
    alpha.set_peers({"beta": nobody})
    with pytest.raises(LevelFailed, match=f"tried 4 times: {HOST}:{nobody.port}: Connection refused"):
        alpha.call("beta", {})


def test_an_agent_that_is_restarted_at_its_address_is_found_again(nodes: Nodes, shelf: Shelf) -> None:
    beta = nodes.start("beta", shelf)
    alpha = nodes.start("alpha", attempts=1)
    alpha.set_peers({"beta": beta.address})
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda number: alpha.call("beta", {"n": number}), range(20)))
    beta.close()
    nodes.start("beta", later := Shelf(), port=beta.address.port)
    for _ in range(KEPT_IDLE + 1):  # no link that was kept is used, so one attempt is enough
        alpha.call("beta", {})
    assert len(later.asked) == KEPT_IDLE + 1


def test_a_peer_killed_in_the_middle_of_a_read_is_noticed_at_once(nodes: Nodes) -> None:
    program = """
import contextlib, sys, time
from resilient.checkpoint.peers.tcp import TcpTransport

class Endless:
    @contextlib.contextmanager
    def lend(self, peer, name, offset, nbytes):
        yield memoryview(bytearray(nbytes))

served = Endless()
with TcpTransport("beta", sys.argv[1], served, host="127.0.0.1") as transport:
    print(transport.address.port, flush=True)
    sys.stdin.read()
"""
    command = [sys.executable, "-c", program, nodes.token]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        alpha = nodes.start("alpha")
        alpha.set_peers({"beta": Address(HOST, int(process.stdout.readline()))})
        reading = alpha.read("beta", (wanted("image", 0, BIG) for _ in range(1 << 30)))
        next(reading)
        os.kill(process.pid, signal.SIGKILL)
        with pytest.raises(LevelFailed, match="cannot reach node beta"):
            list(reading)


# Slow peers, and time limits


def test_what_is_lent_to_a_peer_that_has_gone_comes_back_at_once(
    nodes: Nodes, shelf: Shelf, eventually: Eventually
) -> None:
    shelf.held["image"] = bytearray(64 << 20)  # more than sockets hold
    beta = nodes.start("beta", shelf)
    alpha = nodes.start("alpha")
    alpha.set_peers({"beta": beta.address})
    beta.set_peers({"alpha": alpha.address})
    reading = alpha.read("beta", [wanted("image", 0, 1), wanted("image", 0, 64 << 20)])
    next(reading)  # and never the second
    eventually(lambda: shelf.out == 1, "lent")
    beta.set_peers({"gamma": alpha.address})
    eventually(lambda: shelf.out == 0, "given back")


def test_a_peer_that_is_slow_but_sends_is_waited_for(nodes: Nodes, shelf: Shelf) -> None:
    beta = nodes.start("beta", shelf, pace=Pace(400_000))
    alpha = nodes.start("alpha", limit_s=0.2, attempts=1)
    alpha.set_peers({"beta": beta.address})
    began = time.monotonic()
    assert get(alpha, "beta", "image", 0, 300_000) == shelf.held["image"][:300_000]
    assert time.monotonic() - began > 0.4, "it took longer than the limit, or this test shows nothing"


def test_a_peer_that_says_nothing_is_given_up_after_the_limit_and_not_asked_again(nodes: Nodes) -> None:
    shelf = Waiting()
    beta = nodes.start("beta", shelf)
    alpha = nodes.start("alpha", limit_s=0.1)
    alpha.set_peers({"beta": beta.address})
    with pytest.raises(LevelFailed, match=r"cannot reach node beta, tried once: no byte moved for 0.1 s"):
        get(alpha, "beta", "image", 0, 1)
    shelf.go.set()


def test_an_address_that_does_not_answer_costs_one_limit(nodes: Nodes, fake_peer: Callable[..., FakePeer]) -> None:
    silent = fake_peer(lambda sock: sock.recv(1000, socket.MSG_WAITALL) and None)
    alpha = nodes.start("alpha", connect_s=0.1)
    alpha.set_peers({"beta": silent.address})
    with pytest.raises(LevelFailed, match="tried once: .*timed out"):
        alpha.call("beta", {})
    assert silent.accepted == 1


def test_a_host_that_swallows_packets_costs_one_limit(nodes: Nodes) -> None:
    with socket.socket() as full, contextlib.ExitStack() as waiting:
        full.bind((HOST, 0))
        full.listen(0)
        for _ in range(4):  # more than its queue holds: what comes later gets no reply
            sock = waiting.enter_context(socket.socket())
            sock.setblocking(False)
            sock.connect_ex(full.getsockname())
        alpha = nodes.start("alpha", connect_s=0.1)
        alpha.set_peers({"beta": Address(*full.getsockname())})
        with pytest.raises(LevelFailed, match="tried once: .*timed out"):
            alpha.call("beta", {})


def test_a_connection_that_nobody_uses_is_closed_by_its_server_and_made_again(
    nodes: Nodes, shelf: Shelf, eventually: Eventually
) -> None:
    beta = nodes.start("beta", shelf, limit_s=0.1)
    alpha = nodes.start("alpha", attempts=1)
    alpha.set_peers({"beta": beta.address})
    for number in range(2):
        alpha.call("beta", {"n": number})
        eventually(lambda: beta.connections == 0, "the idle connection is closed")
    assert len(shelf.asked) == 2


def test_pushes_keep_to_the_pace_of_their_sender(nodes: Nodes, shelf: Shelf) -> None:
    waits: list[float] = []
    beta = nodes.start("beta", shelf)
    alpha = nodes.start("alpha", pace=Pace(1e6, clock=lambda: 0.0, sleep=waits.append))
    alpha.set_peers({"beta": beta.address})
    put(alpha, "beta", "image", 0, bytes(1_000_000))
    assert max(waits) == pytest.approx(0.9)


# Changes while something is under way


def test_a_peer_that_moves_is_read_from_at_its_new_address(nodes: Nodes, shelf: Shelf) -> None:
    stuck = Waiting()
    old = nodes.start("beta", stuck)
    new = nodes.start("beta", shelf)
    alpha = nodes.start("alpha")
    alpha.set_peers({"beta": old.address})
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(get, alpha, "beta", "image", 7, 100)
        assert stuck.entered.wait(20)
        alpha.set_peers({"beta": new.address})
        assert reading.result() == shelf.held["image"][7:107]
    stuck.go.set()


def test_addresses_that_stay_keep_their_connections(nodes: Nodes, shelf: Shelf) -> None:
    beta = nodes.start("beta", shelf)
    alpha = nodes.start("alpha")
    for others in ({}, {"gamma": beta.address}, {}):
        alpha.set_peers({"beta": beta.address, **others})
        alpha.call("beta", {})
        assert beta.connections == 1


def test_close_ends_the_waits_of_callers_and_of_those_who_pause(nodes: Nodes) -> None:
    shelf = Waiting()
    beta = nodes.start("beta", shelf)
    alpha = nodes.start("alpha", attempts=1000)
    with socket.create_server((HOST, 0)) as nobody:
        port = nobody.getsockname()[1]
    alpha.set_peers({"beta": beta.address, "gone": Address(HOST, port)})
    with ThreadPoolExecutor(2) as pool:
        waits: list[Future[object]] = [pool.submit(get, alpha, "beta", "x", 0, 1), pool.submit(alpha.call, "gone", {})]
        assert shelf.entered.wait(20)
        alpha.close()
        for wait in waits:
            with pytest.raises(LevelFailed, match="node alpha has closed its connections"):
                wait.result()
    shelf.go.set()


def test_a_server_that_closes_ends_the_waits_of_its_peers(nodes: Nodes) -> None:
    shelf = Waiting()
    beta = nodes.start("beta", shelf, limit_s=0.5)
    alpha = nodes.start("alpha")
    alpha.set_peers({"beta": beta.address})
    with ThreadPoolExecutor(1) as pool:
        wait = pool.submit(get, alpha, "beta", "x", 0, 1)
        assert shelf.entered.wait(20)
        beta.close()
        with pytest.raises(LevelFailed, match="cannot reach node beta"):
            wait.result()
    shelf.go.set()


def test_served_may_close_its_own_transport(nodes: Nodes, eventually: Eventually) -> None:
    class Closing(Shelf):
        def answer(self, peer: str, message: dict[str, object]) -> dict[str, object]:
            beta.close()
            return {}

    beta = nodes.start("beta", Closing())
    alpha = nodes.start("alpha", attempts=1)
    alpha.set_peers({"beta": beta.address})
    with pytest.raises(LevelFailed):
        alpha.call("beta", {})
    eventually(lambda: beta.connections == 0, "all are closed")


# Where it listens, and what it leaves


def test_it_listens_at_the_one_address_it_was_given(nodes: Nodes) -> None:
    beta = nodes.start("beta", host="127.0.0.2")
    assert beta.address.host == "127.0.0.2"
    for other in ("127.0.0.1", "127.0.0.3"):
        with pytest.raises(ConnectionRefusedError), socket.create_connection((other, beta.address.port), timeout=20):
            pass


@pytest.mark.parametrize("host", ["", "0.0.0.0", "::", "*"])
def test_it_refuses_to_listen_everywhere(host: str) -> None:
    with pytest.raises(UsageError, match="name one interface"):
        TcpTransport("beta", "t" * 16, Shelf(), host=host)


def test_a_token_that_could_be_guessed_and_names_of_no_use_are_refused() -> None:
    with pytest.raises(UsageError, match="at least 16 bytes"):
        TcpTransport("beta", "t" * 15, Shelf(), host=HOST)
    for name in ("", "n" * 256, "ü" * 128):
        with pytest.raises(UsageError, match="a node's name"):
            TcpTransport(name, "t" * 16, Shelf(), host=HOST)


def test_an_address_that_cannot_be_had_is_named(nodes: Nodes) -> None:
    beta = nodes.start("beta")
    for host, port in ((HOST, beta.address.port), ("192.0.2.1", 0)):
        with pytest.raises(UsageError, match=f"node beta cannot listen at {host}:{port}"):
            TcpTransport("beta", "t" * 16, Shelf(), host=host, port=port).start()


def test_ipv6_works_where_the_machine_has_it(nodes: Nodes, shelf: Shelf) -> None:
    beta = nodes.start("beta", shelf, host="::1")
    alpha = nodes.start("alpha")
    alpha.set_peers({"beta": beta.address})
    assert get(alpha, "beta", "image", 0, 5) == shelf.held["image"][:5]


def test_a_node_without_descriptors_takes_connections_again_when_it_has_some(
    nodes: Nodes, shelf: Shelf, caplog: pytest.LogCaptureFixture, eventually: Eventually
) -> None:
    beta = nodes.start("beta", shelf)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with socket.socket() as sock, contextlib.ExitStack() as fillers, caplog.at_level(logging.WARNING):
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 256), hard))
        try:
            with contextlib.suppress(OSError):
                while True:
                    fillers.callback(os.close, os.open(os.devnull, os.O_RDONLY))
            sock.connect(beta.address)
            eventually(lambda: "could not take a connection" in caplog.text, "it says so")
        finally:
            fillers.close()
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    alpha = nodes.start("alpha")
    alpha.set_peers({"beta": beta.address})
    assert alpha.call("beta", {"n": 1})["from"] == "alpha"


def test_neither_threads_nor_descriptors_are_left(nodes: Nodes, shelf: Shelf, stranger: Stranger) -> None:
    def open_now() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), threading.active_count()

    gc.collect()  # what earlier tests have left to it is not to go meanwhile
    before = open_now()
    for _ in range(5):
        beta, alpha = nodes.start("beta", shelf), nodes.start("alpha")
        alpha.set_peers({"beta": beta.address, "other": beta.address})
        with ThreadPoolExecutor(6) as pool:
            list(pool.map(partial(get, alpha, "beta", "image", nbytes=100_000), range(30)))
        reading = alpha.read("beta", [wanted("image", 0, BIG)] * 5)
        next(reading)
        with pytest.raises(LevelFailed):
            alpha.call("other", {})
        with pytest.raises(LevelFailed):
            get(alpha, "beta", "absent", 0, 1)
        stranger(beta.address)
        alpha.close()
        beta.close()
        reading.close()  # type: ignore[attr-defined]  # a generator
    assert open_now() == (before[0] + 5, before[1]), "all but the strangers' own five sockets"
