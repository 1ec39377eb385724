"""`Checkpointer`: the public face. Wires state, plan, capture, agent and restore together; decides nothing itself.

Training thread: `save`, `fence` (by hook), `restore`, `close`. What they need elsewhere: the capture thread
(`capture.py`), the agent (`link.py`), the decision what to restore (`restore/decide.py`).
"""

import logging
import os
import secrets
import time
import weakref
from collections import deque
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, NoReturn, Self

from torch.optim import Optimizer

from resilient.checkpoint.board import Board
from resilient.checkpoint.capture import Capture, Job
from resilient.checkpoint.compiling import uncompiled
from resilient.checkpoint.ending import Ending
from resilient.checkpoint.events import Events
from resilient.checkpoint.extras import Captured, Extras
from resilient.checkpoint.handle import LEVELS, Pending, SaveHandle
from resilient.checkpoint.leaves import walk
from resilient.checkpoint.link import AgentLink, hello_of
from resilient.checkpoint.peering import arrange_peering
from resilient.checkpoint.place import check_apart, normal_url, others_in, whole_step
from resilient.checkpoint.plan import Plan, make_plan
from resilient.checkpoint.restore.restorer import Restored, Restorer
from resilient.checkpoint.stateful import check_state
from resilient.checkpoint.stopping import PREEMPT, REGROUP, Decision, Stopping, store_of
from resilient.checkpoint.world import join_world
from resilient.errors import LevelFailed, ResilientError, SnapshotSkipped, TornCapture, UsageError
from resilient.policy import Policy

_log = logging.getLogger("resilient")
_INLINE_TENSORS = 2048  # up to so many, addresses and versions are read inside `save`; else first thing after it

_EXIT_S = 10.0


@dataclass(slots=True)
class Statistics:
    """What saving has cost the training thread, in seconds; the last thousand of each."""

    saves: int = 0
    plans: int = 0
    skipped: int = 0
    failures: int = 0
    call_seconds: deque[float] = field(default_factory=lambda: deque(maxlen=1000))
    fence_seconds: deque[float] = field(default_factory=lambda: deque(maxlen=1000))


