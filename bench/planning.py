"""What `save` does on the training thread when there are very many tensors: 10,000 small ones.

The first save plans; the later ones look the plan up. Timed first; then, in the same process, the allocations of the
calls are counted: Python's by tracemalloc, which slows the calls, and torch's by its profiler.
"""

import time
import tracemalloc
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from bench.processes import Failure, launch
from bench.report import Report, Rounds, Target, ratio
from bench.settings import Settings

if TYPE_CHECKING:
    from bench.peers import Method
    from bench.state import Training

OURS = "resilient, memory"
MOST_CALL_S = 0.002


def measure(*, folder: str, method: str, tensors: int, elements: int, saves: int) -> dict[str, Any]:
    """Save a model of many tensors with `method`. Runs in a process of its own."""
    from bench.ours import METHODS
    from bench.state import Many

    training = Many(tensors, elements)
    saver = METHODS[method](training, Path(folder), fsynced=False)
    calls: list[float] = []
    for step in range(saves):
        training.step(saver.updating)
        called = time.perf_counter()
        safe = saver.save(step)
        calls.append(time.perf_counter() - called)
        safe.result()
    python_bytes, torch_bytes = _allocated(training, saver, saves)
    saver.finish()
    later = calls[1:]
    return {
        "first": calls[0],
        "second": calls[1],
        "call": median(later),
        "worst": max(later),
        "python_bytes": python_bytes,
        "torch_bytes": torch_bytes,
    }


def _allocated(training: "Training", saver: "Method", saves: int) -> tuple[int, int]:
    """The most bytes that Python, and torch, allocated in one call of `save`; other threads' allocations included."""
    from torch.profiler import ProfilerActivity, profile

    python = 0
    tracemalloc.start()
    for step in range(saves, saves + 5):
        training.step(saver.updating)
        tracemalloc.reset_peak()
        before, _ = tracemalloc.get_traced_memory()
        safe = saver.save(step)
        python = max(python, tracemalloc.get_traced_memory()[1] - before)
        safe.result()
    tracemalloc.stop()
    training.step(saver.updating)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        safe = saver.save(saves + 5)
    safe.result()
    torch_bytes = sum(max(event.self_cpu_memory_usage, 0) for event in profiled.key_averages())
    return python, torch_bytes


def run(settings: Settings) -> list[Report]:
    rounds = Rounds()
    methods = (OURS, "torch.save", "torch_checkpointing")
    for number in range(settings.rounds):
        rounds.begin()
        for method in settings.turned(methods, number):
            settings.say(f"planning, round {number + 1} of {settings.rounds}: {method}")
            arguments = {
                "method": method,
                "tensors": 500 if settings.smoke else 10_000,
                "elements": 1024,
                "saves": 4 if settings.quick else 12,
            }
            measured = launch(settings.place, "bench.planning:measure", arguments)
            if isinstance(measured, Failure):
                rounds.failed(method, measured.reason)
            else:
                rounds.add(method, measured)
    return [_report(rounds, methods)]


def _report(rounds: Rounds, methods: tuple[str, ...]) -> Report:
    ours = rounds.series(OURS, "call")
    bound, mebibyte = [MOST_CALL_S] * len(ours), [float(1 << 20)] * len(ours)
    rows: dict[str, list[float | None]] = {}
    for method in methods:
        call, first = rounds.series(method, "call"), rounds.series(method, "first")
        allocated = [ratio(rounds.series(method, kind), mebibyte) for kind in ("python_bytes", "torch_bytes")]
        rows[method] = [ratio(call, ours), ratio(first, call), ratio(call, bound), *allocated]
    targets = [
        Target(what="second call / 2 ms", value=ratio(rounds.series(OURS, "second"), bound), bound=1.0),
        Target(what="median of the later calls / 2 ms", value=ratio(ours, bound), bound=1.0),
    ]
    return Report(
        name="planning",
        title="The call of save for 10,000 tensors",
        columns=("call / ours", "first call / later", "call / 2 ms", "Python, MiB a call", "torch, MiB a call"),
        rows=rows,
        targets=targets,
        plotted=("call / ours", "call / 2 ms"),
        samples=rounds.samples,
        failures=rounds.failures,
    )
