"""How commands speak: tables or one JSON document on the standard output, progress and remarks on the other.

Exit codes are a contract with scripts (`docs/cli.md`). Progress is shown only where somebody looks: on a terminal.
"""

import json
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import IntEnum
from typing import Any

from resilient.errors import DamagedImage, NewerFormat, NotACheckpoint, RestoreError, UsageError

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
_AGES = ((86400, "d"), (3600, "h"), (60, "min"))
_WIDEST = 500  # columns of a table that goes to a file or a pipe: nothing is folded or cut there


class Exit(IntEnum):
    """What a command ends with."""

    OK = 0
    FOUND = 1  # damage, or a difference: what was looked for is there
    USAGE = 2
    NOT_THERE = 3  # nothing is there, or no checkpoint that this version reads
    FAILED = 4  # a disk or a service could not do its part
    INTERRUPTED = 130


def exit_code(error: BaseException) -> Exit:
    """The code for an error that ends a command."""
    if isinstance(error, DamagedImage):
        return Exit.FOUND
    if isinstance(error, FileNotFoundError | NotACheckpoint | NewerFormat):
        return Exit.NOT_THERE
    if isinstance(error, UsageError | RestoreError | FileExistsError):
        return Exit.USAGE  # RestoreError: what is there does not fit what was asked for
    return Exit.FAILED


class Enough(Exception):
    """Whoever read the output (`| head`) wants no more of it."""


def tell(text: str) -> None:
    _write(f"{text}\n")


def tell_json(value: object) -> None:
    """One document, on one line where the output is read by a program, indented on a terminal.

    JSON has no infinity and no NaN, which hyperparameters may be: they are words.
    """
    indent = 2 if sys.stdout.isatty() else None
    tell(json.dumps(_in_words(value), indent=indent, default=str, allow_nan=False))


def remark(text: str) -> None:
    """To whoever watches, not part of the result."""
    sys.stderr.write(f"{text}\n")


def _in_words(value: object) -> object:
    """`value` with words for numbers that JSON does not have."""
    if isinstance(value, Mapping):
        return {key: _in_words(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_in_words(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else "infinity" if value > 0 else "-infinity"
    return value


def tell_table(columns: Sequence[str], rows: Sequence[Sequence[object]], right: Sequence[str] = ()) -> None:
    """`right`: the columns of numbers. Drawn to the terminal's width; in a pipe every row is one whole line."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(width=None if sys.stdout.isatty() else _WIDEST, highlight=False)
    table = Table(box=None, header_style="bold" if sys.stdout.isatty() else "", pad_edge=False)
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))
    with console.capture() as captured:
        console.print(table)
    _write("".join(f"{line.rstrip()}\n" for line in captured.get().splitlines()))


def _write(text: str) -> None:
    try:
        sys.stdout.write(text)
    except BrokenPipeError:
        raise Enough from None


def tell_facts(facts: Mapping[str, object]) -> None:
    """Names and values, one a line; empty ones are left out."""
    shown = {name: value for name, value in facts.items() if value not in (None, "", (), [])}
    width = max(map(len, shown), default=0)
    for name, value in shown.items():
        tell(f"{name:<{width}}  {value}")


def size_text(nbytes: int) -> str:
    value, number = float(nbytes), 0
    while value >= 1024 and number < len(_UNITS) - 1:
        value, number = value / 1024, number + 1
    return f"{value:.1f} {_UNITS[number]}" if number else f"{nbytes} B"


def age_text(seconds: float | None) -> str:
    if seconds is None:
        return ""
    for length, unit in _AGES:
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"


def ranges_text(numbers: Sequence[int]) -> str:
    """Ascending numbers in short: "0-3, 7"."""
    runs: list[tuple[int, int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1] = (runs[-1][0], number)
        else:
            runs.append((number, number))
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


class Counter:
    """Counts bytes for a bar. `add` may be called from any thread."""

    def __init__(self, bar: Any, task: Any) -> None:
        self._bar, self._task = bar, task

    def add(self, nbytes: int) -> None:
        if self._bar is not None:
            self._bar.update(self._task, advance=nbytes)

    def total(self, nbytes: int) -> None:
        """How much there is to do, where that was not known before."""
        if self._bar is not None:
            self._bar.update(self._task, total=nbytes)


@contextmanager
def progress(what: str, total_bytes: int | None) -> Iterator[Counter]:
    """A bar on the standard error output as long as the context lasts; nothing where that is no terminal."""
    if not sys.stderr.isatty():
        yield Counter(None, None)
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True))
    with Progress(
        *columns, TransferSpeedColumn(), TimeRemainingColumn(), console=Console(stderr=True), transient=True
    ) as bar:
        yield Counter(bar, bar.add_task(what, total=total_bytes))


def seconds_since(moment: float | None) -> float | None:
    """Of a time of the wall clock, as files have it."""
    return None if moment is None else max(0.0, time.time() - moment)
