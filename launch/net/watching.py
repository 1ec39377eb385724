"""What ranks' lanes do right now, from the files that they write (RESILIENT_NET_STATUS, `comms/lanes/status.py`).

A file holds counters; a rate is the difference of two looks. A rank that is killed leaves its file behind: it is old
then, and told as such.
"""

import json
import os
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resilient.comms.lanes.status import EVERY_S, SUFFIX
from resilient.errors import UsageError

OLD_S = 5 * EVERY_S


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """One rank's file: its name, when it was written (seconds since the epoch), and the lanes' report."""

    name: str
    at: float
    report: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A rank's lanes of one path together. `rate` in bytes a second, None at the first look; `factor`: the least.

    `state`: of the lanes, the worst; `failure`: of the whole group.
    """

    group: str
    rank: int
    host: str
    path: int
    peers: int
    state: str
    nbytes: int
    rate: float | None
    factor: float
    age_s: float
    failure: str | None


def look(folder: Path) -> dict[str, Look]:
    """All files there are; what vanishes meanwhile is left out. Raises UsageError for what is no folder of ours."""
    try:
        mode = folder.stat()
        names = sorted(entry.name for entry in folder.iterdir() if entry.name.endswith(SUFFIX))
    except OSError as error:
        raise UsageError(
            f"{folder}: {error.strerror}; start the job with RESILIENT_NET_STATUS={folder} in its environment"
        ) from None
    if mode.st_uid not in (os.getuid(), 0):
        raise UsageError(f"{folder} belongs to another user; what it says is not to be trusted")
    found = {}
    for name in names:
        try:
            with open(folder / name) as file:
                found[name] = Look(name=name, at=os.fstat(file.fileno()).st_mtime, report=json.load(file))
        except (OSError, ValueError):
            continue
    return found


def rows(now: Mapping[str, Look], before: Mapping[str, Look], at: float | None = None) -> list[Row]:
    """By group, rank and path; lanes that have never been opened are left out. `at`: the time, for the files' age."""
    at = time.time() if at is None else at
    found: list[Row] = []
    for name, one in now.items():
        earlier = before.get(name)
        counts = _bytes_by_path(earlier.report["lanes"]) if earlier is not None else {}
        span_s = one.at - earlier.at if earlier is not None else 0.0
        lanes: dict[int, list[Mapping[str, Any]]] = defaultdict(list)
        for lane in one.report["lanes"]:
            if lane["bytes"] or lane["state"] != "closed":
                lanes[lane["path"]].append(lane)
        for path, together in sorted(lanes.items()):
            nbytes = sum(lane["bytes"] for lane in together)
            found.append(
                Row(
                    group=name.partition(".")[0],
                    rank=one.report["rank"],
                    host=one.report["host"],
                    path=path,
                    peers=len(together),
                    state=_state([lane["state"] for lane in together]),
                    nbytes=nbytes,
                    rate=(nbytes - counts.get(path, 0)) / span_s if span_s > 0 else None,
                    factor=min(lane["factor"] for lane in together),
                    age_s=max(0.0, at - one.at),
                    failure=one.report["failure"],
                )
            )
    return sorted(found, key=lambda row: (row.group, row.rank, row.path))


def _bytes_by_path(lanes: Iterable[Mapping[str, Any]]) -> dict[int, int]:
    counts: dict[int, int] = defaultdict(int)
    for lane in lanes:
        counts[lane["path"]] += lane["bytes"]
    return counts


def _state(states: list[str]) -> str:
    """One word, or how many are in each."""
    kinds = {state: states.count(state) for state in sorted(set(states))}
    return states[0] if len(kinds) == 1 else ", ".join(f"{count} {state}" for state, count in kinds.items())
