"""Catalogs of 4,096 ranks: how large they are, and how long one rank of another job plans with them.

The job is simulated (`big_job.py`): 2,000 tensors, cut in the ways that there are. Planning is what a rank does before
it reads: it parses the catalog, and finds where all that it needs lies and goes. Targets: half as many ranks, and 64.
Of the records it then reads those of the images that it needs. Where there is no catalog, one rank hears most of the
others to make it. Times are those of the processor: one thread that only computes.
"""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.processes import Failure, launch
from bench.report import Report, Rounds, Target, ratio
from bench.settings import Settings

if TYPE_CHECKING:
    from resilient.checkpoint.catalog.index import Index

MOST_BYTES = 50e6
MOST_PLANNING_S = 1.0
_RECORDS = ("records of a rank, MB", "all records, MB", "made anew: heard, MB", "s")
TARGETS = {"half the ranks": (4, 8), "64 ranks": (8, 512)}  # tensor parallelism, and how many ranks become one of DP


def measure(*, folder: str, method: str, ranks: int, tensors: int) -> dict[str, Any]:
    """One way of cutting. Runs in a process of its own."""
    import numpy as np
    import torch

    from bench.big_job import boxes_of_rank, index_of, record_bytes, shapes
    from resilient.checkpoint.catalog.index import parse_index
    from resilient.checkpoint.catalog.native import native_catalog
    from resilient.checkpoint.restore.boxes import BoxScatter, Wanted, filling_of

    path = Path(folder, "catalog.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    index = index_of(method, ranks, tensors)
    path.write_text(index.text())
    began = time.process_time()
    catalog = native_catalog(parse_index(path.read_bytes(), str(path)))
    found: dict[str, Any] = {"bytes": path.stat().st_size, "parse": time.process_time() - began}
    for target, (tp, fewer) in TARGETS.items():
        replicas = max(1, ranks // fewer)
        boxes = boxes_of_rank(shapes(tensors), tp * replicas // 2 + 1, tp, replicas)
        locals_ = {name: torch.empty(sizes, device="meta") for name, (_, sizes) in boxes.items()}
        began = time.process_time()
        begins = np.array([file.begins for file in catalog.files], dtype=np.int64)
        wanted = Wanted(
            filling_of(catalog.tensors[f"model.{name}"], locals_[name], (tuple(at), tuple(sizes)), begins)
            for name, (at, sizes) in boxes.items()
        )
        wanted.blocks({image: catalog.files[image].nbytes for image in wanted.images})
        BoxScatter(wanted)
        found |= {f"{target}, plan": time.process_time() - began, f"{target}, runs": len(wanted.runs)}
        images = wanted.images
        some = images[:: max(1, len(images) // 8)]  # all are alike
        each = sum(record_bytes(index, rank) for rank in some) / len(some)
        found[f"{target}, records"] = each * len(images)
    found["all records"] = record_bytes(index, ranks // 2) * ranks
    found |= _made(index)
    return found


def _made(index: "Index") -> dict[str, float]:
    """Where there is no catalog: what the rank that hears most of half as many hears, and computes, to make it."""
    from bench.big_job import part_of
    from resilient.checkpoint.catalog.index import merged, parse_index

    held, end, heard, seconds = part_of(index, 0, 2), 2, 0, 0.0
    while end < index.world_size:
        sent = part_of(index, end, min(2 * end, index.world_size)).text()
        heard += len(sent)
        began = time.process_time()
        held = merged([held, parse_index(sent, "a part")])
        seconds += time.process_time() - began
        end *= 2
    assert held.text() == index.text()
    return {"heard": heard, "merging": seconds}


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

        parsing = of("parse")
        rows[method] = [of("bytes", 1e6), parsing]
        targets.append(Target(what=f"{method}: size of the catalog / 50 MB", value=of("bytes", MOST_BYTES), bound=1.0))
        for target in TARGETS:
            planning = of(f"{target}, plan")
            together = None if planning is None or parsing is None else planning + parsing
            what = f"{method}: parsing, and planning for {target} / 1 s"
            targets.append(Target(what=what, value=together, bound=MOST_PLANNING_S))
            rows[method] += [planning, of(f"{target}, runs")]
        rows[method] += [of(f"{half}, records", 1e6), of("all records", 1e6), of("heard", 1e6), of("merging")]
    return Report(
        name="catalog",
        title=f"Catalogs of {ranks:,} ranks and {tensors:,} tensors; what one rank of another job plans",
        columns=("MB", "parse, s", f"{half}: s", "runs", f"{few}: s", "runs", *_RECORDS),
        rows=rows,
        targets=targets,
        plotted=("MB", "parse, s", f"{half}: s", f"{few}: s"),
        samples=rounds.samples,
        failures=rounds.failures,
    )
