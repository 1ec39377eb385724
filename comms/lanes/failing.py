"""Whose fault it is, and that all ranks say the same: pure.

Ranks may find several failures at about the same time: each tells all, passes on what it hears, and takes the worst of
what it has heard within SETTLE_S, which is far longer than a message takes. So all end with the same one.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from resilient.comms.lanes.messages import POINT_TO_POINT, Failure

SETTLE_S = 0.05
_WORST_FIRST = ("gone", "mismatch", "late", "aborted")


class Verdict:
    """What a rank knows of its group's failure."""

    def __init__(self) -> None:
        self.failure: Failure | None = None
        self.final = False
        self.at = float("inf")

    def take(self, failure: Failure, now: float) -> bool:
        """Whether it counts, and so has to be passed on."""
        if self.final or (self.failure is not None and _order(failure) >= _order(self.failure)):
            return False
        if self.failure is None:
            self.at = now + SETTLE_S
        self.failure = failure
        return True

    def settle(self, now: float) -> Failure | None:
        """The failure, once there will be no other."""
        if now >= self.at:
            self.final = True
        return self.failure if self.final else None


def _order(failure: Failure) -> tuple[int, str]:
    kind = _WORST_FIRST.index(failure.kind) if failure.kind in _WORST_FIRST else len(_WORST_FIRST)
    return kind, failure.text


@dataclass(frozen=True, slots=True, kw_only=True)
class Awaited:
    """A rank that keeps another waiting. `begun`: the last operation that it has begun, by what it said, None before it
    said anything; `waits`: whether it waits for others itself."""

    rank: int
    host: str
    silent_s: float
    begun: int | None
    waits: bool


def blame(operation: int, awaited: Sequence[Awaited], timeout_s: float, silent_s: float) -> Failure | None:
    """Who is at fault for an operation that has run out of time; None where that is for others to know.

    The text does not depend on who says it.
    """
    for one in awaited:
        if one.silent_s > silent_s:
            text = "it has been silent on all its lanes"
            return gone(one.rank, one.host, text)
    for one in awaited if operation < POINT_TO_POINT else ():
        if one.begun is not None and one.begun < operation and not one.waits:
            text = f"rank {one.rank} ({one.host}) has not come to operation {one.begun + 1} within {timeout_s:g} s"
            return Failure("late", text, one.rank, one.host)
    return None


def gone(rank: int, host: str, why: str) -> Failure:
    return Failure("gone", f"rank {rank} ({host}) is gone: {why}. Make a new group without it", rank, host)
