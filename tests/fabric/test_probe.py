"""Probes tell the path that a flow takes: what links carried is the judge."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from examples.fabric import LeafSpine

Up = Callable[[Any], Any]
ROOT = Path(__file__).resolve().parents[2]
PORTS = range(23000, 23008)
LISTEN = """
import socket
server = socket.create_server(("", 9000))
for _ in range(8):
    peer, _ = server.accept()
    while peer.recv(1 << 16):
        pass
    peer.close()
"""
SEND = """
import socket, sys, time
end = time.monotonic() + 20
while True:
    try:
        peer = socket.create_connection((sys.argv[1], 9000), 20, source_address=("", int(sys.argv[2])))
        break
    except ConnectionRefusedError:
        assert time.monotonic() < end
        time.sleep(0.02)
peer.sendall(bytes(200_000))
peer.shutdown(socket.SHUT_WR)
assert peer.recv(1) == b""  # all has been read
"""
FIND = """
import os, sys, time
from resilient.comms.probe import Finder
finder = Finder(
    [tuple(f"10.255.{leaf}.{4 * spine + 2}" for leaf in range(2)) for spine in range(4)], limit_s=2)
began = time.monotonic()
try:
    for spine in (0, 1, 2, 3, 3):
        print(finder(os.environ["FABRIC_ADDRESS"], (sys.argv[1], 9000), spine))
except OSError as error:
    print("none:", error, time.monotonic() - began < 4)
"""


def probed(fabric: LeafSpine, ports: list[int], bare: bool = False) -> list[str | None]:
    words = [sys.executable, "-P", "-m", "tests.fabric.worker", "probes", fabric.address(1), *map(str, ports)]
    outcome = fabric.run(words, hosts=[0], env={"PYTHONPATH": str(ROOT)}, bare=bare).check()
    hops: list[str | None] = json.loads(outcome.outputs["0"])["hops"]
    return hops


@pytest.mark.parametrize("bare", [False, True], ids=["root", "anybody"])
def test_what_a_probe_says_is_where_the_bytes_go(up: Up, bare: bool) -> None:
    fabric = up(LeafSpine(rate="400mbit"))
    ports = list(PORTS)
    said = probed(fabric, ports, bare)
    spines = [int(str(hop).rsplit(".", 1)[1]) // 4 for hop in said]
    assert len(set(spines)) > 1
    with fabric.launch([sys.executable, "-c", LISTEN], hosts=[1]) as server:
        for port, spine in zip(ports, spines, strict=True):
            before = fabric.counters()
            fabric.run([sys.executable, "-c", SEND, fabric.address(1), str(port)], hosts=[0], bare=bare).check()
            after = fabric.counters()
            carried = [after["up", 0, path] - before["up", 0, path] for path in range(4)]
            assert carried[spine] > 200_000
        server.wait(20).check()


def test_a_port_is_found_for_each_path(up: Up) -> None:
    fabric = up(LeafSpine())
    words = [sys.executable, "-P", "-c", FIND, fabric.address(1)]
    found = fabric.run(words, hosts=[0], env={"PYTHONPATH": str(ROOT)}).check().outputs["0"].split()
    spines = [int(str(hop).rsplit(".", 1)[1]) // 4 for hop in probed(fabric, [int(port) for port in found])]
    assert spines == [0, 1, 2, 3, 3]
    assert len(set(found)) == 5


def test_where_switches_do_not_answer_nothing_is_claimed_and_little_time_is_lost(up: Up) -> None:
    fabric = up(LeafSpine(answering=False))
    assert probed(fabric, [23000]) == [None]
    words = [sys.executable, "-P", "-c", FIND, fabric.address(1)]
    said = fabric.run(words, hosts=[0], env={"PYTHONPATH": str(ROOT)}).check().outputs["0"]
    assert said.startswith("none: no flow from 10.1.0.2")
    assert "no router on the way has answered" in said
    assert said.strip().endswith("True")
