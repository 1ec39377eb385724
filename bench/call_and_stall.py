"""What one checkpoint costs the training thread: how long the call blocks, and what it adds to the steps that follow.

A state of about 1 GiB trains on; a save is made, then steps run until the checkpoint is safe, then some undisturbed
ones. call: seconds that `save` blocks. stall: what the steps until safe took beyond the median of the undisturbed ones.
safe: seconds from the call until the checkpoint is where it was asked for (fsynced, for a file).
noise: what the scatter of the undisturbed steps alone can do to a stall. A busy machine can make a stall vanish or turn
negative, so in call + stall ours counts as at least the noise, a peer's as at least nothing.
"""

import time
from math import sqrt
from pathlib import Path
from statistics import median
from typing import Any

from bench.peers import ASYNC_PEERS, PEERS
from bench.processes import Failure, launch
from bench.report import Report, Rounds, Target, add, least, ratio
from bench.settings import Settings

QUIET_STEPS = 3
MOST_STEPS = 40
OURS = ("resilient, memory", "resilient, memory + local")
METHODS = (*OURS, *(name for name in PEERS if name != "torch.save + fsync"))


def measure(*, folder: str, method: str, shape: str, saves: int) -> dict[str, Any]:
    """Train and save with one method. Runs in a process of its own."""
    from bench.ours import METHODS
    from bench.state import SHAPES, Training

    training = Training(SHAPES[shape])
    for _ in range(2):
        training.step(METHODS["no checkpoint"](training, Path(folder), fsynced=True).updating)
    saver = METHODS[method](training, Path(folder), fsynced=True)
    quiet: list[float] = []
    saved: list[tuple[float, list[float], float]] = []
    for number in range(saves + 1):
        called = time.perf_counter()
        safe = saver.save(number)
        call = time.perf_counter() - called
        disturbed = [training.step(saver.updating)]
        while not safe.done() and len(disturbed) < MOST_STEPS:
            disturbed.append(training.step(saver.updating))
        saved.append((call, disturbed, safe.result() - called))
        quiet += [training.step(saver.updating) for _ in range(QUIET_STEPS)]
    saver.finish()
    return {"image_bytes": training.image_bytes(), **_summary(saved[1:], quiet[QUIET_STEPS:])}


def _summary(saved: list[tuple[float, list[float], float]], quiet: list[float]) -> dict[str, float]:
    undisturbed = median(quiet)
    steps = median(len(disturbed) for _, disturbed, _ in saved)
    return {
        "call": median(call for call, _, _ in saved),
        "stall": median(sum(disturbed) - len(disturbed) * undisturbed for _, disturbed, _ in saved),
        "safe": median(safe for _, _, safe in saved),
        "step": undisturbed,
        "noise": scatter(quiet) * sqrt(steps / len(saved)),
    }


def scatter(values: list[float]) -> float:
    """The standard deviation that the median absolute deviation of normal values suggests; outliers do not matter."""
    middle = median(values)
    return 1.4826 * median(abs(value - middle) for value in values)


def memcpy_of_tensors(*, folder: str, method: str, shape: str) -> dict[str, float]:
    """Seconds of one copy of the state, tensor by tensor. Runs in a process of its own."""
    from bench.limits import timed
    from bench.ours import METHODS
    from bench.state import SHAPES, Training

    training = Training(SHAPES[shape])
    training.step(METHODS["no checkpoint"](training, Path(folder), fsynced=True).updating)
    copy = METHODS[method](training, Path(folder), fsynced=True)
    copy.save(0)
    return {"memcpy by tensor": median(timed(lambda: copy.save(0)) for _ in range(5)), "bytes": training.image_bytes()}


def run(settings: Settings) -> list[Report]:
    shape = "tiny" if settings.smoke else "large"
    rounds = Rounds()
    for number in range(settings.rounds):
        rounds.begin()
        _limits(settings, shape, rounds)
        for method in settings.turned(METHODS, number):
            settings.say(f"call_and_stall, round {number + 1} of {settings.rounds}: {method}")
            arguments = {"method": method, "shape": shape, "saves": 2 if settings.quick else 4}
            measured = launch(settings.place, "bench.call_and_stall:measure", arguments)
            if isinstance(measured, Failure):
                rounds.failed(method, measured.reason)
            else:
                rounds.add(method, measured)
    return [_report(rounds)]


def _limits(settings: Settings, shape: str, rounds: Rounds) -> None:
    """The limits of this round, for as many bytes as the state has."""
    arguments: dict[str, Any] = {"method": "one memcpy", "shape": shape}
    copied = launch(settings.place, "bench.call_and_stall:memcpy_of_tensors", arguments)
    if isinstance(copied, Failure):
        rounds.failed("limits", copied.reason)
        return
    size = {"size_bytes": int(copied["bytes"]), "times": 1 if settings.quick else 3}
    flat = launch(settings.place, "bench.limits:measure", size)
    if isinstance(flat, Failure):
        rounds.failed("limits", flat.reason)
    else:
        rounds.add("limits", {**copied, **flat})


def _report(rounds: Rounds) -> Report:
    memcpy, raw = rounds.series("limits", "memcpy"), rounds.series("limits", "raw write")
    rows: dict[str, list[float | None]] = {}
    for method in METHODS:
        call, safe = rounds.series(method, "call"), rounds.series(method, "safe")
        stall = rounds.series(method, "stall")
        step = rounds.series(method, "step")
        cost = cost_of(rounds, method)
        rows[method] = [ratio(call, memcpy), ratio(stall, memcpy), ratio(cost, memcpy), ratio(cost, step)]
        rows[method] += [ratio(safe, raw), ratio(rounds.series(method, "noise"), memcpy)]
    return Report(
        name="call_and_stall",
        title="One checkpoint of about 1 GiB: what it costs the training thread",
        columns=(
            "call / memcpy",
            "stall / memcpy",
            "call + stall / memcpy",
            "call + stall / step",
            "safe / raw write",
            "noise / memcpy",
        ),
        rows=rows,
        targets=_targets(rounds),
        plotted=("call / memcpy", "call + stall / memcpy", "safe / raw write"),
        samples=rounds.samples,
        failures=rounds.failures,
        notes=(
            f"memcpy tensor by tensor / flat: {ratio(rounds.series('limits', 'memcpy by tensor'), memcpy) or 0:.2f}; "
            f"raw write / memcpy: {ratio(raw, memcpy) or 0:.1f}; raw: O_DIRECT + fsync at its best queue depth",
            "torch.save, safetensors and torch_checkpointing do not fsync: a thread did it for `safe`",
        ),
    )


def cost_of(rounds: Rounds, method: str) -> list[float | None]:
    """call + stall, round by round; ours has at least the noise as its stall, a peer at least nothing."""
    floors = [(value or 0.0) if method in OURS else 0.0 for value in rounds.series(method, "noise")]
    measured = rounds.series(method, "stall")
    stall = [None if value is None else max(value, floor) for value, floor in zip(measured, floors, strict=True)]
    return add(rounds.series(method, "call"), stall)


def _targets(rounds: Rounds) -> list[Target]:
    slowest_call = rounds.series("torch.save", "call")
    best = least([cost_of(rounds, peer) for peer in ASYNC_PEERS])
    targets = []
    for method in OURS:
        call = ratio(rounds.series(method, "call"), slowest_call)
        targets.append(Target(what=f"call of {method} / call of torch.save", value=call, bound=1 / 200))
        cost = ratio(cost_of(rounds, method), best)
        targets.append(Target(what=f"call + stall of {method} / best asynchronous peer's", value=cost, bound=1 / 4))
    return targets
