"""From samples to what is printed and kept: medians, ratios, targets; a table, a JSON file, a plot.

The machine that measures is shared and drifts, so a ratio is always taken within one round, where both of its sides
ran minutes apart, and the median is taken over the rounds' ratios. Absolute seconds go to the JSON file only.
"""

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

Samples = dict[str, dict[str, list[float | None]]]  # method -> measure -> one value a round


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One figure that was promised. `value` is None when it could not be measured."""

    what: str
    value: float | None
    bound: float
    at_most: bool = True

    @property
    def reached(self) -> bool | None:
        if self.value is None:
            return None
        return self.value <= self.bound if self.at_most else self.value >= self.bound


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What one benchmark found. `rows` are ratios in the order of `columns`; `plotted` names columns for the plot."""

    name: str
    title: str
    columns: Sequence[str]
    rows: Mapping[str, Sequence[float | None]]
    targets: Sequence[Target]
    plotted: Sequence[str]
    samples: Samples
    failures: Mapping[str, str] = field(default_factory=dict)
    notes: Sequence[str] = ()


def ratio(above: Sequence[float | None], below: Sequence[float | None]) -> float | None:
    """The median over the rounds of above / below; rounds in which either is missing or `below` is 0 do not count."""
    ratios = [a / b for a, b in zip(above, below, strict=True) if a is not None and b]
    return median(ratios) if ratios else None


def least(series: Sequence[Sequence[float | None]]) -> list[float | None]:
    """Round by round, the least of several measures; None where none has a value."""
    return [min((value for value in values if value is not None), default=None) for values in zip(*series, strict=True)]


def add(first: Sequence[float | None], second: Sequence[float | None]) -> list[float | None]:
    """Round by round, the sum; None where either is missing."""
    return [None if a is None or b is None else a + b for a, b in zip(first, second, strict=True)]


class Rounds:
    """Collects what the rounds bring, so that every measure of every method has one entry a round."""

    def __init__(self) -> None:
        self.samples: Samples = {}
        self.failures: dict[str, str] = {}
        self._count = 0

    def begin(self) -> None:
        self._count += 1

    def add(self, method: str, measures: Mapping[str, float]) -> None:
        """Call between `begin`s, at most once a round for a method."""
        held = self.samples.setdefault(method, {})
        for measure, value in measures.items():
            series = held.setdefault(measure, [])
            series.extend([None] * (self._count - 1 - len(series)))
            series.append(value)

    def failed(self, method: str, reason: str) -> None:
        self.failures[method] = reason

    def series(self, method: str, measure: str) -> list[float | None]:
        """One value a round; None for rounds without one."""
        held = self.samples.get(method, {}).get(measure, [])
        return [*held, *[None] * (self._count - len(held))]


def machine() -> dict[str, str | int]:
    """What the figures depend on."""
    import torch

    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cores": len(os.sched_getaffinity(0)),
        "memory_GiB": memory_bytes >> 30,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "kernel": platform.release(),
    }


def to_json(report: Report) -> dict[str, Any]:
    targets = [{**asdict(target), "reached": target.reached} for target in report.targets]
    return {**asdict(report), "targets": targets, "machine": machine()}


def write_json(report: Report, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(to_json(report), indent=1) + "\n")


def show(report: Report, console: Console) -> None:
    """Print the table, the notes and each target beside what was measured."""
    table = Table("", title=report.title)
    for column in report.columns:
        table.add_column(column, justify="right")
    for method, values in report.rows.items():
        table.add_row(method, *("–" if value is None else figure(value) for value in values))
    console.print(table)
    for method, reason in report.failures.items():
        console.print(f"  no result for {method}: {reason}", markup=False, highlight=False, soft_wrap=True)
    for note in report.notes:
        console.print(f"  {note}", markup=False, highlight=False, soft_wrap=True)
    for target in report.targets:
        console.print(target_line(target), markup=False, highlight=False, soft_wrap=True)


def target_line(target: Target) -> str:
    sign = "<=" if target.at_most else ">="
    verdict = {True: "REACHED", False: "MISSED", None: "NOT MEASURED"}[target.reached]
    value = "–" if target.value is None else figure(target.value)
    return f"  {verdict:12s} {target.what}: {value} (target {sign} {figure(target.bound)})"


def figure(value: float) -> str:
    """Three significant digits, without exponents."""
    if value == 0 or abs(value) >= 100:
        return f"{value:.0f}"
    digits = 2
    while abs(value) * 10 ** (digits - 2) < 1 and digits < 7:
        digits += 1
    return f"{value:.{digits}f}"