class Checkpointer:
    """Keeps every step of a training job safe; see the README for the three lines that use it.

    `url`: where durable snapshots go: a path, or any fsspec URL. `state`: by name, modules (plain, DDP, FSDP2),
    optimizers, tensors, objects with `state_dict`/`load_state_dict`, or mutable mappings of plain JSON values.
    `policy`: `RESILIENT_*` variables override it. All ranks make it together, after `init_process_group`, and call its
    methods from the training thread.

    Raises StateError for what cannot be saved, by name; UrlInUse when another job writes to the url; PolicyError;
    UsageError for what is no url; NotACheckpoint when the url is a file.
    """

    def __init__(self, url: str, state: Mapping[str, object], policy: Policy | None = None) -> None:
        self._policy = Policy.from_environment(policy)
        self._url = normal_url(url)
        check_apart(self._url, self._policy.local)
        objects = check_state(state)
        self._state = dict(state)
        self._extras = Extras(self._state, objects)
        self._found = walk(self._state)
        self._extras.capture(self._found)  # what cannot be saved is refused here, by name, not at step 1000
        self.world = join_world()
        self._events = Events.of(os.environ, self.world.rank)
        self._events.joined(self.world.world_size, self.world.node)
        self.statistics = Statistics()
        self.last_restore: Restored | None = None
        self._pending = Pending()
        self._early: frozenset[str] = frozenset()
        self._plan: Plan | None = None
        self._metadata = {"format": "resilient", "rank": str(self.world.rank), "world_size": str(self.world.world_size)}
        run_id, launch = self._policy.run_identity(self._url, os.environ), os.environ.get("RESILIENT_LAUNCH")
        hello = hello_of(run_id, self._url, self.world, self._policy, launch)
        self._board = Board.of(self.world, hello.run_id)
        self._link = AgentLink(
            hello,
            self._policy,
            self._pending,
            self._board,
        )
        self._ending = Ending(self.world, self._policy, self._pending, self._link)
        self._stopping = Stopping(
            self.world,
            store_of(self.world, hello.run_id),
            grace_s=self._policy.grace_s,
            flush_s=self._ending.flush_s,
            on_decided=self._ending.decided,
        )
        self._renew()
        self._capture = Capture(
            self._link,
            threads=self._policy.copy_threads,
            fence_timeout_s=self._policy.fence_timeout_s,
            on_captured=self._pending.captured,
            on_failed=self._failed,
        )
        self._connect()
        self._peering = arrange_peering(self.world, self._policy, self._link.client(), os.environ)
        if self._peering is not None:
            self._link.introduce, self._link.parity_sizes = self._peering.introduce, self._peering.sizes
        self._capture.start()
        self._hooks = self._hook_optimizers()
        self._closed = False
        self._stopping.start(self._policy.signals("preempt_signals"), self._policy.signals("regroup_signals"))
        self._at_exit = weakref.finalize(self, _leave, self._capture, self._link, self._stopping)

    def save(self, step: int, *, durable: bool = False) -> SaveHandle:
        """Start a snapshot of the state as it is now, called `step`. Returns at once; the copies run behind.

        `durable`: it goes to the durable level, whatever the policy says of this step; the same on all ranks.
        Parameters may change only after the fence, which the optimizers' `step()` passes by itself. What went wrong
        with earlier saves, on any rank, is logged here. Raises UsageError after `close` or for what is no step (a whole
        number below 2^62, of any type), and Preempted, which ends the program, when the ranks have agreed to
        stop here: it waits until the step is safe.
        """
        return self._save(step, None, durable=durable)

    def request_stop(self, *, durable: bool = True) -> None:
        """Have all ranks stop after one of their next saves, as a signal of `preempt_signals` would.

        From any rank and thread; returns at once. That `save` raises Preempted when the step is safe: durable, or, if
        that is not asked for, in memory.
        """
        self._stopping.ask(PREEMPT if durable else REGROUP)

    def fence(self) -> None:
        """Return when the state may change. The optimizers call it before each step; call it before other changes."""
        began = time.perf_counter()
        self._capture.fence()
        self.statistics.fence_seconds.append(time.perf_counter() - began)

    def restore(self, steps: Collection[int] | None = None) -> int | None:
        """Load the newest complete, verified snapshot of any level into the live state, in place; return its step.

        None where there is none. `steps`: take one of these only, the same on all ranks; None: any. Collective: all
        ranks call it and take the same decision. Raises LayoutMismatch when the snapshot does not fit the state
        (nothing is overwritten then), RestoreError when all are damaged.
        """
        self.fence()
        self._capture.wait_idle(self._policy.fence_timeout_s)
        self.last_restore = self._restorer(steps).restore(self._extras)
        self._plan = None
        self._renew()
        done = self.last_restore
        self._events.restored(*((done.step, done.levels, done.seconds) if done is not None else (None, {}, 0.0)))
        if done is None and self.world.rank == 0 and (others := others_in(self._url)):
            _log.warning(
                "there is no snapshot in %s, which holds %s: the training begins at its beginning. A checkpoint of "
                "another library can be brought into this format by `resilient convert`",
                *(self._url, ", ".join(map(repr, others[:3])) + (" and more" if len(others) > 3 else "")),
            )
        return None if done is None else done.step

    def newest(self) -> int | None:
        """The step that `restore` would try first; None where there is none. Collective.

        Loads nothing, and reads no image: one that is damaged is found only by `restore`, which takes an older step.
        """
        return self._restorer().newest()

    def close(self, *, keep_memory: bool = False) -> list[str]:
        """Wait until what the policy asks for is written, end the agent, give its memory back. Safe to repeat.

        Returns what failed since the last save, one line each (also logged). `keep_memory` leaves the agent and the
        newest snapshot for a job that restarts.
        """
        if self._closed:
            return []
        self._closed = True
        self._at_exit.detach()
        for hook in self._hooks:
            hook.remove()
        self._capture.fence()
        self._capture.close()
        self._stopping.close()
        problems = self._link.close(keep=keep_memory, timeout_s=self._policy.write_timeout_s)
        self._board.close()
        self._events.close()
        problems = self._pending.take_failures() + problems
        for problem in problems:
            _log.warning("rank %d: %s", self.world.rank, problem)
        return problems

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # A job that ends with an exception will want its memory when it comes back.
        self.close(keep_memory=kind is not None)

    # ---- parts of `save`

    def _save(self, step: int, earlier: Captured | None, *, durable: bool = False) -> SaveHandle:
        """`earlier`: objects that are saved as they were when it was captured (`protected.py`)."""
        began = time.perf_counter()
        step = whole_step(step)
        if self._closed:
            raise UsageError(f"save({step}): the Checkpointer is closed")
        self._report()
        self._events.saved(step)
        due = self._levels_due(step, PREEMPT if durable else None)
        stop = self._stopping.enter(step if due else None)
        if stop is not None:
            if stop.step is not None:
                self._end(stop, None)
            due = self._levels_due(step, PREEMPT if durable else stop.kind)
        handle = SaveHandle(step, due)
        if not due:
            return handle
        self._capture.fence()
        plan = self._present_plan()
        self._pending.add(handle)
        self._capture.submit(self._job(step, due, plan, earlier))
        self.statistics.saves += 1
        self.statistics.call_seconds.append(time.perf_counter() - began)
        if "durable" in due:
            self._ending.watch(handle)
        if stop is not None:
            self._end(stop, handle)
        return handle

    def _levels_due(self, step: int, stop: str | None) -> tuple[str, ...]:
        """As the policy says, but for parity where there are too few nodes for it; `arrange_peering` has said so.

        Where the ranks stop, the step is due in memory, whatever it is, and durable too if the machines may go.
        """
        due = self._policy.levels_due(step)
        if stop is not None:
            added = ("memory", "parity") if stop == REGROUP else LEVELS
            absent = {"parity": self._policy.parity is None, "local": self._policy.local is None}
            due = tuple(one for one in LEVELS if one in due or (one in added and not absent.get(one, False)))
        return due if self._peering is not None else tuple(level for level in due if level != "parity")

    def _job(self, step: int, due: tuple[str, ...], plan: Plan, earlier: Captured | None) -> Job:
        inline = plan.tensors <= _INLINE_TENSORS or bool(plan.devices)
        look = plan.look() if inline else None
        if look is not None:
            plan.moved(look)
        plan.copy_early()
        for device in plan.devices:
            device.mark()
        return Job(
            step=step,
            due=due,
            plan=plan,
            look=look,
            samples=plan.fingerprints.take(),
            objects=self._extras.capture(self._found, earlier).encoded,
            metadata={**self._metadata, "step": str(step)},
        )

    def _present_plan(self) -> Plan:
        plan = self._plan  # the capture thread may take it away at any time (`_failed`)
        if plan is None or not self._found.watch.unchanged():
            self._found = walk(self._state)
            plan = self._plan = make_plan(self._found, self.world.rank, self._early)
            self.statistics.plans += 1
        return plan

    def _failed(self, step: int, error: ResilientError) -> None:
        """On the capture thread. What changes although no optimizer holds it is copied inside `save` from now on."""
        self.statistics.skipped += isinstance(error, SnapshotSkipped)
        self._pending.fail("memory", step, error)
        plan = self._plan
        if isinstance(error, TornCapture) and plan is not None:
            unfenced = {one.leaf.key for one in plan.planned if one.leaf.kind not in ("parameter", "optimizer")}
            if unfenced & set(error.tensors):
                self._early |= unfenced & set(error.tensors)
                self._plan = None

    def _report(self) -> None:
        for failure in self._pending.take_failures():
            self.statistics.failures += 1
            _log.warning("rank %d: %s", self.world.rank, failure)

    def _end(self, decision: Decision, handle: SaveHandle | None) -> NoReturn:
        """Wait until the step is safe on every rank, and end the program. Raises Preempted."""
        end = self._ending.wait(decision, handle, self._stopping.left_s())
        self._stopping.keep_signals()
        self._events.stopped(end.step, end.problems, durable=end.code == end.SAFE)
        self.close(keep_memory=True)
        raise end

    # ---- wiring

    def _renew(self) -> None:
        """The ranks start anew, all together. Collective."""
        life = self._new_life()
        self._link.renew(life)
        self._stopping.renew(life)

    def _restorer(self, steps: Collection[int] | None = None) -> Restorer:
        fresh = self.statistics.saves == 0 and self.last_restore is None
        found = self._found if self._found.is_current() else walk(self._state)
        client, peers = self._link.client(), self._peering is not None
        how: dict[str, Any] = {"fresh": fresh, "peers": peers, "steps": steps}
        return Restorer(client, self.world, self._state, found, self._url, self._policy, **how)

    def _new_life(self) -> str:
        """The same on all ranks, and later in the order of texts than any before it. Collective."""
        life: str = self.world.gather(f"{time.time_ns():016x}{secrets.token_hex(4)}")[0]
        return life

    def _connect(self) -> None:
        """Reach the agent on every rank, or fail on every rank."""
        problem: BaseException | None = None
        try:
            self._link.client()
        except (ResilientError, OSError) as error:
            problem = error
        failed = [text for text in self.world.gather(None if problem is None else str(problem)) if text]
        if problem is not None:
            raise problem
        if failed:
            raise LevelFailed(f"another rank could not start: {failed[0]}")

    def _hook_optimizers(self) -> list[Any]:
        """The fence before each optimizer's step and before its state is replaced. Holds this object only weakly."""
        this = weakref.ref(self)

        @uncompiled
        def fence(*_: object) -> None:
            checkpointer = this()
            if checkpointer is not None:
                checkpointer.fence()

        hooks: list[Any] = []
        for held in self._state.values():
            if isinstance(held, Optimizer):
                hooks.append(held.register_step_pre_hook(fence))
                hooks.append(held.register_load_state_dict_pre_hook(fence))
        return hooks


def _leave(capture: Capture, link: AgentLink, stopping: Stopping) -> None:
    """The interpreter ends without close(), and would abort if a thread were then in mid-copy. The memory stays."""
    stopping.end()
    capture.close(_EXIT_S)
    link.leave()
