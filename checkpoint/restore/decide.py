"""Which snapshot to restore, and from which level each rank takes its image. Pure: facts in, decision and reason out.

Every rank reports where its own image of which step can be found (`Facts`); all ranks get all reports and so take the
same decision. The newest step for which every rank has an image wins; the levels are tried from the quickest on.
What has turned out to be damaged is reported too, and the decision is taken again without it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from resilient.errors import LayoutMismatch, LevelFailed, ResilientError, RestoreError

LEVELS = ("memory", "parity", "local", "durable")


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What one rank knows. `steps[level]` are the steps whose image of this rank is there, made by a job of this size.

    `other_worlds` are complete durable steps of jobs with another number of ranks: {step: world size}. `unseen` says of
    each level that could not be looked at why not.
    """

    rank: int
    steps: dict[str, tuple[int, ...]] = field(default_factory=dict)
    other_worlds: dict[int, int] = field(default_factory=dict)
    unseen: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {
            "rank": self.rank,
            "steps": {level: list(steps) for level, steps in self.steps.items()},
            "other_worlds": list(self.other_worlds.items()),
            "unseen": list(self.unseen),
        }

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> "Facts":
        return cls(
            rank=raw["rank"],
            steps={level: tuple(steps) for level, steps in raw["steps"].items()},
            other_worlds=dict(raw["other_worlds"]),
            unseen=tuple(raw["unseen"]),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """`action` is "restore" (then `step` and each rank's level in `levels`), "nothing" or "refuse" (with `error`)."""

    action: str
    reason: str
    step: int = -1
    levels: tuple[str, ...] = ()
    error: type[ResilientError] = RestoreError


Damaged = frozenset[tuple[int, int, str]]
"""(step, rank, level) of images that cannot be used."""


def decide(facts: Sequence[Facts], damaged: Damaged = frozenset(), only: Sequence[str] = LEVELS) -> Decision:
    """The newest step that every rank can restore. `facts[r]` is rank r's; `only` limits the levels."""
    newest_other = max((step for one in facts for step in one.other_worlds), default=-1)
    candidates = sorted({step for one in facts for steps in one.steps.values() for step in steps}, reverse=True)
    for step in candidates:
        levels = [_level(one, step, damaged, only) for one in facts]
        missing = [rank for rank, level in enumerate(levels) if level is None]
        if missing:
            continue
        if newest_other > step:
            break
        return Decision(
            action="restore",
            step=step,
            levels=tuple(level for level in levels if level is not None),
            reason=_reason(step, candidates, levels, damaged),
        )
    if newest_other >= 0:
        size = next(one.other_worlds[newest_other] for one in facts if newest_other in one.other_worlds)
        return Decision(
            action="refuse",
            step=newest_other,
            error=LayoutMismatch,
            reason=f"the newest complete snapshot, step {newest_other}, was made by {size} ranks and this job has "
            f"{len(facts)}: start it with {size} ranks, or use another url",
        )
    if candidates and damaged:
        return Decision(action="refuse", reason=f"no undamaged snapshot is left (damaged: {_named(damaged)})")
    unseen = [text for one in facts for text in one.unseen]
    if unseen:  # to begin anew now would bury whatever is there
        reason = f"nothing was found, but not every level could be looked at: {unseen[0]}"
        return Decision(action="refuse", error=LevelFailed, reason=reason)
    return Decision(action="nothing", reason="no complete snapshot at any level")


def _level(one: Facts, step: int, damaged: Damaged, only: Sequence[str]) -> str | None:
    for level in LEVELS:
        if level in only and step in one.steps.get(level, ()) and (step, one.rank, level) not in damaged:
            return level
    return None


def _reason(step: int, candidates: Sequence[int], levels: Sequence[str | None], damaged: Damaged) -> str:
    used = ", ".join(level for level in LEVELS if level in levels)
    text = f"step {step} is the newest that all ranks hold, from {used}"
    newer = [other for other in candidates if other > step]
    if newer:
        text += f"; newer but incomplete or damaged: {', '.join(map(str, newer[:3]))}"
    return text + (f"; passed over: {_named(damaged)}" if damaged else "")


def _named(damaged: Damaged) -> str:
    return ", ".join(f"step {step} of rank {rank} at level {level}" for step, rank, level in sorted(damaged)[:4])
