"""How all ranks come to stop after one and the same save: before a preemption, or because the job is to be regrouped.

    notice      a rank gets a signal, or is asked to stop; its thread tells the job's store
    armed       every rank's thread sees that and answers how many saves it has begun, and for which step the last one
                was; from here on its next save waits for the decision (threads answer, so none waits for training)
    decided     the last to answer decides: one save after the furthest rank, which nobody can have passed; or, where
                that is too far off for the time that is left, at once, with the newest step that all have begun to save
    the stop    that step is made as safe as was asked for, and then `save` ends the program with `Preempted`

Saves are counted, not steps: ranks may run a step apart, but call `save` equally often. A notice must come by a signal
that nobody uses to end processes for other reasons: torchrun ends the workers that survive a failure with SIGTERM, and
would wait in vain for them to agree with the one that is dead. `resilient run` passes its own SIGTERM on as SIGUSR1.
"""

import json
import logging
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch.distributed as dist

from resilient.checkpoint.world import World, job_store

_log = logging.getLogger("resilient")
_POLL_S = 0.2
_ASKS_PER_S = 4096  # what all ranks of a large job together may ask of the one store
_DECISION_S = 30.0  # a rank that did not answer for so long will not: its process is gone

PREEMPT = "preempt"
REGROUP = "regroup"


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a rank says when it is armed. `step`: of its last save that was due, None if there was none in this life.

    `late`: by its clock the machine will be gone before the stop could be reached and be safe.
    """

    saves: int
    step: int | None
    late: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """All ranks stop in their save number `last_save`, counted from 1 in this life, or in a later one.

    `step`: nothing more is saved, and this step, which all have begun to save, is made safe at once; None: what
    `last_save` saves is.
    """

    kind: str
    last_save: int
    step: int | None
    reason: str


def is_late(left_s: float | None, step_s: float, flush_s: float | None) -> bool:
    """Whether two more steps (to the furthest rank's next save) and a flush take longer than is left.

    All in seconds. None: nobody knows how much is left, or how long a flush takes; then half of what is left is taken.
    """
    return left_s is not None and 2 * step_s + (left_s / 2 if flush_s is None else flush_s) > left_s


def decide(kind: str, answers: Sequence[Answer]) -> Decision:
    """Where to stop, when each rank has answered and begins no other save before it knows."""
    furthest = max(answer.saves for answer in answers)
    steps = [answer.step for answer in answers if answer.step is not None]
    late = [rank for rank, answer in enumerate(answers) if answer.late]
    if kind == PREEMPT and late and len(steps) == len(answers):
        reason = f"at once, with step {min(steps)}: rank {late[0]} sees no time for more"
        return Decision(kind=kind, last_save=0, step=min(steps), reason=reason)
    first = next(rank for rank, answer in enumerate(answers) if answer.saves == furthest)
    reason = f"in save {furthest + 1}: rank {first} is the furthest"
    return Decision(kind=kind, last_save=furthest + 1, step=None, reason=reason)


def store_of(world: World, run_id: str) -> dist.Store:
    """What the ranks share: the job's store; for a single rank one of its own. `run_id` as all ranks know it."""
    if world.world_size == 1:
        return dist.HashStore()
    return job_store(f"{run_id}/stop")


class Stopping:
    """One rank's part. `ask` is for any thread and for signal handlers, `enter` for the training thread."""

    def __init__(
        self,
        world: World,
        store: dist.Store,
        grace_s: float | None = None,
        flush_s: Callable[[], float | None] = lambda: None,
        on_decided: Callable[[Decision], None] = lambda _: None,
    ) -> None:
        """`store` is what the ranks share. `grace_s`: from a notice until the machine is taken, `flush_s`: how long a
        step takes to become durable, as far as known. `on_decided` is called once, on a thread of its own.
        """
        self._world = world
        self._store = store
        self._grace_s = grace_s
        self._flush_s = flush_s
        self._on_decided = on_decided
        self._changed = threading.Condition()
        self._asked: str | None = None
        self._prefix = ""
        self._saves = 0
        self._step: int | None = None
        self._saved_at = self._step_s = 0.0
        self._armed = False
        self._gave_up = False
        self._decision: Decision | None = None
        self._noticed_at: float | None = None
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._handlers: dict[int, Any] = {}

    # ---- asking

    def start(self, preempt: Sequence[int] = (), regroup: Sequence[int] = ()) -> None:
        """Hear other ranks' notices from now on, and take these signals as notices.

        Only the main thread can take signals; elsewhere it is said and left.
        """
        self._thread = threading.Thread(target=self._loop, name="resilient-stopping", daemon=True)
        self._thread.start()
        for numbers, kind in ((preempt, PREEMPT), (regroup, REGROUP)):
            for number in numbers:
                try:
                    self._handlers[number] = signal.signal(number, lambda *_, kind=kind: self.ask(kind))
                except ValueError:
                    _log.warning("signals are not listened to: the Checkpointer was not made on the main thread")
                    return

    def ask(self, kind: str = PREEMPT) -> None:
        """Stop all ranks after one of their next saves. Returns at once; asking again changes nothing."""
        if self._asked is None:  # nothing here may take a lock: a signal handler can interrupt whoever holds it
            self._noticed_at = time.monotonic()
            self._asked = kind

    # ---- the training thread

    def renew(self, life: str) -> None:
        """All ranks start anew together: saves are counted from here. A notice that was not yet acted on stands."""
        with self._changed:
            self._prefix, self._saves, self._step, self._decision = f"{life}/", 0, None, None
            self._armed = self._gave_up = False

    def enter(self, step: int | None = None) -> Decision | None:
        """Count a save that begins, of `step` if it is due; the decision, if this is where the rank stops.

        Waits only while ranks agree.
        """
        with self._changed:
            now = time.monotonic()
            self._step_s, self._saved_at = now - self._saved_at if self._saves else 0.0, now
            self._saves += 1
            if self._armed and not self._gave_up:
                if not self._changed.wait_for(lambda: self._decision is not None, _DECISION_S):
                    _log.warning("rank %d: the ranks did not agree where to stop; it goes on", self._world.rank)
                    self._gave_up = True
                if self._decision is not None and self._saves >= self._decision.last_save:
                    return self._decision
            self._step = self._step if step is None else step
            return None

    def left_s(self) -> float | None:
        """How much of the grace time is left, in seconds; None where it is not known how long that is."""
        heard_at = self._noticed_at
        return None if self._grace_s is None or heard_at is None else self._grace_s - (time.monotonic() - heard_at)

    def keep_signals(self) -> None:
        """The stop is under way: further notices must not end the process before it is safe, nor after."""
        self._handlers = {}

    def end(self) -> None:
        """Ask the thread to end, without waiting for it."""
        self._ended.set()

    def close(self) -> None:
        """Give signals back to whom they belonged, end the thread."""
        for number, former in self._handlers.items():
            if threading.current_thread() is threading.main_thread():
                signal.signal(number, former if former is not None else signal.SIG_DFL)
        self._handlers = {}
        self.end()
        if self._thread is not None:
            self._thread.join(5)

    # ---- the thread

    def _loop(self) -> None:
        pause_s = max(_POLL_S, self._world.world_size / _ASKS_PER_S)
        while not self._ended.wait(pause_s):
            try:
                self._turn()
            except (RuntimeError, dist.DistError) as error:  # the store went with its rank: the job is restarting
                _log.debug("stopping: %s", error)

    def _turn(self) -> None:
        store, prefix = self._store, self._prefix
        notice, decided = f"{prefix}notice", f"{prefix}decision"
        if self._asked is not None and not store.check([notice]):
            store.set(notice, self._asked)  # of two notices either will do: what counts is in the decision
        if not self._armed and store.check([notice]):
            self._answer(store, prefix, store.get(notice).decode())
        if self._armed and self._decision is None and store.check([decided]):
            self._take(prefix, Decision(**json.loads(store.get(decided))))

    def _take(self, prefix: str, decision: Decision) -> None:
        with self._changed:
            if prefix != self._prefix:
                return
            self._decision = decision
            self._changed.notify_all()
        if self._world.rank == 0:
            _log.warning("all ranks stop (%s) %s", decision.kind, decision.reason)
        threading.Thread(target=self._on_decided, args=(decision,), name="resilient-stop", daemon=True).start()

    def _answer(self, store: dist.Store, prefix: str, kind: str) -> None:
        self.ask(kind)  # from here on this rank knows when it heard
        with self._changed:
            if prefix != self._prefix:
                return
            self._armed = True
            late = is_late(self.left_s(), self._step_s, self._flush_s())
            answer = Answer(saves=self._saves, step=self._step, late=late)
        store.set(f"{prefix}answer/{self._world.rank}", json.dumps(asdict(answer)))
        if store.add(f"{prefix}answers", 1) == self._world.world_size:
            texts = [store.get(f"{prefix}answer/{rank}") for rank in range(self._world.world_size)]
            decision = decide(kind, [Answer(**json.loads(text)) for text in texts])
            store.set(f"{prefix}decision", json.dumps(asdict(decision)))
