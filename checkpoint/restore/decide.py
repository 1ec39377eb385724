"""Which snapshot to restore, and from which level each rank takes its image. Pure: facts in, decision and reason out.

Every rank reports where its own image of which step can be found (`Facts`); all ranks get all reports and so take the
same decision. The newest step for which every rank has an image wins; the levels are tried from the quickest on.
What has turned out to be damaged is reported too, and the decision is taken again without it.

A snapshot that a job of another size has made is *reshaped*: every image of it has to be in reach of some rank, and
each rank takes from them what it needs (`reshape.py`).
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from resilient.errors import LevelFailed, ResilientError, RestoreError

LEVELS = ("memory", "parity", "local", "durable")


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What one rank knows. `steps[level]` are the steps whose image of this rank is there, made by a job of this size.

    `other_worlds` are complete durable steps of jobs with another number of ranks: {step: world size}, and `others` all
    single images of such jobs on this rank's node: (step, world size, rank, level). `unseen` says of each level that
    could not be looked at why not.
    """

    rank: int
    steps: dict[str, tuple[int, ...]] = field(default_factory=dict)
    other_worlds: dict[int, int] = field(default_factory=dict)
    others: tuple[tuple[int, int, int, str], ...] = ()
    unseen: tuple[str, ...] = ()

    def only(self, steps: Collection[int]) -> "Facts":
        """What is left where no other steps count."""
        return replace(
            self,
            steps={level: tuple(step for step in held if step in steps) for level, held in self.steps.items()},
            other_worlds={step: size for step, size in self.other_worlds.items() if step in steps},
            others=tuple(one for one in self.others if one[0] in steps),
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "rank": self.rank,
            "steps": {level: list(steps) for level, steps in self.steps.items()},
            "other_worlds": list(self.other_worlds.items()),
            "others": [list(one) for one in self.others],
            "unseen": list(self.unseen),
        }

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> "Facts":
        return cls(
            rank=raw["rank"],
            steps={level: tuple(steps) for level, steps in raw["steps"].items()},
            other_worlds=dict(raw["other_worlds"]),
            others=tuple((step, size, rank, level) for step, size, rank, level in raw["others"]),
            unseen=tuple(raw["unseen"]),
        )


@dataclass(frozen=True, slots=True)
class Place:
    """Where one image of another job's snapshot is: the level, and the ranks that have it there (all: durable)."""

    level: str
    holders: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """`action` is "restore" (then `step` and each rank's level in `levels`), "nothing" or "refuse" (with `error`).

    Or "reshape": `places[r]` is where the image of rank r of the job that made the snapshot is.
    """

    action: str
    reason: str
    step: int = -1
    levels: tuple[str, ...] = ()
    places: tuple[Place, ...] = ()
    error: type[ResilientError] = RestoreError


Damaged = frozenset[tuple[int, int, str]]
"""(step, rank, level) of images that cannot be used; of another job's images the level is `level_of_other`."""


def level_of_other(level: str, world_size: int) -> str:
    """How `Damaged` calls a level of images that were made by a job of that many ranks."""
    return f"{level}, of {world_size} ranks"


def decide(facts: Sequence[Facts], damaged: Damaged = frozenset(), only: Sequence[str] = LEVELS) -> Decision:
    """The newest step that every rank can restore. `facts[r]` is rank r's; `only` limits the levels."""
    other = _reshape(facts, damaged, only)
    candidates = sorted({step for one in facts for steps in one.steps.values() for step in steps}, reverse=True)
    for step in candidates:
        levels = [_level(one, step, damaged, only) for one in facts]
        missing = [rank for rank, level in enumerate(levels) if level is None]
        if missing:
            continue
        if other is not None and other.step > step:
            return other
        return Decision(
            action="restore",
            step=step,
            levels=tuple(level for level in levels if level is not None),
            reason=_reason(step, candidates, levels, damaged),
        )
    if other is not None:
        return other
    if damaged:
        return Decision(action="refuse", reason=f"no undamaged snapshot is left (damaged: {_named(damaged)})")
    unseen = [text for one in facts for text in one.unseen]
    if unseen:  # to begin anew now would bury whatever is there
        reason = f"nothing was found, but not every level could be looked at: {unseen[0]}"
        return Decision(action="refuse", error=LevelFailed, reason=reason)
    return Decision(action="nothing", reason="no complete snapshot at any level")


def _reshape(facts: Sequence[Facts], damaged: Damaged, only: Sequence[str]) -> Decision | None:
    """The newest snapshot of a job of another size of which every image is in reach."""
    worlds = {(step, size) for one in facts for step, size in one.other_worlds.items()}
    worlds |= {(step, size) for one in facts for step, size, _, _ in one.others}
    holders: dict[tuple[int, int, int, str], list[int]] = {}
    for one in facts:
        for each in one.others:
            holders.setdefault(each, []).append(one.rank)
    for step, size in sorted(worlds, reverse=True):
        durable = any(one.other_worlds.get(step) == size for one in facts)
        places = [_place(step, size, rank, durable, holders, damaged, only) for rank in range(size)]
        if None not in places:
            found = tuple(place for place in places if place is not None)
            used = ", ".join(level for level in LEVELS if level in {place.level for place in found})
            return Decision(
                action="reshape",
                step=step,
                places=found,
                reason=f"step {step} is the newest that is complete, made by {size} ranks and taken by {len(facts)}, "
                f"from {used}" + (f"; passed over: {_named(damaged)}" if damaged else ""),
            )
    return None


def _place(
    step: int,
    size: int,
    rank: int,
    durable: bool,
    holders: Mapping[tuple[int, int, int, str], list[int]],
    damaged: Damaged,
    only: Sequence[str],
) -> Place | None:
    for level in LEVELS:
        if level not in only or (step, rank, level_of_other(level, size)) in damaged:
            continue
        if level == "durable":
            return Place(level, ()) if durable else None
        found = holders.get((step, size, rank, level), [])
        if found and level == "parity":  # each can get it from the other nodes: one of them, another for each image
            return Place(level, (found[rank % len(found)],))
        if found:
            return Place(level, tuple(found))
    return None


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
