"""Catalogs of 4,096 ranks: how large they are, and how long one rank of another job plans with them.

The job is simulated (`big_job.py`): 2,000 tensors, cut in the ways that there are. Planning is what a rank does before
it reads: it parses the catalog, and finds the byte ranges of all that it needs. Targets: half as many ranks, and 64.
Times are those of the processor: one thread that only computes.
"""

import time
from pathlib import Path
from typing import Any

from bench.processes import Failure, launch
from bench.report import Report, Rounds, Target, ratio
from bench.settings import Settings

MOST_BYTES = 50e6
MOST_PLANNING_S = 1.0
TARGETS = {"half the ranks": (4, 8), "64 ranks": (8, 512)}  # tensor parallelism, and how many ranks become one of DP


def measure(*, folder: str, method: str, ranks: int, tensors: int) -> dict[str, Any]:
    """One way of cutting. Runs in a process of its own."""
    from bench.big_job import boxes_of_rank, catalog_of, shapes
    from resilient.checkpoint.catalog.catalog import parse_catalog
    from resilient.checkpoint.catalog.meet import parts_of

    path = Path(folder, "catalog.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(catalog_of(method, ranks, tensors).text())
    began = time.process_time()
    catalog = parse_catalog(path.read_bytes(), str(path))
    found: dict[str, Any] = {"bytes": path.stat().st_size, "parse": time.process_time() - began}
    for target, (tp, fewer) in TARGETS.items():
        replicas = max(1, ranks // fewer)
        began = time.process_time()
        boxes = boxes_of_rank(shapes(tensors), tp * replicas // 2 + 1, tp, replicas)
        parts = sum(len(parts_of(catalog.tensors[f"model.{name}"], *box)) for name, box in boxes.items())
        found |= {f"{target}, plan": time.process_time() - began, f"{target}, parts": parts}
    return found


def run(settings: Settings) -> list[Report]:
    from bench.big_job import WAYS

    ranks, tensors = (64, 60) if settings.smoke else (4096, 2000)
    rounds = Rounds()
    for number in range(settings.rounds):
        rounds.begin()
        for method in settings.turned(tuple(WAYS), number):
            settings.say(f"catalog, round {number + 1} of {settings.rounds}: {method}")
            arguments = {"method": method, "ranks": ranks, "tensors": tensors}
            measured = launch(settings.place, "bench.catalog:measure", arguments)
            if isinstance(measured, Failure):
                rounds.failed(method, measured.reason)
            else:
                rounds.add(method, measured)
    return [_report(rounds, tuple(WAYS), ranks, tensors)]


def _report(rounds: Rounds, methods: tuple[str, ...], ranks: int, tensors: int) -> Report:
    half, few = TARGETS
    rows: dict[str, list[float | None]] = {}
    targets: list[Target] = []
    for method in methods:

        def of(measure: str, unit: float = 1.0, method: str = method) -> float | None:
            series = rounds.series(method, measure)
            return ratio(series, [unit] * len(series))

        planning = of(f"{half}, plan")
        rows[method] = [of("bytes", 1e6), of("parse"), planning, of(f"{half}, parts"), of(f"{few}, plan")]
        rows[method].append(of(f"{few}, parts"))
        targets += [
            Target(what=f"{method}: size of the catalog / 50 MB", value=of("bytes", MOST_BYTES), bound=1.0),
            Target(what=f"{method}: planning for {half} / 1 s", value=planning, bound=MOST_PLANNING_S),
        ]
    return Report(
        name="catalog",
        title=f"Catalogs of {ranks:,} ranks and {tensors:,} tensors; what one rank of another job plans",
        columns=("MB", "parse, s", f"{half}: s", "parts", f"{few}: s", "parts"),
        rows=rows,
        targets=targets,
        plotted=("MB", "parse, s", f"{half}: s"),
        samples=rounds.samples,
        failures=rounds.failures,
    )
