"""Which schedule a collective takes: the one whose bounds, as the planner states them, add up to the least time.

Pure, and alike on all ranks, which have to take the same: so it looks at the fabric as it was agreed upon at the start,
not at what each rank measures now (that only moves the pieces). A step also costs STEP_S: the way there and back, and
waking up for it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from resilient.comms.certificate import bound
from resilient.comms.collectives import schedule
from resilient.comms.collectives.schedule import Region, Script
from resilient.comms.fabric import Fabric

STEP_S = 0.001  # of each step: a guess
_MOST_DIRECT = 64  # ranks: beyond, connections to everybody cost more than steps


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What is done, and why, for the log."""

    action: str
    reason: str


def quickest(fabric: Fabric, candidates: Sequence[Script]) -> tuple[Script, Decision]:
    """The script that should take the least time; the first of those that are equal."""
    times = [sum(bound(fabric, turn.flows)[0] + STEP_S for turn in script.turns) for script in candidates]
    best = min(range(len(candidates)), key=lambda number: (times[number], number))
    said = ", ".join(f"{script.name} {time * 1e3:.1f} ms" for script, time in zip(candidates, times, strict=True))
    return candidates[best], Decision(action=candidates[best].name, reason=said)


@lru_cache(maxsize=256)
def reduce_scatter(fabric: Fabric, rank: int, at: tuple[int, ...], output: Region) -> tuple[Script, Decision]:
    """Around a ring, direct, or by halves."""
    order = schedule.ring_order(fabric.leaf_of)
    candidates = [schedule.ring_reduce_scatter(order, rank, at, output)]
    if len(order) <= _MOST_DIRECT:
        candidates.append(schedule.direct_reduce_scatter(order, rank, at, output))
    if _is_power_of_two(len(order)):
        candidates.append(schedule.halving_reduce_scatter(len(order), rank, at, output))
    return quickest(fabric, candidates)


@lru_cache(maxsize=256)
def all_gather(fabric: Fabric, rank: int, at: tuple[int, ...]) -> tuple[Script, Decision]:
    """Around a ring, direct, or by doubling."""
    order = schedule.ring_order(fabric.leaf_of)
    candidates = [schedule.ring_all_gather(order, rank, at)]
    if len(order) <= _MOST_DIRECT:
        candidates.append(schedule.direct_all_gather(order, rank, at))
    if _is_power_of_two(len(order)):
        candidates.append(schedule.doubling_all_gather(len(order), rank, at))
    return quickest(fabric, candidates)


def _is_power_of_two(count: int) -> bool:
    return count > 2 and not count & (count - 1)


@lru_cache(maxsize=256)
def all_reduce(fabric: Fabric, rank: int, at: tuple[int, ...]) -> tuple[Script, Decision]:
    """In place: "input" and "output" are the same bytes."""
    first, why = reduce_scatter(fabric, rank, at, Region("output", at[rank], at[rank + 1]))
    second, also = all_gather(fabric, rank, at)
    script = schedule.joined(first, second)
    return script, Decision(action=script.name, reason=f"reduce-scatter {why.reason}; all-gather {also.reason}")


@lru_cache(maxsize=256)
def broadcast(fabric: Fabric, rank: int, at: tuple[int, ...], root: int) -> tuple[Script, Decision]:
    """Down a tree, or scattered and gathered."""
    ranks = len(fabric.leaf_of)
    gather, _ = all_gather(fabric, rank, at)
    whole = schedule.tree(ranks, rank, at[-1], root)
    return quickest(fabric, [whole, schedule.joined(schedule.scatter(ranks, rank, at, root), gather)])
