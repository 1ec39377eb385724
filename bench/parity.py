"""Parity of a group, and recovery of a lost node, against raw sockets that move the same bytes in the same processes.

A process for each node of the group, on loopback, with one image each. *Parity*: from the moment the first image is
sealed until the last node knows that the snapshot survives losses: announcements, reads, digests of every block,
encoding, pushes. *Recovery*: a fresh agent gets the image of the node it replaces: questions, reads, decoding, digests;
into memory that has been in use before, and into new memory, whose pages cost more here than what is put into them.
Raw sockets carry for each of them what it carries, between the same nodes at the same time, and do nothing with it;
they receive into as many buffers as ours has, and for a recovery as many bytes as it keeps into such memory as it has.
All take turns in the same processes.

Twice: on loopback, where all nodes share the cores of one machine and these are the limit, so that what verifying and
encoding cost is added to what the sockets cost; and on test hosts with cables of a given rate (`examples/nodes.py`;
root only), where the network is the limit, as where each node has cores of its own.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from bench.processes import WORKER, Failure, launch
from bench.report import Report, Rounds, Target, ratio
from bench.settings import Settings

CODES = ((2, 1), (4, 2))
PARITY = "parity"
RECOVERY, RECOVERY_NEW = "recovery into memory in use", "recovery into new memory"
LEAST = {PARITY: 0.80, RECOVERY: 0.70, RECOVERY_NEW: 0.70}
CABLES = {"": None, ", cables of 1 Gbit/s": "1gbit"}
IMAGE_BYTES, IMAGE_BYTES_BY_CABLE = 256 << 20, 128 << 20
_PATIENCE_S = 300.0


def measure(
    *, folder: str, k: int, m: int, image_bytes: int, times: int, hosts: Sequence[str] | None = None
) -> dict[str, Any]:
    """Median seconds of each, and the bytes that it moves. A process for each node; the first turn does not count."""
    import torch.distributed as dist

    from bench import parity_nodes as nodes
    from resilient.checkpoint.peers.listener import NICE

    os.nice(NICE)  # ours serves and encodes at this priority: so do all
    rank, group = dist.get_rank(), nodes.Group(k=k, m=m, image_bytes=image_bytes)
    host = hosts[rank] if hosts else nodes.HOST
    image = nodes.random_image(image_bytes, rank)
    node = nodes.AgentNode(group, rank, image, host)
    node.meet()
    seconds: dict[str, list[float]] = {}
    moved = nodes.encoding_flows(group)
    with closing(nodes.RawSockets(moved, rank, image, host)) as raw:
        for step in range(1, times + 2):
            _turn(seconds, f"{PARITY} raw", raw.move)
            _turn(seconds, PARITY, partial(node.protect, step))
            node.keep_only(step)
    lost = group.n - 1
    fetched = nodes.recovery_flows(group, lost)
    used = nodes.random_image(image_bytes if rank == lost else 1, -1).view
    with closing(nodes.RawSockets(fetched, rank, image, host)) as raw:
        for what, make in {RECOVERY: lambda _: used, RECOVERY_NEW: nodes.new_memory}.items():
            for _ in range(times + 1):
                room = Room(make)
                _turn(seconds, f"{what} raw", partial(raw.move, room, image_bytes))
                if rank == lost:
                    node.close()
                    node = nodes.AgentNode(group, rank, None, host)
                node.meet()
                room.made = memoryview(b"")  # to give it back takes its time, too
                _turn(seconds, what, partial(node.recover, times + 1, room) if rank == lost else _nothing)
                assert rank != lost or room.made == image.view, "recovery gave other bytes"
    dist.barrier()
    node.close()
    moved_bytes = {PARITY: moved, RECOVERY: fetched, RECOVERY_NEW: fetched}
    return {
        **{what: median(found[1:]) for what, found in seconds.items()},
        **{f"{what} bytes": float(sum(flows.values())) for what, flows in moved_bytes.items()},
    }


def measure_on_hosts(*, folder: str, rate: str, k: int, m: int, **others: int) -> dict[str, Any]:
    """`measure` on test hosts whose cables have a rate. Runs in one process, which starts the others."""
    from examples.nodes import Nodes

    result = Path(folder, "result.json")
    with Nodes(k + m, isolated=True) as nodes:
        hosts = [nodes.address(node) for node in nodes.names]
        arguments = json.dumps({**others, "k": k, "m": m, "folder": folder, "hosts": hosts})
        command = [sys.executable, str(WORKER), "bench.parity:measure", arguments, str(result)]
        started = []
        for rank, node in enumerate(nodes.names):
            nodes.link(node, rate)
            place = {"RANK": str(rank), "WORLD_SIZE": str(k + m), "MASTER_ADDR": hosts[0], "MASTER_PORT": "29500"}
            started.append(nodes.start(node, command, env=place))
        for process in started:
            if status := process.wait(_PATIENCE_S):
                raise RuntimeError(f"a node ended with exit status {status}")
    measured: dict[str, Any] = json.loads(result.read_text())
    return measured


class Room:
    """Gives memory, and remembers which."""

    def __init__(self, make: Callable[[int], memoryview]) -> None:
        self._make = make
        self.made = memoryview(b"")

    def __call__(self, nbytes: int) -> memoryview:
        self.made = self._make(nbytes)
        return self.made


def _turn(seconds: dict[str, list[float]], what: str, act: Callable[[], object]) -> None:
    """From the first node's beginning to the last node's end. All ranks call it."""
    import torch.distributed as dist

    dist.barrier()
    began = time.perf_counter()  # of the machine: the same clock in all processes
    act()
    ended = time.perf_counter()
    times: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(times, (began, ended))
    seconds.setdefault(what, []).append(max(end for _, end in times) - min(begin for begin, _ in times))


def _nothing() -> None:
    """What the others do while one recovers: they serve, on threads."""


def run(settings: Settings) -> list[Report]:
    rounds = Rounds()
    for number in range(settings.rounds):
        rounds.begin()
        for cables, rate in CABLES.items():
            for k, m in CODES:
                name = f"{k}+{m}{cables}"
                settings.say(f"parity, round {number + 1} of {settings.rounds}: {name}")
                measured = _launch(settings, rate, k, m)
                if isinstance(measured, Failure):
                    rounds.failed(name, measured.reason)
                else:
                    rounds.add(name, measured)
    return [report(rounds)]


def _launch(settings: Settings, rate: str | None, k: int, m: int) -> dict[str, Any] | Failure:
    image_bytes, times = (IMAGE_BYTES, 5) if rate is None else (IMAGE_BYTES_BY_CABLE, 2)
    if settings.smoke:
        image_bytes, times = 16 << 20, 1
    arguments: dict[str, Any] = {"k": k, "m": m, "image_bytes": image_bytes, "times": times}
    if rate is None:
        return launch(settings.place, "bench.parity:measure", arguments, ranks=k + m, threads=1)
    return launch(settings.place, "bench.parity:measure_on_hosts", {**arguments, "rate": rate}, threads=1)


def report(rounds: Rounds) -> Report:
    rows: dict[str, list[float | None]] = {}
    targets = []
    for what, bound in LEAST.items():
        for cables in CABLES:
            for k, m in CODES:
                name = f"{k}+{m}{cables}"
                raw, ours = rounds.series(name, f"{what} raw"), rounds.series(name, what)
                speed = ratio(raw, ours)
                rows[f"{what}, {name}"] = [speed, _gigabytes_per_s(rounds, name, what)]
                words = f"{what}, {name}: speed / raw sockets"
                targets.append(Target(what=words, value=speed, bound=bound, at_most=False))
    return Report(
        name="parity",
        title="Parity of a group and recovery of a lost node, end to end, against raw sockets",
        columns=("speed / raw sockets", "moved, GB/s"),
        rows=rows,
        targets=targets,
        plotted=("speed / raw sockets",),
        samples=rounds.samples,
        failures=rounds.failures,
        notes=(
            "raw sockets move the same bytes between the same nodes at the same time, and verify and compute nothing",
            "without cables all nodes share the cores of this machine, which are the limit of both",
        ),
    )


def _gigabytes_per_s(rounds: Rounds, name: str, what: str) -> float | None:
    speed = ratio(rounds.series(name, f"{what} bytes"), rounds.series(name, what))
    return None if speed is None else speed / 1e9
