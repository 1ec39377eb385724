"""What a launcher does when the workers of its node have ended: facts in, a decision with its reason out.

Nothing here acts or reads a clock. A *life* is the time from one start of the workers to their end. A life failed to
start when none of its ranks had joined the others.
"""

import signal
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum

from resilient.errors import Preempted

PREEMPTED = Preempted.SAFE  # exit code of a worker whose state is durable: start the job again, anywhere
REGROUP = Preempted.REGROUP  # exit code of a worker whose state is in memory: start it again at once, here
MOST_FAILED_STARTS = 3

_HUNG_LEAST_S = 120.0
_HUNG_INTERVALS = 10
_START_LEAST_S = 60.0
_START_TIMES = 10


class Action(Enum):
    DONE = "done"
    PREEMPTED = "preempted"
    STOPPED = "stopped"
    RESTART = "restart"
    REGROUP = "regroup"
    GIVE_UP = "give up"


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """`exits`: exit codes of this node's workers by rank, negative for signals; empty when they were ended because
    others failed. `stop`: the signal that the launcher got. `step`: the newest saved one in this life. `joined`:
    whether a rank of this life had joined the others, `joined_before` whether one had in any life before.
    """

    exits: Mapping[int, int]
    stop: str | None = None
    step: int | None = None
    joined: bool = True
    joined_before: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """How many failures in a row, without progress between them, are one too many.

    `failures` and `failed_starts`: so far; `row_step`: where the first of these failures was. It is full again when the
    job has come `progress_steps` steps beyond that; lives that failed to start, after one that had not, are counted by
    themselves.
    """

    restarts: int
    progress_steps: int
    failures: int = 0
    failed_starts: int = 0
    row_step: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    action: Action
    reason: str
    budget: Budget


def decide(facts: Facts, budget: Budget) -> Decision:
    """What comes next. Never restarts a job for ever that gets nowhere."""
    codes = set(facts.exits.values())
    if codes and codes <= {0}:
        return Decision(action=Action.DONE, reason="all workers ended well", budget=budget)
    if codes and codes <= {0, PREEMPTED}:
        return Decision(action=Action.PREEMPTED, reason="all workers stopped at one step, which is safe", budget=budget)
    if facts.stop is not None:
        return _stopped(facts, budget)
    if codes and codes <= {0, REGROUP}:
        return Decision(action=Action.REGROUP, reason="all workers stopped at one step, to go on", budget=budget)
    return _failed(facts, budget)


def _stopped(facts: Facts, budget: Budget) -> Decision:
    if facts.exits and not facts.joined and not facts.joined_before and facts.stop != "SIGINT":
        reason = f"{facts.stop} came before any rank had made its Checkpointer: what was safe before still is"
        return Decision(action=Action.PREEMPTED, reason=reason, budget=budget)
    reason = f"the workers did not end by agreement after {facts.stop}"
    return Decision(action=Action.STOPPED, reason=reason, budget=budget)


def _failed(facts: Facts, budget: Budget) -> Decision:
    if not facts.joined and facts.joined_before and budget.failed_starts < MOST_FAILED_STARTS:
        starts = budget.failed_starts + 1
        reason = f"this life did not come up ({starts} of {MOST_FAILED_STARTS} such starts in a row)"
        return Decision(action=Action.RESTART, reason=reason, budget=replace(budget, failed_starts=starts))
    if _progress(facts, budget):
        after = replace(budget, failures=1, failed_starts=0, row_step=facts.step)
    else:
        after = replace(budget, failures=budget.failures + 1, failed_starts=0)
    if after.failures > budget.restarts:
        return Decision(action=Action.GIVE_UP, reason=_no_more(after), budget=after)
    reason = f"restart {after.failures} of {budget.restarts} without progress"
    return Decision(action=Action.RESTART, reason=reason, budget=after)


def _progress(facts: Facts, budget: Budget) -> bool:
    """Whether this failure is far enough from those before not to count with them."""
    if facts.step is None:
        return False
    return budget.row_step is None or facts.step >= budget.row_step + budget.progress_steps


def _no_more(after: Budget) -> str:
    if after.restarts == 0:
        return "there are no restarts (--max-restarts 0)"
    return f"{after.failures} failures within {after.progress_steps} steps"


def start_patience_s(first_start_s: float | None) -> float | None:
    """How long a later life may take until its ranks have joined; None, no limit, before the first has shown it."""
    return None if first_start_s is None else max(_START_LEAST_S, _START_TIMES * first_start_s)


def is_hung(since_save_s: float, since_asked_s: float, longest_interval_s: float) -> bool:
    """Whether workers that were asked to stop at the next save will never come to one: a peer may be gone silently."""
    patience_s = max(_HUNG_LEAST_S, _HUNG_INTERVALS * longest_interval_s)
    return min(since_save_s, since_asked_s) > patience_s


def how_it_ended(code: int) -> str:
    """An exit code in words: "was killed by SIGKILL", "failed with exit code 1"."""
    if code >= 0:
        return f"failed with exit code {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"
