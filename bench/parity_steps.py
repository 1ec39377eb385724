"""A snapshot at every step that survives the loss of a node: parity in memory against replication and against none.

A small GPT with AdamW (about 23 M parameters, 277 MB an image) is trained by two ranks (parity 1+1) and by three
(2+1), each on a node of its own in name, all on the cores of one machine, with DistributedDataParallel over gloo. Each
step is followed by one save, and the time runs until the last is as safe as its method makes it: in memory, in the
parity of its group, at a partner (`bench/replica.py`). Nothing is skipped: who does not keep up makes it wait.
"""

import os
import time
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from bench.processes import Failure, launch
from bench.report import Report, Rounds, ratio
from bench.settings import Settings

if TYPE_CHECKING:
    from bench.peers import Method
    from bench.state import Training

BARE, MEMORY, PARITY, REPLICA = "no snapshot", "memory", "memory + parity", "replica at a partner"
METHODS = (BARE, MEMORY, PARITY, REPLICA)
NODES = {2: "1+1", 3: "2+1"}


def measure(*, folder: str, method: str, parity: str, tiny: bool, steps: int) -> dict[str, float]:
    """Train with a save after every step. Runs in a process for each rank."""
    import torch.distributed as dist

    from bench.peers import Nothing
    from bench.state import SHAPES, Shape, Training

    os.environ["RESILIENT_NODE"] = f"node{dist.get_rank()}"
    small = Shape(layers=6, width=512, heads=8, context=128)
    training = Training(SHAPES["tiny"] if tiny else small)
    for _ in range(2):
        training.step(Nothing(training, Path(folder), fsynced=False).updating)
    saver = _make(method, parity)(training, Path(folder))
    for step in range(2):
        saver.save(step).result()  # plans, allocates both buffers, starts processes: not counted, for any method
        training.step(saver.updating)
    dist.barrier()
    began = time.perf_counter()
    took: list[float] = []
    saves: list[Future[float]] = []
    for step in range(2, steps + 2):
        stepped = time.perf_counter()
        training.step(saver.updating)
        saves.append(saver.save(step))
        took.append(time.perf_counter() - stepped)
    for save in saves:
        save.result()
    dist.barrier()
    total = time.perf_counter() - began
    saver.finish()
    return {"total": total, "step": median(took), "image_bytes": float(training.image_bytes())}


def _make(method: str, parity: str) -> "Callable[[Training, Path], Method]":
    from bench.ours import Resilient
    from bench.peers import Nothing
    from bench.replica import Replicated

    if method == BARE:
        return partial(Nothing, fsynced=False)
    if method == REPLICA:
        return partial(Replicated, fsynced=False)
    return partial(Resilient, fsynced=False, local=False, parity=parity if method == PARITY else None)


def run(settings: Settings) -> list[Report]:
    return [_nodes(settings, count, parity) for count, parity in NODES.items()]


def _nodes(settings: Settings, count: int, parity: str) -> Report:
    rounds = Rounds()
    steps = 6 if settings.quick else 20
    name = f"parity_steps_{count}"
    for number in range(settings.rounds):
        rounds.begin()
        for method in settings.turned(METHODS, number):
            settings.say(f"{name}, round {number + 1} of {settings.rounds}: {method}")
            arguments: dict[str, Any] = {"method": method, "parity": parity, "tiny": settings.smoke, "steps": steps}
            measured = launch(settings.place, "bench.parity_steps:measure", arguments, ranks=count, threads=1)
            if isinstance(measured, Failure):
                rounds.failed(method, measured.reason)
            else:
                rounds.add(method, measured)
    return report(rounds, name, f"A snapshot at every one of {steps} steps: {count} nodes on one machine, {parity}")


def report(rounds: Rounds, name: str, title: str) -> Report:
    rows: dict[str, list[float | None]] = {}
    for method in METHODS:
        total, step = rounds.series(method, "total"), rounds.series(method, "step")
        rows[method] = [
            ratio(total, rounds.series(BARE, "total")),
            ratio(step, rounds.series(BARE, "step")),
            ratio(total, rounds.series(REPLICA, "total")),
        ]
    return Report(
        name=name,
        title=title,
        columns=("total / bare", "median step / bare", "total / replica"),
        rows=rows,
        targets=(),
        plotted=("total / bare", "median step / bare"),
        samples=rounds.samples,
        failures=rounds.failures,
        notes=(
            "replica: plain sockets, nothing verified, four images a node; parity: every block verified, "
            "2 (1 + m/k) images a node",
        ),
    )
