"""The loop of a launcher: meet the other nodes, start this node's workers, watch them, decide what comes next.

    meet ──► start ──► watch ──► decide ──► done, safely stopped, or given up
      ▲                              │
      └──── a new life ──────────────┘

An agent of torch's elastic, of which it uses the parts that are made to be used by subclasses (rendezvous, ranks,
starting workers), with a loop of its own: torch's ends workers in mid-step when a node comes, counts failures that lie
weeks apart together, and lets lives share a store with the addresses of the dead.
"""

import logging
import os
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from torch.distributed.elastic.agent.server.api import WorkerSpec
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.rendezvous import (
    RendezvousClosedError,
    RendezvousConnectionError,
    RendezvousError,
    RendezvousGracefulExitError,
    RendezvousHandler,
    RendezvousTimeoutError,
)

from resilient.checkpoint.agent.address import node_name
from resilient.checkpoint.events import VARIABLE as EVENTS
from resilient.errors import LevelFailed
from resilient.launch.run import tethered
from resilient.launch.run.decide import PREEMPTED, REGROUP, Budget, Decision, Facts, decide, is_hung, start_patience_s
from resilient.launch.run.life import History, Life, trouble
from resilient.launch.run.notice import Notice, StopRequested
from resilient.launch.run.options import Settings
from resilient.launch.run.rendezvous import Agreed, Told, agree, announce_failure, announced_failure
from resilient.launch.run.report import (
    End,
    Reporter,
    end_text,
    exit_code_of,
    known_text,
    levels_text,
    restored_text,
    running_text,
)
from resilient.launch.run.workers import Workers

_log = logging.getLogger("resilient")
_STORE_EVERY_S = 1.0
_STORE_AGAIN_S = 30.0  # after it could not be reached: each try may block for long
_MEETINGS = 5  # in a row that may fail
_QUIET_S = 1.0  # for workers to end by themselves, with their own words, once one has failed
_STOP_PATIENCE_S = 600.0  # for the last worker once one has stopped by agreement
_GRACE_EXTRA_S = 5.0  # workers keep to the grace time themselves, if they come to a save
_BARRIER_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """How the launcher ends: its exit code, and whether the rendezvous is over for all nodes."""

    exit_code: int
    closes: bool


