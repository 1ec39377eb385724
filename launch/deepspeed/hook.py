"""The hook: `save_checkpoint` and `load_checkpoint` of one DeepSpeed engine become ours.

    attach      reads the block of the configuration, makes a Checkpointer over the engine's state, and replaces four
                attributes of this engine object; DeepSpeed itself is left as it is
    the fence   before `_take_model_step`, through which every engine (a pipeline's too) changes parameters
    saving      lazy; the names (tags) are noted in the program's folder by a thread (`folder.py`)
    loading     what the folder and the tag stand for (`loading.py`), by the Checkpointer, or, where the checkpoint is
                of another kind, by `formats/deepspeed_restore.py`

All ranks call all of it together, from the training thread, as they do DeepSpeed's own.
"""

import importlib
import logging
import os
import sys
import weakref
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from resilient.checkpoint.checkpointer import Checkpointer
from resilient.checkpoint.formats.deepspeed_engine import flats
from resilient.checkpoint.formats.deepspeed_restore import restore
from resilient.checkpoint.handle import SaveHandle
from resilient.checkpoint.levels.open import open_store
from resilient.checkpoint.names import complete_steps
from resilient.checkpoint.place import normal_url
from resilient.errors import Preempted, ResilientError, UsageError
from resilient.launch.deepspeed.config import BLOCK, HookConfig, check_version, no_engine, not_installed, other_engine
from resilient.launch.deepspeed.engine_model import EngineModel
from resilient.launch.deepspeed.engine_objects import EngineCounters, LossScaler
from resilient.launch.deepspeed.engine_optimizer import EngineOptimizer
from resilient.launch.deepspeed.folder import Looked, Notes, Tag, look
from resilient.launch.deepspeed.loading import Choice, choose

_log = logging.getLogger("resilient")
_REPLACED = ("save_checkpoint", "load_checkpoint", "_take_model_step", "destroy")
_FOREIGN = ("MiCS", "ZenFlow", "SuperOffload")
_NAMES = ("model", "optimizer", "engine", "lr_scheduler", "loss_scaler", "grad_scaler", "client_state")


def initialize(*arguments: Any, state: Mapping[str, object] | None = None, **how: Any) -> tuple[Any, ...]:
    """`deepspeed.initialize`, and `attach` to the engine it makes. `state`: as for `attach`; all else is DeepSpeed's.

    Raises UsageError where DeepSpeed is not installed, and what both raise.
    """
    try:
        deepspeed = importlib.import_module("deepspeed")
    except ImportError as error:
        raise not_installed(error) from error
    made: tuple[Any, ...] = deepspeed.initialize(*arguments, **how)
    attach(made[0], state=state)
    return made


def attach(engine: Any, *, state: Mapping[str, object] | None = None) -> "Hook":
    """Make the checkpoints of an engine that `deepspeed.initialize` has made ours. Collective; blocks until the agents
    are there.

    The engine's configuration has the block "resilient" (docs/deepspeed.md). `state`: what else belongs to the job, by
    name, as for `Checkpointer`: a data loader, objects of the program. `engine.resilient` is the hook from then on.

    Raises UsageError for no engine, a block that is missing or wrong, an engine that is attached already or whose
    optimizer is not known; PolicyError; StateError for what cannot be saved, by name.
    """
    missing = [name for name in (*_REPLACED, "param_names", "module") if not hasattr(engine, name)]
    if missing:
        raise no_engine(type(engine).__name__, missing, getattr(sys.modules.get("deepspeed"), "__version__", None))
    if any(name in vars(engine) for name in _REPLACED):
        raise UsageError("this engine is attached already")
    _refuse(getattr(engine, "optimizer", None))
    advice = check_version(importlib.import_module("deepspeed").__version__)
    if advice is not None:
        _log.warning("%s", advice)
    try:
        return Hook(engine, HookConfig.of(engine._config._param_dict), state or {})
    except AttributeError as error:
        if advice is None:
            raise
        raise other_engine(error, advice) from error


def _refuse(optimizer: Any) -> None:
    """Raises UsageError for engines that keep their state where this hook does not look."""
    if optimizer is None:
        raise UsageError("the engine has no optimizer: there is no training to protect")
    name = type(optimizer).__name__
    if name.startswith(_FOREIGN):
        raise UsageError(f"the engine's optimizer is a {name}, whose partitions are not known here: use plain ZeRO")
    if getattr(optimizer, "params_in_nvme_and_cpu", False):
        raise UsageError("the engine keeps parameters on NVMe, where they are not seen: offload them to the CPU")


