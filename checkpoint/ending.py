"""What a rank does once the ranks have agreed to stop (`stopping.py`): make the step safe, wait, say how it ended.

Where time is short the decision names a step that all have begun to save already: then a thread has it made durable
while the training is still in the middle of its step, and the next `save` only waits for that.
"""

import logging
import threading
import time
from collections import deque
from concurrent.futures import Future

from resilient.checkpoint.handle import Pending, SaveHandle
from resilient.checkpoint.link import AgentLink
from resilient.checkpoint.stopping import REGROUP, Decision
from resilient.checkpoint.world import World
from resilient.errors import LevelFailed, Preempted, ResilientError
from resilient.policy import Policy

_log = logging.getLogger("resilient")
_POLL_S = 0.1


class Ending:
    """Watches how long flushes take, and carries out the stop. `wait` is for the training thread."""

    def __init__(self, world: World, policy: Policy, pending: Pending, link: AgentLink) -> None:
        self._world = world
        self._policy = policy
        self._pending = pending
        self._link = link
        self._flushes: deque[float] = deque(maxlen=8)
        self._warned = False
        self._early: Future[int] | None = None  # the step that is made durable before its time
        self._begun = threading.Event()

    def flush_s(self) -> float | None:
        """How long the latest steps took at most, in seconds, from their save until they were durable."""
        return max(self._flushes, default=None)

    def watch(self, handle: SaveHandle) -> None:
        """Measure this save's flush; say in advance when it takes longer than the machines would wait."""
        began = time.monotonic()

        def done(future: Future[int]) -> None:
            if future.exception() is None:
                self._measured(handle.step, time.monotonic() - began)

        handle.durable("durable").add_done_callback(done)

    def _measured(self, step: int, took_s: float) -> None:
        self._flushes.append(took_s)
        grace_s = self._policy.grace_s
        if grace_s is not None and took_s > grace_s and not self._warned:
            self._warned = True
            _log.warning(
                "rank %d: step %d was durable %.1f s after its save, but grace_s is %g: a preemption may cost steps "
                "since then; ask for more grace, make steps durable more often, or use a faster place",
                *(self._world.rank, step, took_s, grace_s),
            )

    def decided(self, decision: Decision) -> None:
        """On a thread of its own: have the step made durable now, if the decision says so."""
        if decision.step is not None:
            self._early = self._pending.also("durable", decision.step)
            try:
                self._make_durable(decision.step, time.monotonic() + self._policy.fence_timeout_s)
            except ResilientError as error:
                self._pending.fail("durable", decision.step, error)
        self._begun.set()

    def _make_durable(self, step: int, deadline: float) -> None:
        """The image may still be on its way into memory: it is asked for until it is there."""
        while True:
            try:
                return self._link.make_durable(step)
            except LevelFailed:
                if time.monotonic() > deadline:
                    raise
            time.sleep(_POLL_S)

    def wait(self, decision: Decision, handle: SaveHandle | None, left_s: float | None) -> Preempted:
        """Return when the step is as safe as it can be on all ranks. `handle`: of the save that stops. Collective.

        Waits as long as is left of the grace time, or as a write may take.
        """
        limit_s = self._policy.write_timeout_s if left_s is None else max(1.0, left_s)
        deadline = time.monotonic() + limit_s
        if handle is not None:
            step, awaited = handle.step, {level: handle.durable(level) for level in handle.levels}
        else:
            assert decision.step is not None
            self._begun.wait(limit_s)
            step, awaited = decision.step, {} if self._early is None else {"durable": self._early}
        problems = [text for level, future in awaited.items() if (text := _problem(level, future, deadline))]
        if handle is None and self._early is None:
            problems.append(f"durable: not begun within {limit_s:.0f} s")
        # Also so that no rank takes the job's store away while others wait to hear of the last level.
        told = self._world.gather(problems)
        for problem in problems:
            _log.error("rank %d: step %d is not safe at level %s", self._world.rank, step, problem)
        if self._world.rank == 0 and not any(told):
            _log.warning("step %d is safe; the job ends here until it is started again", step)
        unsafe = tuple(f"rank {rank}, {problem}" for rank, problems in enumerate(told) for problem in problems)
        return Preempted(step, Preempted.REGROUP if decision.kind == REGROUP else Preempted.SAFE, unsafe)


def _problem(level: str, future: Future[int], deadline: float) -> str | None:
    try:
        future.result(max(0.0, deadline - time.monotonic()))
    except (ResilientError, TimeoutError) as error:
        return f"{level}: {str(error) or 'not in time'}"
    return None
