"""Test hosts: reached, killed, cut off and replaced as machines are, and gone without a trace afterwards."""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2]))  # the examples are no installed package

from examples.netns import NodesError
from examples.nodes import Nodes

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces can be made by root only")
KINDS = [pytest.param(True, id="namespaces", marks=needs_root), pytest.param(False, id="loopback")]
ECHO = """
import socket, sys
with socket.create_server((sys.argv[1], int(sys.argv[2]))) as server:
    print(server.getsockname()[1], flush=True)
    while True:
        peer, _ = server.accept()
        while data := peer.recv(65536):
            peer.sendall(data)
"""
CALL = """
import socket, sys
with socket.create_connection((sys.argv[1], int(sys.argv[2])), 10) as peer:
    print(peer.getsockname()[0], flush=True)
"""
DETACHED = """
import subprocess, sys
sleeper = [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(600)"]
subprocess.Popen(sleeper, start_new_session=True)
"""


@pytest.fixture(params=KINDS)
def nodes(request: pytest.FixtureRequest) -> Iterator[Nodes]:
    with Nodes(2, isolated=request.param) as nodes:
        yield nodes


@pytest.fixture
def isolated() -> Iterator[Nodes]:
    with Nodes(2, isolated=True) as nodes:
        yield nodes


def first_line(process: "subprocess.Popen[bytes]") -> str:
    assert process.stdout is not None
    with process.stdout as lines:
        return lines.readline().decode().strip()


def python(nodes: Nodes, node: str, program: str, *arguments: str) -> str:
    """Start a program on a node; returns the first line that it prints."""
    return first_line(nodes.start(node, [sys.executable, "-c", program, *arguments], output=subprocess.PIPE))


def detached(nodes: Nodes, node: str) -> int:
    """Start a process as an agent is started: the one that starts it ends, and it lives on. Returns its number."""
    starter = nodes.start(node, [sys.executable, "-c", DETACHED], output=subprocess.PIPE)
    assert first_line(starter) == "up"
    starter.wait(20)
    (pid,) = nodes.processes(node)
    return pid


def echo(nodes: Nodes, node: str) -> socket.socket:
    """A server on a node that sends back what it gets, and the login node's connection to it."""
    port = int(python(nodes, node, ECHO, nodes.address(node), "0"))
    return socket.create_connection((nodes.address(node), port), 10)


def answers(peer: socket.socket) -> bool:
    peer.sendall(b"?")
    return peer.recv(1) == b"?"


def test_nodes_reach_one_another_and_the_login_node_at_their_addresses(nodes: Nodes) -> None:
    assert nodes.names == ("n1", "n2")
    assert len({nodes.login_address, *map(nodes.address, nodes.names)}) == 3
    port = python(nodes, "n1", ECHO, nodes.address("n1"), "0")
    came_from = python(nodes, "n2", CALL, nodes.address("n1"), port)
    if nodes.isolated:
        assert came_from == nodes.address("n2")
    with socket.create_server((nodes.login_address, 0)) as server:
        python(nodes, "n2", CALL, nodes.login_address, str(server.getsockname()[1]))


def test_a_program_is_told_its_node_and_a_folder_of_its_own(nodes: Nodes) -> None:
    told = "import os; print(os.environ['RESILIENT_NODE'], os.environ['RESILIENT_RUNTIME_DIR'], os.environ['TMPDIR'])"
    rows = [python(nodes, node, told).split() for node in nodes.names]
    assert [row[0] for row in rows] == ["n1", "n2"]
    assert [row[1] for row in rows] == [row[2] for row in rows] == [str(nodes.folder(node)) for node in nodes.names]
    assert all(Path(row[1]).is_dir() and len(row[1]) < 40 for row in rows), "a socket's path has 107 bytes in all"


def test_a_killed_node_takes_all_its_processes_along_and_nobody_elses(nodes: Nodes) -> None:
    named_alike = {**os.environ, "RESILIENT_NODE": "n1"}
    bystander = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, env=named_alike)
    try:
        pid = detached(nodes, "n1")
        with echo(nodes, "n1") as peer, echo(nodes, "n2") as neighbour:
            assert answers(peer)
            nodes.kill("n1")
            assert not Path(f"/proc/{pid}/exe").exists()
            assert peer.recv(1) == b"", "a peer sees the connection close"
            assert answers(neighbour)
        assert nodes.names == ("n2",)
        assert bystander.poll() is None
    finally:
        bystander.communicate(b"\n")


