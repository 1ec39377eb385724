"""How all ranks come to stop after one and the same save: before a preemption, or because the job is to be regrouped.

    notice      a rank gets a signal, or is asked to stop; its thread tells the job's store
    armed       every rank's thread sees that and answers with the number of saves it has begun; from here on its next
                save waits for the decision (ranks answer by a thread, so none waits for another's training)
    decided     the last to answer decides: one save after the furthest rank, which nobody can have passed
    the stop    that save is made as safe as was asked for, and then ends the program with `Preempted`

Saves are counted, not steps: ranks may run a step apart, but call `save` equally often. A notice must come by a signal
that nobody uses to end processes for other reasons: torchrun ends the workers that survive a failure with SIGTERM, and
would wait in vain for them to agree with the one that is dead. `resilient run` passes its own SIGTERM on as SIGUSR1.
"""

import json
import logging
import signal
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from resilient.checkpoint.world import World

_log = logging.getLogger("resilient")
_POLL_S = 0.2
_ASKS_PER_S = 4096  # what all ranks of a large job together may ask of the one store
_DECISION_S = 30.0  # a rank that did not answer for so long will not: its process is gone

PREEMPT = "preempt"
REGROUP = "regroup"


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """All ranks stop in their save number `last_save`, counted from 1 in this life."""

    kind: str
    last_save: int
    reason: str


def decide(kind: str, begun: Sequence[int]) -> Decision:
    """Where to stop, when each rank has begun so many saves and begins no other but the next before it knows."""
    furthest = max(begun)
    where = f"ranks {[rank for rank, saves in enumerate(begun) if saves == furthest][:3]} are the furthest"
    return Decision(kind=kind, last_save=furthest + 1, reason=f"after save {furthest}: {where}")


class Stopping:
    """One rank's part. `ask` is for any thread and for signal handlers, `enter` for the training thread."""

    def __init__(self, world: World, store: dist.Store | None) -> None:
        """`store` is what the ranks share; None for a single rank."""
        self._world = world
        self._store = store
        self._changed = threading.Condition()
        self._asked: str | None = None
        self._prefix = ""
        self._saves = 0
        self._armed = False
        self._gave_up = False
        self._decision: Decision | None = None
        self._noticed_at: float | None = None
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._handlers: dict[int, Any] = {}

    @classmethod
    def of(cls, world: World, run_id: str) -> "Stopping":
        """The one that fits the world; `run_id` as all ranks know it."""
        if world.world_size == 1:
            return cls(world, None)
        return cls(world, dist.PrefixStore(f"resilient/{run_id}/stop", dist.distributed_c10d._get_default_store()))

    # ---- asking

    def start(self, preempt: Sequence[int] = (), regroup: Sequence[int] = ()) -> None:
        """Hear other ranks' notices from now on, and take these signals as notices.

        Only the main thread can take signals; elsewhere it is said and left.
        """
        if self._store is not None:
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
            self._prefix, self._saves, self._decision = f"{life}/", 0, None
            self._armed = self._gave_up = False

    def enter(self) -> str | None:
        """Count a save that begins; what kind of stop it is to end in, if in any. Waits only while ranks agree."""
        with self._changed:
            self._saves += 1
            if self._store is None:
                return self._asked
            if not self._armed or self._gave_up:
                return None
            if not self._changed.wait_for(lambda: self._decision is not None, _DECISION_S):
                _log.warning("rank %d: the ranks did not agree on where to stop; training goes on", self._world.rank)
                self._gave_up = True
            decision = self._decision
            return decision.kind if decision is not None and self._saves >= decision.last_save else None

    def since_notice_s(self) -> float:
        """How long ago this rank heard that it is to stop, in seconds."""
        return 0.0 if self._noticed_at is None else time.monotonic() - self._noticed_at

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
        assert store is not None
        notice, decided = f"{prefix}notice", f"{prefix}decision"
        if self._asked is not None and not store.check([notice]):
            store.set(notice, self._asked)  # of two notices either will do: what counts is in the decision
        if not self._armed and store.check([notice]):
            self._answer(store, prefix, store.get(notice).decode())
        if self._armed and self._decision is None and store.check([decided]):
            with self._changed:
                if prefix == self._prefix:
                    self._decision = Decision(**json.loads(store.get(decided)))
                    _log.info("rank %d: stops %s", self._world.rank, self._decision.reason)
                    self._changed.notify_all()

    def _answer(self, store: dist.Store, prefix: str, kind: str) -> None:
        self.ask(kind)  # from here on this rank knows when it heard
        with self._changed:
            if prefix != self._prefix:
                return
            self._armed = True
            saves = self._saves
        store.set(f"{prefix}begun/{self._world.rank}", str(saves))
        if store.add(f"{prefix}answers", 1) == self._world.world_size:
            keys = [f"{prefix}begun/{rank}" for rank in range(self._world.world_size)]
            decision = decide(kind, [int(store.get(key)) for key in keys])
            told = {"kind": decision.kind, "last_save": decision.last_save, "reason": decision.reason}
            store.set(f"{prefix}decision", json.dumps(told))
