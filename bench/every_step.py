"""A checkpoint at every step, end to end: what 20 steps take with each method, against the bare steps.

A GPT of 48 M parameters with AdamW (about 570 MB a checkpoint) trains; each step is followed by one save, and the time
runs until the last is safe. Peers that do not fsync are left so; one extra row shows torch.save with it. Twice: one
process with two threads, and two ranks of one thread under torchrun.
"""

import time
from pathlib import Path
from statistics import median
from typing import Any

from bench.peers import PEERS
from bench.processes import Failure, launch
from bench.report import Report, Rounds, Target, least, ratio
from bench.settings import Settings

BARE, MEMCPY = "no checkpoint", "one memcpy"
MEMORY, LOCAL = "resilient, memory", "resilient, memory + local"
METHODS = (BARE, MEMCPY, MEMORY, LOCAL, *PEERS)


def measure(*, folder: str, method: str, shape: str, steps: int) -> dict[str, Any]:
    """Train with a save after every step. Runs in a process of its own, or in one a rank."""
    from bench.ours import METHODS
    from bench.state import SHAPES, Training
    from resilient.errors import SnapshotSkipped

    training = Training(SHAPES[shape])
    for _ in range(2):
        training.step(METHODS[BARE](training, Path(folder), fsynced=False).updating)
    saver = METHODS[method](training, Path(folder), fsynced=False)
    saver.save(0).result()  # plans, allocates, starts processes: not counted, for any method
    training.step(saver.updating)
    began = time.perf_counter()
    took: list[float] = []
    calls: list[float] = []
    saves = []
    for step in range(1, steps + 1):
        stepped = training.step(saver.updating)
        called = time.perf_counter()
        saves.append(saver.save(step))
        calls.append(time.perf_counter() - called)
        took.append(stepped + calls[-1])
    safe = sum(not isinstance(future.exception(), SnapshotSkipped) for future in saves)
    total = time.perf_counter() - began
    saver.finish()
    return {"total": total, "step": median(took), "call": median(calls), "safe": safe / steps}


def run(settings: Settings) -> list[Report]:
    return [
        _variant(settings, "every_step", "one process, two threads", ranks=1, threads=2),
        _variant(settings, "every_step_2_ranks", "two ranks, one thread each", ranks=2, threads=1),
    ]


def _variant(settings: Settings, name: str, words: str, *, ranks: int, threads: int) -> Report:
    rounds = Rounds()
    steps = 6 if settings.quick else 20
    for number in range(settings.rounds):
        rounds.begin()
        for method in settings.turned(METHODS, number):
            settings.say(f"{name}, round {number + 1} of {settings.rounds}: {method}")
            arguments = {"method": method, "shape": "tiny" if settings.smoke else "medium", "steps": steps}
            measured = launch(settings.place, "bench.every_step:measure", arguments, ranks=ranks, threads=threads)
            if isinstance(measured, Failure):
                rounds.failed(method, measured.reason)
            else:
                rounds.add(method, measured)
    return report(rounds, name, f"A checkpoint at every one of {steps} steps: {words}")


def report(rounds: Rounds, name: str, title: str) -> Report:
    bare, copied = rounds.series(BARE, "total"), rounds.series(MEMCPY, "total")
    bare_step = rounds.series(BARE, "step")
    rows: dict[str, list[float | None]] = {}
    for method in METHODS:
        total, step = rounds.series(method, "total"), rounds.series(method, "step")
        safe = rounds.series(method, "safe")
        rows[method] = [
            ratio(total, bare),
            ratio(step, bare_step),
            ratio(total, copied),
            ratio(safe, [1.0] * len(safe)),
        ]
    fastest_peer = least([rounds.series(peer, "total") for peer in PEERS])
    targets = [
        Target(what=f"{MEMORY} / (bare + memcpy)", value=ratio(rounds.series(MEMORY, "total"), copied), bound=1.10),
        Target(what=f"{LOCAL} / bare", value=ratio(rounds.series(LOCAL, "total"), bare), bound=1.40),
    ]
    for method in (MEMORY, LOCAL):
        value = ratio(rounds.series(method, "total"), fastest_peer)
        targets.append(Target(what=f"{method} / fastest peer", value=value, bound=1.0))
    return Report(
        name=name,
        title=title,
        columns=("total / bare", "median step / bare", "total / (bare + memcpy)", "safe of all"),
        rows=rows,
        targets=targets,
        plotted=("total / bare", "median step / bare"),
        samples=rounds.samples,
        failures=rounds.failures,
        notes=("safe of all: the part of the saves that were not skipped; the others left a checkpoint each",),
    )