class Launcher(LocalElasticAgent):
    """One node's launcher. `supervise` blocks until the job is over for this node; on the main thread."""

    def __init__(
        self, settings: Settings, handler: RendezvousHandler, notice: Notice, reporter: Reporter, scratch: Path
    ) -> None:
        """`scratch`: a private folder, on memory rather than a disk."""
        logs = settings.config.logs_specs
        assert logs is not None
        super().__init__(_spec(settings, handler), logs, exit_barrier_timeout=_BARRIER_S)
        self._settings = settings
        self._handler = handler
        self._notice = notice
        self._reporter = reporter
        self._scratch = scratch
        self._node = node_name()
        self._budget = Budget(restarts=settings.config.max_restarts, progress_steps=settings.progress_steps)
        self._told = Told(node=self._node, command=settings.command, token=settings.token)
        self._history = History()
        self._store_again_s = 0.0

    def supervise(self) -> Ending:
        """Run lives until one is the last. Raises LevelFailed when the nodes cannot meet."""
        os.environ.update(self._settings.variables)
        while True:
            try:
                with self._notice.interrupting():
                    agreed = self._meet()
            except StopRequested:
                return self._stopped_while_waiting()
            except RendezvousGracefulExitError:
                self._reporter.tell("ended", f"{self._node} was a spare; the job ended without it", {}, own=True)
                return Ending(exit_code=0, closes=False)
            except RendezvousClosedError:
                return self._closed_by_others()
            except LevelFailed as error:
                raise LevelFailed(f"{self._node}: {error}{self._known()}") from error
            life = self._start(agreed)
            self._watch(life)
            decision = decide(self._facts(life), self._budget)
            ending = self._conclude(life, decision)
            if ending is not None:
                return ending

    def end(self) -> None:
        """Leave no worker behind, whatever has happened. Safe to repeat."""
        self._shutdown(signal.SIGKILL)

    # ---- the beginning of a life

    def _meet(self) -> Agreed:
        """Wait for the other nodes and agree with them. A node that dies just then costs another try."""
        group, config = self._group(), self._settings.config
        for attempt in range(1, _MEETINGS + 1):
            try:
                self._elastic()._rendezvous(group)
                return agree(group.store, group.group_rank, group.group_world_size, self._told)
            except (RendezvousClosedError, RendezvousGracefulExitError):
                raise
            except RendezvousTimeoutError as error:
                raise LevelFailed(
                    f"fewer than {config.min_nodes} nodes came to {config.rdzv_endpoint} in time; start the launcher "
                    "on the others, or allow fewer with --nnodes MIN:MAX"
                ) from error
            except (RendezvousError, RuntimeError) as error:  # torch's DistError is a RuntimeError
                _log.info("meeting %d failed: %s", attempt, error)
                if attempt == _MEETINGS or (isinstance(error, RendezvousConnectionError) and attempt > 1):
                    raise LevelFailed(
                        f"the nodes could not meet at {config.rdzv_endpoint} ({error}): does the node that it names "
                        "still live?"
                    ) from error
        raise AssertionError("the last attempt returns or raises")

    def _start(self, agreed: Agreed) -> Life:
        group = self._group()
        folder = self._scratch / f"life_{agreed.life}"
        folder.mkdir()
        self._reporter.speaks = group.group_rank == 0
        self._told = replace(self._told, life=agreed.life, token=agreed.token, launch=agreed.launch, nodes=agreed.nodes)
        os.environ["RESILIENT_TOKEN"], os.environ["RESILIENT_LAUNCH"] = agreed.token, agreed.launch
        os.environ[EVENTS] = str(folder)
        # The base class tells workers max_restarts - _remaining_restarts as their restart count: so it is the number of
        # the life, the same on all nodes, where each would count for itself.
        self._remaining_restarts = group.spec.max_restarts - agreed.life
        for local_rank, pid in self._elastic()._start_workers(group).items():
            group.workers[local_rank].id = pid
        self._notice.install()  # starting workers has set torch's
        assert self._pcontext is not None
        return Life(agreed, folder, Workers(self._pcontext, group.workers[0].global_rank))

    # ---- watching it

    def _watch(self, life: Life) -> None:
        """Return when no worker of this node runs."""
        told = False
        while not life.workers.all_ended():
            time.sleep(self._settings.config.monitor_interval)
            life.listen()
            if life.restored is not None and not told:
                told = True
                self._tell_running(life, life.restored)
            self._pass_on_signals(life)
            failure = self._must_end(life)
            if failure is not None:
                life.failure = self._announce(failure)
                life.workers.end(quiet_s=_QUIET_S, patience_s=self._settings.end_patience_s)
        life.listen()
        failed = life.failed_rank()
        if failed is not None and life.failure is None:
            life.failure = self._announce(life.failure_of(failed, self._node))
        life.workers.end(quiet_s=0, patience_s=0)

    def _must_end(self, life: Life) -> Mapping[str, Any] | None:
        """Why the workers of this node cannot go on, as a failure; None while they can."""
        now = time.monotonic()
        exits = life.exits()
        failed = life.failed_rank()
        if failed is not None:
            return life.failure_of(failed, self._node)
        what = self._out_of_patience(life, exits, now)
        if what is not None:
            return trouble(self._node, what)
        return None if exits else self._ended_by_others(life, now)

    def _out_of_patience(self, life: Life, exits: Mapping[int, int], now: float) -> str | None:
        if self._notice.interrupts > 1:
            return "was interrupted twice"
        if any(code in (PREEMPTED, REGROUP) for code in exits.values()):
            life.partly_stopped_s = life.partly_stopped_s or now
            if now - life.partly_stopped_s > _STOP_PATIENCE_S:
                return "has workers that did not stop with the others"
        grace_s = self._settings.policy.grace_s
        if life.stopping_s is not None and grace_s and now - life.stopping_s > grace_s + _GRACE_EXTRA_S:
            return f"has workers that did not stop within the grace time of {grace_s:g} s"
        patience_s = start_patience_s(self._history.first_start_s)
        if life.joined_s is None and patience_s is not None and now - life.began_s > patience_s:
            return f"has workers that did not join the others within {patience_s:.0f} s"
        if life.regroup_asked_s is not None and is_hung(
            now - life.saved_at_s, now - life.regroup_asked_s, life.longest_interval_s
        ):
            return "has workers that come to no save any more; a node may have gone"
        return None

    def _ended_by_others(self, life: Life, now: float) -> Mapping[str, Any] | None:
        """A failure that another node has told of. Where one waits to be taken in, the workers are asked to stop."""
        if self._settings.config.max_nodes == 1 or now < self._store_again_s:
            return None
        self._store_again_s = now + _STORE_EVERY_S
        try:
            failure = announced_failure(self._group().store)
            waiting = life.joined_s is not None and self._handler.num_nodes_waiting() > 0
        except (RuntimeError, RendezvousError) as error:
            _log.warning("the rendezvous cannot be reached: the workers go on, but could not restart (%s)", error)
            self._store_again_s = time.monotonic() + _STORE_AGAIN_S
            return None
        if failure is None and waiting and life.regroup_asked_s is None and life.stopping_s is None:
            life.regroup_asked_s = now
            life.workers.send(self._settings.regroup_signal)
        return failure

    def _pass_on_signals(self, life: Life) -> None:
        """To the workers, as a signal at which they stop by agreement."""
        stops = self._settings.stop_signals
        while (got := self._notice.take()) is not None:
            if life.stopping_s is None:
                life.stopping_s = time.monotonic()
                text = f"{got.name} on {self._node}: the job stops at its next save"
                self._reporter.tell("stopping", text, {"signal": got.name}, own=True)
            life.workers.send(got if got in stops else stops[0])

    def _announce(self, failure: Mapping[str, Any]) -> Mapping[str, Any]:
        """Tell the other nodes; returns the failure that was told first."""
        return failure if self._settings.config.max_nodes == 1 else announce_failure(self._group().store, failure)

    # ---- its end

    def _facts(self, life: Life) -> Facts:
        elsewhere = life.failure is not None and life.failure["node"] != self._node
        stop = self._notice.first if life.stopping_s is not None else None
        return Facts(
            exits={} if elsewhere else life.exits(),
            stop=None if stop is None else stop.name,
            step=life.step,
            joined=life.joined_s is not None,
            joined_before=self._history.joined,
        )

    def _conclude(self, life: Life, decision: Decision) -> Ending | None:
        """Say what happened; None when another life follows."""
        self._budget = decision.budget
        self._history.add(life)
        code = exit_code_of(decision.action, self._notice.first)
        failure = None if life.failure is None else dict(life.failure)
        safe, problems = life.stopped_with()
        end = End(
            life=life.number,
            decision=decision,
            step=life.step,
            safe=safe,
            problems=problems,
            failure=failure,
            restored=self._history.restored,
            lost_steps=self._history.lost_steps,
            exit_code=code,
        )
        own = failure is not None and failure["node"] == self._node
        facts: dict[str, Any] = {"life": end.life, "step": end.step, "safe_step": safe, "problems": problems}
        facts |= {"reason": decision.reason, "failure": failure, "exit_code": code}
        facts |= {"restored": self._history.restored, "steps_lost": self._history.lost_steps}
        self._reporter.tell(decision.action.value, end_text(end), facts, own=own)
        self._history.ended = ("the stop" if failure is None else "the failure", time.monotonic())
        if code in (0, PREEMPTED):
            self._wait_for_others()
        return None if code is None else Ending(exit_code=code, closes=True)

    def _tell_running(self, life: Life, restored: Mapping[str, Any]) -> None:
        """The line on what was restored, if this is not the start of a fresh job."""
        ended = self._history.ended
        step = restored.get("step")
        if step is None and ended is None:
            return
        after_s = None if ended is None else time.monotonic() - ended[1]
        after = "" if ended is None or after_s is None else f", {after_s:.1f} s after {ended[0]}"
        told, agreed = restored_text(restored, self._history.furthest), life.agreed
        ranks = self._group().workers[0].world_size
        text = running_text(life.number, ranks, agreed.nodes, agreed.lost, agreed.new, told, after)
        facts = {
            "life": life.number,
            "nodes": list(agreed.nodes),
            "restored_step": step,
            "levels": None if step is None else levels_text(restored),
            "restore_s": restored.get("seconds"),
            "steps_lost": self._history.lost_in(life),
            "after_s": after_s,
        }
        self._reporter.tell("running", text, facts)

    def _wait_for_others(self) -> None:
        """So that the node with the store does not leave before all have ended."""
        if self._group().group_world_size > 1:
            self._elastic()._exit_barrier()

    def _elastic(self) -> Any:
        """This agent without its annotations, which say other things than it does."""
        return self

    def _group(self) -> Any:
        """This node's workers as torch's elastic sees them."""
        return self._elastic()._worker_group

    # ---- the end without a life

    def _stopped_while_waiting(self) -> Ending:
        """Another node's launcher, or this one when it is started again, goes on from what there is."""
        got = self._notice.first or signal.SIGTERM
        what = f"{got.name} while {self._node} waited for other nodes: nothing runs here"
        text = f"{what}{self._known()} (exit code {PREEMPTED})"
        self._reporter.tell("stopped", text, {"exit_code": PREEMPTED}, own=True)
        return Ending(exit_code=PREEMPTED, closes=False)

    def _closed_by_others(self) -> Ending:
        what = f"{self._node}: the job has ended on the other nodes, or one of them has given up"
        text = f"{what}{self._known()} (exit code 1)"
        self._reporter.tell("closed", text, {"exit_code": 1}, own=True)
        return Ending(exit_code=1, closes=False)

    def _known(self) -> str:
        return known_text(self._history.restored, self._history.lost_steps)


def _spec(settings: Settings, handler: RendezvousHandler) -> WorkerSpec:
    """The same as torchrun makes, of the fields that this torch has."""
    config = settings.config
    given = {field.name: getattr(config, field.name) for field in fields(WorkerSpec) if hasattr(config, field.name)}
    given |= {"local_world_size": config.nproc_per_node, "rdzv_handler": handler}
    command = (tethered.__file__, str(os.getpid()), settings.entrypoint, *settings.arguments)
    return WorkerSpec(**given | {"entrypoint": sys.executable, "args": ("-I", "-S", *command)})
