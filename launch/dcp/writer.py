"""DCP's StorageWriter and AsyncStager over a Checkpointer.

    dcp.save          plan (DCP) → write_data: save, wait until it is safe
    dcp.async_save    stage: keep the state dict → reset, on DCP's thread: save, copies done → training goes on
                      → plan (DCP) → write_data: wait until it is safe
    writer.at(step)   its `stage` saves at once and lazily: the training goes on while the copies run

What fails on one rank fails on all: DCP tells it in its own messages, so a failure on the way there is kept until then.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future as Awaitable
from typing import Any

import torch
from torch.distributed.checkpoint import Metadata, SavePlan, SavePlanner, StorageWriter
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint.staging import AsyncStager
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from resilient.checkpoint.checkpointer import Checkpointer
from resilient.checkpoint.handle import LEVELS, SaveHandle
from resilient.errors import LevelFailed, Preempted, UsageError
from resilient.launch.dcp.state import ITEM, StateDict, content_of
from resilient.launch.dcp.steps import names_a_step, step_of
from resilient.policy import Policy

__all__ = ["ResilientWriter"]

_STAGING_S = 600.0


class ResilientWriter(StorageWriter, AsyncStager):
    """Keeps one writer for a whole run: `dcp.save(sd, storage_writer=writer, checkpoint_id=step)`.

    `url`, `policy`: as for Checkpointer; without a policy every checkpoint becomes durable. `until`: the level that
    `dcp.save`, and the future of `dcp.async_save`, wait for; those beyond it follow in the background, and `close`
    waits for them. All ranks use it together.
    """

    def __init__(self, url: str, policy: Policy | None = None, *, until: str = "durable") -> None:
        if until not in LEVELS:
            raise UsageError(f"until={until!r}: give one of {', '.join(LEVELS)}")
        self._url = url
        self._policy = policy if policy is not None else Policy(durable_every=1)
        self._until = until
        self._item = StateDict()
        self._checkpointer: Checkpointer | None = None
        self._step: int | None = None
        self._staged: Mapping[str, Any] | None = None
        self._copied = threading.Event()
        self._handle: SaveHandle | None = None
        self._problem: Exception | None = None
        self._stopped: Preempted | None = None

    def checkpointer(self) -> Checkpointer:
        """What saves. Made when it is first asked for, by all ranks together."""
        if self._checkpointer is None:
            self._checkpointer = Checkpointer(self._url, {ITEM: self._item}, self._policy)
        return self._checkpointer

    def close(self) -> None:
        """Wait until all levels of all checkpoints are written, and end the agent. Safe to repeat."""
        if self._checkpointer is not None:
            self._checkpointer.close()
            self._checkpointer = None

    def exit_if_stopped(self) -> None:
        """Raises Preempted, which ends the program, where all ranks have agreed to stop and the last step is safe.

        Call it after each save: DCP would hide such an exception of its steps. The next save does it too.
        """
        if self._stopped is not None:
            raise self._stopped

    # ---- AsyncStager

    def stage(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """On the training thread. The step is not known yet: the copies are made when DCP's thread says it."""
        self.exit_if_stopped()
        self._staged, self._handle, self._problem = state_dict, None, None
        self._copied.clear()
        return state_dict

    def synchronize_staging(self) -> None:
        """On the training thread: return when the state may change."""
        if not self._copied.wait(_STAGING_S):
            raise LevelFailed(f"{self._url}: the state was not copied within {_STAGING_S:g} s")

    def at(self, step: int) -> AsyncStager:
        """A stager that copies lazily: `dcp.async_save(..., async_stager=writer.at(step))`. Wait for its
        `staging_completion`, or call `writer.checkpointer().fence()`, before the state changes."""
        self.exit_if_stopped()
        return _Lazy(lambda state_dict: self._begin(step, state_dict))

    # ---- StorageWriter

    def reset(self, checkpoint_id: object = None) -> None:
        if self._staged is None and self._handle is None:
            self.exit_if_stopped()
        try:
            self._step = step_of(checkpoint_id)
            if self._staged is not None:
                handle = self._begin(self._step, self._staged)
                if handle is not None:
                    handle.captured.result(_STAGING_S)
        except Exception as error:  # whatever it is, the other ranks wait for this one in the next message
            self._problem = error
        finally:
            self._staged = None
            self._copied.set()

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        self._raise_problem()
        if self._step is None:
            raise UsageError("dcp.save with a ResilientWriter needs checkpoint_id=<step>")

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Blocks until the step is safe at the level `until`."""
        step, self._step = self._step, None
        assert step is not None
        handle, self._handle = self._handle, None
        if self._stopped is None and (handle is None or handle.step != step):
            handle = self._begin_flat(step, *_flattened(planner))
        if handle is not None and self._stopped is None:
            handle.captured.result()
            self._wait(handle)
        done: Future[list[WriteResult]] = Future()
        done.set_result([WriteResult(item.index, item.tensor_storage_size() or 0, None) for item in plan.items])
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Nothing: a snapshot counts when the records of all ranks are there."""

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: object) -> bool:
        return names_a_step(checkpoint_id)

    # ---- inside

    def _begin(self, step: int, state_dict: Mapping[str, Any]) -> SaveHandle | None:
        flat, paths = flatten_state_dict(dict(state_dict))
        self._handle = self._begin_flat(step, flat, paths)
        return self._handle

    def _begin_flat(self, step: int, flat: Mapping[str, Any], paths: Mapping[str, Sequence[Any]]) -> SaveHandle | None:
        """None where the ranks stop here: the step is safe then."""
        checkpointer = self.checkpointer()
        checkpointer.fence()
        self._item.content = content_of(checkpointer.world, flat, paths)
        try:
            return checkpointer.save(step)
        except Preempted as stop:
            self._stopped = stop
            return None

    def _wait(self, handle: SaveHandle) -> None:
        if self._until in handle.levels:
            handle.durable(self._until).result()
        elif handle.levels:
            handle.durable(handle.levels[-1]).result()

    def _raise_problem(self) -> None:
        problem, self._problem = self._problem, None
        if problem is not None:
            raise problem


class _Lazy(AsyncStager):
    """See `ResilientWriter.at`."""

    def __init__(self, begin: Callable[[Mapping[str, Any]], SaveHandle | None]) -> None:
        self._begin = begin

    def stage(self, state_dict: dict[str, Any]) -> "Awaitable[dict[str, Any]]":
        done: Awaitable[dict[str, Any]] = Awaitable()
        handle = self._begin(state_dict)
        if handle is None:
            done.set_result(state_dict)
        else:
            handle.captured.add_done_callback(lambda _: done.set_result(state_dict))
        return done

    def synchronize_staging(self) -> None:
        """Not called for a stager that gives a future."""
        return

    def close(self) -> None:
        return


def _flattened(planner: SavePlanner) -> tuple[Mapping[str, Any], Mapping[str, Sequence[Any]]]:
    flat = getattr(planner, "state_dict", None)
    if not isinstance(flat, dict):
        raise UsageError(
            f"a ResilientWriter needs a planner that keeps the state dict, as DefaultSavePlanner does: {type(planner)}"
        )
    if any(
        isinstance(value, dict) and any(isinstance(one, torch.Tensor) for one in value.values())
        for value in flat.values()
    ):
        flat, paths = flatten_state_dict(flat)
        return flat, paths
    return flat, getattr(planner, "mappings", None) or {name: (name,) for name in flat}