def test_a_spare_has_a_later_address_and_a_node_that_comes_back_has_lost_its_folder(nodes: Nodes) -> None:
    (nodes.folder("n1") / "left").touch()
    old = nodes.address("n2")
    nodes.kill("n1")
    assert (nodes.add(), nodes.add("n1")) == ("n3", "n1")
    assert nodes.names == ("n2", "n3", "n1")
    assert old < nodes.address("n3") < nodes.address("n1")
    assert list(nodes.folder("n1").iterdir()) == []
    with echo(nodes, "n1") as peer:
        assert answers(peer)


@pytest.mark.parametrize("name", ["n2", "N7", "n-7", "anamethatistoolong", ""])
def test_a_name_that_is_taken_or_none_is_refused(name: str) -> None:
    with Nodes(2, isolated=False) as nodes:
        if name:
            with pytest.raises(ValueError, match="is a node already, or no name"):
                nodes.add(name)
        assert nodes.add() == "n3"


@needs_root
def test_a_node_that_is_killed_silently_leaves_its_peers_waiting(isolated: Nodes) -> None:
    with echo(isolated, "n1") as peer:
        assert answers(peer)
        isolated.kill("n1", silent=True)
        peer.settimeout(0.3)
        with pytest.raises(TimeoutError):
            peer.recv(1)


@needs_root
def test_a_cut_cable_stops_what_is_on_the_way_and_a_mended_one_lets_it_go_on(
    isolated: Nodes, eventually: Callable[..., None]
) -> None:
    with echo(isolated, "n1") as peer:
        assert answers(peer)
        isolated.link("n1", "down")
        peer.sendall(b"?")
        peer.settimeout(0.3)
        with pytest.raises(TimeoutError):
            peer.recv(1)
        isolated.link("n1", "up")
        peer.settimeout(20)
        assert peer.recv(1) == b"?"
    with echo(isolated, "n2") as other:
        assert answers(other), "the neighbour's cable is whole"


@needs_root
def test_a_slow_cable_carries_what_its_rate_allows_in_both_directions(isolated: Nodes) -> None:
    def seconds(nbytes: int) -> float:
        began = time.monotonic()
        peer.sendall(bytes(nbytes))
        left = nbytes
        while left:
            left -= len(peer.recv(65536))
        return time.monotonic() - began

    with echo(isolated, "n1") as peer:
        isolated.link("n1", "20mbit")
        assert seconds(1_000_000) > 0.3  # 0.4 s at that rate, less what the shaper lets pass at once
        isolated.link("n1", "up")
        assert seconds(1_000_000) < 0.3


def test_nodes_on_loopback_have_no_cables() -> None:
    with Nodes(1, isolated=False) as nodes, pytest.raises(NodesError, match="run as root, with iproute2"):
        nodes.link("n1", "down")


def traces(folder: Path) -> list[Path]:
    """What this machine has of the nodes whose folders are in `folder`: it, namespaces, the login node's interface."""
    places = (Path("/run/netns"), Path("/sys/class/net"), folder.parent)
    name = folder.name.partition("-")[0]
    return [path for place in places if place.exists() for path in place.glob(f"{name}*")]


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_left_even_when_the_test_fails(kind: bool) -> None:
    seen: list[Path] = []

    def fail() -> None:
        with Nodes(2, isolated=kind) as nodes:
            seen.append(Path(f"/proc/{detached(nodes, 'n1')}/exe"))
            seen.extend(traces(nodes.folder("n1").parent))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert len(seen) == (6 if kind else 2)  # a process and the folder; a switch, two nodes and an interface
    assert [path for path in seen if path.exists()] == []


@needs_root
def test_two_sets_of_nodes_do_not_meet() -> None:
    with Nodes(1, isolated=True) as one, Nodes(1, isolated=True) as other:
        assert one.login_address != other.login_address
        with echo(one, "n1") as peer, echo(other, "n1") as stranger:
            one.kill("n1")
            assert peer.recv(1) == b""
            assert answers(stranger)


def test_without_iproute2_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NodesError, match="install iproute2"), Nodes(1, isolated=True):
        pass
    with Nodes(1) as nodes:
        assert not nodes.isolated


@needs_root
def test_a_failure_while_they_are_made_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An `ip` that fails at the second node, after the real one made the switch and the first."""
    broken = tmp_path / "ip"
    broken.write_text(
        f'#!/bin/sh\ncase "$*" in *add*-n2) echo no more >&2; exit 1;; esac\nexec {shutil.which("ip")} "$@"\n'
    )
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    before = {*Path("/run/netns").glob("*"), *Path("/sys/class/net").glob("*")}
    with pytest.raises(NodesError, match="no more"), Nodes(2, isolated=True):
        pass
    assert {*Path("/run/netns").glob("*"), *Path("/sys/class/net").glob("*")} <= before
    assert list(tmp_path.glob("rs*")) == []
