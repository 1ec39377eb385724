"""How much of a collective hides behind its matmul, and what the dispatcher makes of shapes of all sizes.

Two hosts with a link of 400 Mbit/s each way between them (network namespaces, so root is needed: `examples/fabric.py`),
gloo, one thread a rank, float32. In one run: the matmul alone, the collective alone, torch's own two calls one after
the other, ours in one piece ("plain") and in chunks, and what the dispatcher chose. The ideal is the longer one of
matmul and collective. A chunked all-reduce can beat that a little, since it overlaps its own two phases.

What is compared with the plain way is timed side by side with it, and so is the plain way once more: by what it differs
from itself ("plain / plain") is noise.
"""

import json
import sys
from pathlib import Path
from statistics import median
from typing import Any

from bench.report import Report, Rounds, Target, ratio
from bench.settings import Settings

_RATE = "400mbit"
_JOB = Path(__file__).with_name("overlap_job.py")
_TIMEOUT_S = 900.0
_DISPATCHED, _PLAIN, _AGAIN = "dispatched", "plain", "plain again"
Shape = tuple[str, int, int, int]

# Matmul and communication of about the same length: here hiding brings most, and is hardest.
_BALANCED: tuple[Shape, ...] = (
    ("matmul_reduce_scatter", 2048, 2048, 2048),
    ("matmul_all_reduce", 2048, 2048, 2048),
    ("matmul_all_reduce", 2048, 4096, 2048),
    ("all_gather_matmul", 2048, 2048, 2048),
)
_GRID: tuple[Shape, ...] = tuple(
    (operation, rows, inner, 1024)
    for operation in ("matmul_reduce_scatter", "matmul_all_reduce", "all_gather_matmul")
    for rows, inner in ((16, 1024), (128, 1024), (512, 1024), (1024, 256), (2048, 4096))
)
_SMOKE: tuple[Shape, ...] = (("matmul_reduce_scatter", 1024, 32, 32), ("matmul_all_reduce", 64, 32, 32))


def run(settings: Settings) -> list[Report]:
    balanced, grid = ((), _SMOKE) if settings.smoke else (_BALANCED, _GRID)
    rounds, choices = Rounds(), dict[str, list[str]]()
    differences = [0.0]
    for number in range(settings.rounds):
        rounds.begin()
        settings.say(f"overlap, round {number + 1}: two hosts, {_RATE}")
        repeats = 1 if settings.smoke else 3 if settings.quick else 7
        for found in _measured([*balanced, *grid], repeats, settings.place.scratch / "kernels"):
            name = _name(*found["call"])
            rounds.add(name, _measures(found["seconds"], found["beside"]))
            choices.setdefault(name, []).append(found["choice"])
            differences.append(found["difference"])
    return [_report(rounds, [_name(*shape) for shape in balanced], choices, max(differences))]


def _measured(shapes: list[Shape], repeats: int, cache: Path) -> list[dict[str, Any]]:
    from examples.fabric import MultiPlane

    asked = json.dumps({"calls": shapes, "repeats": repeats})
    with MultiPlane(hosts=2, rates=[_RATE]) as fabric:
        outcome = fabric.run(
            [sys.executable, "-P", str(_JOB), asked],
            env={"RESILIENT_CACHE_DIR": str(cache), "TORCH_CPP_LOG_LEVEL": "ERROR"},
            timeout_s=_TIMEOUT_S,
        ).check()
    return [json.loads(line) for line in outcome.outputs["0"].splitlines() if line.startswith("{")]


def _measures(seconds: dict[str, float], beside: dict[str, float]) -> dict[str, float]:
    ways = {name: took for name, took in seconds.items() if name == _PLAIN or name.startswith("chunked")}
    return {
        **seconds,
        **{f"{name}, beside": took for name, took in beside.items()},
        "ideal": max(seconds["compute"], seconds["communicate"]),
        "best": min(ways.values()),
    }


def _name(operation: str, rows: int, inner: int, columns: int) -> str:
    return f"{operation} {rows} x {inner} x {columns}"


def _report(rounds: Rounds, balanced: list[str], choices: dict[str, list[str]], difference: float) -> Report:
    rows: dict[str, list[float | None]] = {}
    for name in choices:
        dispatched = rounds.series(name, _DISPATCHED)
        beside = {way: rounds.series(name, f"{way}, beside") for way in (_PLAIN, _DISPATCHED, _AGAIN, "torch")}
        rows[name] = [
            ratio(rounds.series(name, "ideal"), dispatched),
            ratio(rounds.series(name, "ideal"), rounds.series(name, "best")),
            ratio(rounds.series(name, "ideal"), rounds.series(name, _PLAIN)),
            ratio(beside[_DISPATCHED], beside[_PLAIN]),
            ratio(beside[_AGAIN], beside[_PLAIN]),
            ratio(dispatched, rounds.series(name, "best")),
            ratio(beside["torch"], beside[_DISPATCHED]),
        ]
    targets = [
        Target(what=f"{name}: ideal / dispatched", value=rows[name][0], bound=0.85, at_most=False) for name in balanced
    ]
    slowest = [row[3] for row in rows.values() if row[3] is not None]
    noise = [row[4] for row in rows.values() if row[4] is not None]
    regrets = [row[5] for row in rows.values() if row[5] is not None]
    targets += [
        Target(what="the worst of all shapes: dispatched / plain", value=max(slowest, default=None), bound=1.03),
        Target(what="the median of all shapes: dispatched / best", value=_median(regrets), bound=1.03),
    ]
    return Report(
        name="overlap",
        title=f"A matmul and its collective, two hosts, {_RATE}; medians (beside plain: lower quartiles)",
        columns=("ideal / dispatched", "ideal / best", "ideal / plain", "dispatched / plain", "plain / plain",
                 "dispatched / best", "torch's calls / dispatched"),
        rows=rows,
        targets=targets,
        plotted=("ideal / dispatched", "ideal / plain"),
        samples=rounds.samples,
        failures=rounds.failures,
        notes=[
            *(f"{name}: {', '.join(sorted(set(chosen)))}" for name, chosen in choices.items()),
            f"the plain way beside itself, which is noise: {min(noise):.3f} to {max(noise):.3f}",
            f"the largest difference between a dispatched and a plain result: {difference:.2g}",
        ],
    )  # fmt: skip


def _median(values: list[float]) -> float | None:
    return median(values) if values else None
