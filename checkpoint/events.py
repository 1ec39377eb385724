"""What each rank leaves for its launcher to read: that it is there, what it restored, its last step, why it stopped.

A launcher names a folder in RESILIENT_EVENTS, a new one for each life of the job; without that nothing is written.
Each rank has two files there: rank_00003.jsonl, one JSON line for each thing that happened, and rank_00003.step, two
numbers that `saved` writes through a memory map, so that a step costs no system call. A launcher only reads
(`read_events`); what it reads may be a moment old. Never imports torch.
"""

import json
import logging
import mmap
import os
import struct
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_log = logging.getLogger("resilient")
VARIABLE = "RESILIENT_EVENTS"
_NUMBERS = struct.Struct("<qq")  # the step of the last save; when, on the clock that all processes of a node share
_NONE = -1
_MOST_PROBLEMS = 4


class Events:
    """One rank's side. Nothing here raises: a launcher that cannot be told must not cost the job a step."""

    def __init__(self, folder: Path | None, rank: int) -> None:
        """`folder`: None where nobody wants to know."""
        self._rank = rank
        self._lines: Path | None = None
        self._map: mmap.mmap | None = None
        if folder is None:
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._map = _mapped(_step_file(folder, rank))
            self._lines = _lines_file(folder, rank)
        except OSError as error:
            _log.warning("rank %d: the launcher will not hear of this rank: %s", rank, error)

    @staticmethod
    def of(environment: Mapping[str, str], rank: int) -> "Events":
        """Those that the launcher asks for."""
        folder = environment.get(VARIABLE)
        return Events(Path(folder) if folder else None, rank)

    def saved(self, step: int) -> None:
        """`save(step)` was called: the step is done, and its snapshot under way."""
        if self._map is not None:
            _NUMBERS.pack_into(self._map, 0, step, time.monotonic_ns())

    def joined(self, world_size: int, node: str) -> None:
        """This rank has come together with all others."""
        self.tell("joined", world_size=world_size, node=node)

    def restored(self, step: int | None, levels: Mapping[int, str], seconds: float) -> None:
        """A restore has ended: with this step, or with none. `levels`: as in `Restored`."""
        self.tell("restored", step=step, levels={str(rank): level for rank, level in levels.items()}, seconds=seconds)

    def stopped(self, step: int, problems: Sequence[str] = (), *, durable: bool) -> None:
        """All ranks end now, as agreed, with this step safe: durable, or in memory; `problems`: why it may not be."""
        self.tell("stopped", step=step, durable=durable, problems=list(problems[:_MOST_PROBLEMS]))

    def tell(self, event: str, **facts: Any) -> None:
        """Something that happens once in a while; `facts` are JSON values. Blocks for a small write."""
        if self._lines is None:
            return
        line = json.dumps({"event": event, "rank": self._rank, "pid": os.getpid(), "time": time.time(), **facts})
        try:
            with self._lines.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            _log.warning("rank %d: the launcher will not hear of %s: %s", self._rank, event, error)

    def close(self) -> None:
        """Nothing more is told. Safe to repeat."""
        if self._map is not None:
            self._map.close()
            self._map = None
        self._lines = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Heard:
    """What one rank has told. `saved_at_s` is on the monotonic clock of its node."""

    rank: int
    step: int | None
    saved_at_s: float | None
    events: tuple[Mapping[str, Any], ...]

    def last(self, event: str) -> Mapping[str, Any] | None:
        """The newest event of that name."""
        return next((told for told in reversed(self.events) if told.get("event") == event), None)


def read_events(folder: Path) -> dict[int, Heard]:
    """What the ranks have told so far, by rank; of a line that is still being written nothing. Does not raise."""
    heard: dict[int, Heard] = {}
    with suppress(OSError):
        for path in sorted(folder.glob("rank_*.step")):
            with suppress(OSError, ValueError, struct.error):
                rank = int(path.stem.removeprefix("rank_"))
                step, at_ns = _NUMBERS.unpack_from(path.read_bytes())
                heard[rank] = Heard(
                    rank=rank,
                    step=None if step == _NONE else step,
                    saved_at_s=None if step == _NONE else at_ns / 1e9,
                    events=tuple(_lines_of(_lines_file(folder, rank))),
                )
    return heard


def _lines_of(path: Path) -> list[Mapping[str, Any]]:
    if not path.exists():
        return []
    whole = path.read_text(encoding="utf-8").rpartition("\n")[0]
    return [json.loads(line) for line in whole.splitlines()]


def _mapped(path: Path) -> mmap.mmap:
    """The step file, mapped; made with no step in it if it is not there."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        if os.fstat(fd).st_size < _NUMBERS.size:
            os.pwrite(fd, _NUMBERS.pack(_NONE, 0), 0)
        return mmap.mmap(fd, _NUMBERS.size)
    finally:
        os.close(fd)


def _step_file(folder: Path, rank: int) -> Path:
    return folder / f"rank_{rank:05d}.step"


def _lines_file(folder: Path, rank: int) -> Path:
    return folder / f"rank_{rank:05d}.jsonl"
