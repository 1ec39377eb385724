"""Probes where there is no router on the way: this host alone. Networks with routers are in `tests/fabric`."""

import socket
import time

import pytest

from resilient.comms.probe import Finder, OrChance, any_port, ask, hop

HERE, THERE = "127.0.0.1", "127.0.0.2"


def free_ports(count: int) -> list[int]:
    socks = [socket.create_server((HERE, 0)) for _ in range(count)]
    ports = [sock.getsockname()[1] for sock in socks]
    for sock in socks:
        sock.close()
    return ports


def test_probes_that_arrive_say_so_whether_anybody_listens_or_not() -> None:
    ports = free_ports(3)
    with socket.create_server((THERE, 0)) as server:
        for target in (server.getsockname(), (THERE, 9)):
            answers = list(ask(HERE, dict.fromkeys(ports, 1), target))
            assert sorted(answer.port for answer in answers) == sorted(ports)
            assert all(answer.arrived and answer.router is None for answer in answers)


def test_a_port_that_has_probed_is_free_again() -> None:
    (port,) = free_ports(1)
    with socket.create_server((THERE, 0)) as server:
        for _ in range(3):
            assert hop(HERE, port, server.getsockname()) is None
        with socket.create_connection(server.getsockname(), 5, source_address=(HERE, port)) as made:
            assert made.getsockname()[1] == port


def test_a_port_that_cannot_be_used_is_an_error_alone_and_left_out_among_others() -> None:
    (free,) = free_ports(1)
    with socket.create_server((HERE, 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match="in use"):
            hop(HERE, port, (THERE, 9))
        assert [answer.port for answer in ask(HERE, {port: 1, free: 1}, (THERE, 9))] == [free]


def test_a_flow_that_exists_already_is_not_taken_for_silence() -> None:
    with socket.create_server((THERE, 0)) as server, socket.socket() as first:
        first.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        first.bind((HERE, 0))
        first.connect(server.getsockname())
        with pytest.raises(OSError, match="EADDRNOTAVAIL"):
            hop(HERE, first.getsockname()[1], server.getsockname())


def test_a_finder_without_routers_says_where_its_probes_went_and_gives_up_in_time() -> None:
    finder = Finder([["10.0.0.1"], ["10.0.0.2"]], limit_s=0.5)
    began = time.monotonic()
    with pytest.raises(OSError, match=r"over path 1 .* died at the target itself, and no path has that among its hops"):
        finder(HERE, (THERE, 9), 1)
    assert time.monotonic() - began < 5


def test_where_nobody_tells_flows_go_by_chance_and_that_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    finder = OrChance(Finder([["10.0.0.1"], ["10.0.0.2"]], limit_s=0.5), blind_s=0.0)
    assert [finder(HERE, (THERE, 9), path) for path in (0, 1, 0)] == [0, 0, 0]
    assert [record.getMessage()[:31] for record in caplog.records] == ["flows are spread by chance: no "]


def test_where_paths_are_unknown_any_port_will_do() -> None:
    assert any_port(HERE, (THERE, 9), 3) == 0