class Hook:
    """What `attach` makes. `checkpointer` does the work; `client_state` is what the program gave to the last save, or
    what was loaded, and may be changed between automatic saves."""

    def __init__(self, engine: Any, config: HookConfig, state: Mapping[str, object]) -> None:
        for name in state:
            if name in _NAMES:
                raise UsageError(f"attach(state={{{name!r}: ...}}): this name is the engine's; choose another")
        flats(engine)  # an optimizer that is not known is refused here
        self._engine = engine
        self._config = config
        self._url = normal_url(config.url)
        self._counters = EngineCounters(engine)
        self.client_state: dict[str, Any] = {}
        self.checkpointer = Checkpointer(config.url, {**self._state(), **state}, config.policy)
        self._notes = Notes(self._url) if self._writes_names() else None
        if self._notes is not None:  # a program may end without close or destroy
            weakref.finalize(self, self._notes.close)
        self._saved: int | None = None  # the last step that was saved in this life
        self._handle: SaveHandle | None = None
        self._named: SaveHandle | None = None  # the last one that `latest` is to name
        self._closed = False
        self._originals: dict[str, Callable[..., Any]] = {name: getattr(engine, name) for name in _REPLACED}
        for name, ours in (
            ("save_checkpoint", self.save_checkpoint),
            ("load_checkpoint", self.load_checkpoint),
            ("_take_model_step", self._take_model_step),
            ("destroy", self._destroy),
        ):
            setattr(engine, name, ours)
        setattr(engine, BLOCK, self)

    def save_checkpoint(
        self,
        save_dir: str,
        tag: str | None = None,
        client_state: Mapping[str, Any] | None = None,
        save_latest: bool = True,
        exclude_frozen_parameters: bool = False,
    ) -> bool:
        """As DeepSpeed's, and returns at once: the copies run behind, until the next optimizer step. Where this step is
        saved already, and is to be durable or to have a client state, it waits first until that is whole in memory.

        `save_dir/latest` names the tag when the step is durable on all ranks (`save_latest`). Frozen parameters are
        always saved. Raises StateError for a client state that cannot be saved, Preempted, UsageError after `close`.
        """
        if not save_dir:
            raise ValueError(f"save_dir must be a non-empty string, got {save_dir!r}")
        step = self._engine.global_steps
        name = f"global_step{step}" if tag is None else str(tag)
        folder, client = os.fspath(save_dir), dict(client_state or {})
        if not self._has(step, client):
            self._let_settle(step)
            self.client_state.clear()
            self.client_state.update(client)
            self._counters.tag = name
            try:
                self._save(step, durable=self._config.every_step)
            except Preempted as stopped:
                self._note_stop(folder, name, step, durable=stopped.code == Preempted.SAFE, latest=save_latest)
                raise
        self._note(folder, name, step, latest=save_latest)
        return True

    def load_checkpoint(
        self,
        load_dir: str,
        tag: str | None = None,
        load_module_strict: bool = True,
        load_optimizer_states: bool = True,
        load_lr_scheduler_states: bool = True,
        load_module_only: bool = False,
        custom_load_fn: Callable[..., Any] | None = None,
    ) -> tuple[str | None, dict[str, Any] | None]:
        """As DeepSpeed's: (path, client state), or (None, None) where there is nothing to load.

        Without a tag: the newest complete snapshot of any level, memory too, of those that `load_dir` names (of all,
        where it names none, or snapshots are taken at every step). Else a checkpoint of DeepSpeed's in that folder.
        Another world size or ZeRO stage needs no conversion. Blocks. Raises what `Checkpointer.restore` raises.
        """
        if custom_load_fn is not None:
            raise UsageError("load_checkpoint(custom_load_fn=...): load such a checkpoint before you attach the engine")
        folder = os.fspath(load_dir)
        chosen = self._choose(folder, tag)
        weights_only = load_module_only or not load_optimizer_states
        scheduler = self._engine.lr_scheduler
        kept = scheduler.state_dict() if scheduler is not None and not load_lr_scheduler_states else None
        found = self._load_weights(chosen) if weights_only else self._load(chosen)
        if scheduler is not None and kept is not None:
            scheduler.load_state_dict(kept)
        if found is None:
            _log.warning("nothing to load: %s", chosen.reason)
            return None, None
        return os.path.join(folder, tag or found), dict(self.client_state)

    def close(self, *, keep_memory: bool = False) -> list[str]:
        """Wait until what was saved is as durable as the policy says, then leave the engine as it was before `attach`.

        Returns what failed since the last save, one line each. `engine.destroy()` calls it. Safe to repeat.
        """
        self.checkpointer.fence()
        if self._named is not None and not self._closed:  # rank 0: `latest` waits for all ranks
            _await(self._named, "durable", self._config.policy.write_timeout_s)
        self._closed = True
        problems = self.checkpointer.close(keep_memory=keep_memory)
        self._end_notes()
        for name in _REPLACED:
            if vars(self._engine).get(name) is not None:
                delattr(self._engine, name)
        return problems

    # ---- saving

    def _state(self) -> dict[str, object]:
        engine = self._engine
        state: dict[str, object] = {
            "model": EngineModel(engine),
            "optimizer": EngineOptimizer(engine),
            "engine": self._counters,
            "client_state": self.client_state,
        }
        optional = {
            "lr_scheduler": engine.lr_scheduler,
            "loss_scaler": LossScaler.of(engine),
            "grad_scaler": getattr(engine, "torch_autocast_z0_gradscaler", None),
        }
        return state | {name: value for name, value in optional.items() if value is not None}

    def _take_model_step(self, *arguments: Any) -> None:
        """Every change of parameters goes through here: the fence, then DeepSpeed's own step.

        By then what was saved has its name too, which is written while forward and backward run.
        """
        self.checkpointer.fence()
        if self._notes is not None:
            self._notes.settle()
        self._originals["_take_model_step"](*arguments)
        if self._config.every_step:
            self._counters.tag = None
            self._save(self._engine.global_steps)

    def _save(self, step: int, *, durable: bool = False) -> None:
        self._handle = self.checkpointer.save(step, durable=durable)
        self._saved = step

    def _has(self, step: int, client: Mapping[str, Any]) -> bool:
        """Whether the last save was of this step, and will do: two names may stand for one snapshot."""
        if self._saved is None or self._handle is None or self._saved != step:
            return False
        return not client and ("durable" in self._handle.levels or not self._config.every_step)

    def _let_settle(self, step: int) -> None:
        """Two attempts at one step must not meet: ranks that run apart could take an image of one for the other's."""
        if self._saved == step and self._handle is not None:
            _await(self._handle, "memory", self._config.policy.fence_timeout_s)

    def _writes_names(self) -> bool:
        engine = self._engine
        return bool((engine.local_rank if engine.use_node_local_storage() else engine.global_rank) == 0)

    def _note(self, folder: str, name: str, step: int, *, latest: bool) -> None:
        notes, handle = self._notes, self._handle
        if notes is None or handle is None:
            return
        durable = "durable" in handle.levels
        number = notes.began(folder, name, step, durable=durable)
        if latest and durable:
            self._named = handle
            handle.durable("durable").add_done_callback(
                lambda done: notes.safe(folder, name, step, number) if done.exception() is None else None
            )

    def _note_stop(self, folder: str, name: str, step: int, *, durable: bool, latest: bool) -> None:
        """The ranks have stopped after this step, which is as safe as was asked for."""
        self._closed = True
        if self._notes is not None:
            number = self._notes.began(folder, name, step, durable=durable)
            if durable and latest:
                self._notes.safe(folder, name, step, number)
        self._end_notes()

    def _end_notes(self) -> None:
        if self._notes is not None:
            self._notes.close()

    def _destroy(self) -> None:
        destroy = self._originals["destroy"]
        self.close()
        destroy()

    # ---- loading

    def _choose(self, folder: str, tag: str | None) -> Choice:
        """All ranks choose by what rank 0 sees."""
        world = self.checkpointer.world

        def looked() -> Any:
            if world.rank:
                return None
            seen = look(folder, tag)
            return [{name: [one.url, one.step] for name, one in seen.tags.items()}, seen.foreign]

        tags, foreign = world.gather_results(looked)[0]
        seen = Looked(tags={name: Tag(url=url, step=step) for name, (url, step) in tags.items()}, foreign=foreign)
        return choose(folder, tag, seen, self._url, every_step=self._config.every_step)

    def _load(self, chosen: Choice) -> str | None:
        """The tag of what was loaded; None where there is nothing."""
        step = self.checkpointer.restore(chosen.steps)
        if step is None and chosen.other_url is not None:
            return self._read(chosen.other_url, chosen.other_step)
        self._saved = None
        return None if step is None else self._counters.tag or f"global_step{step}"

    def _load_weights(self, chosen: Choice) -> str | None:
        """Parameters and buffers alone, which are read from where they are durable."""
        world = self.checkpointer.world

        def durable() -> list[int]:
            return [] if world.rank else sorted(complete_steps(open_store(self._url).list()))

        steps = [one for one in world.gather_results(durable)[0] if chosen.steps is None or one in chosen.steps]
        if steps:
            self._read(self._url, steps[-1], weights_only=True)
            return f"global_step{steps[-1]}"
        if chosen.other_url is None:
            return None
        return self._read(chosen.other_url, chosen.other_step, weights_only=True)

    def _read(self, url: str, step: int | None, *, weights_only: bool = False) -> str:
        """A checkpoint of any format that is no snapshot of this run, or not to be taken as one."""
        self.checkpointer.fence()
        client = restore(self._engine, url, step=step, weights_only=weights_only)
        self.client_state.clear()
        self.client_state.update(client)
        self._saved = None
        return os.path.basename(url.rstrip("/"))


def _await(handle: SaveHandle, level: str, timeout_s: float) -> None:
    """Until a snapshot has reached a level on all ranks, or will not."""
    with suppress(ResilientError, TimeoutError):
        handle.durable(level).result(timeout_s)
        handle.captured.result(timeout_s)
