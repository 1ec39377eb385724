"""Lightning: a callback that keeps every step and goes on where the run was, and a CheckpointIO without pickle.

    Trainer(callbacks=[ResilientCallback("s3://bucket/run")]).fit(module)
    Trainer(plugins=[ResilientCheckpointIO()])  # or AsyncCheckpointIO(ResilientCheckpointIO())

What belongs to a step is done only when the next batch begins (validation, callbacks), so that is when it is saved; how
far the loops and the loader are is of the end of the batch, which is where Lightning can take them up. Only hooks and
`state_dict`s of Lightning are used, but where the loaders are brought to where they were. The CheckpointIO is in
`lightning_io.py`; docs/integrations.md is for users.
"""

import logging
import os
from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from resilient.checkpoint.checkpointer import Checkpointer
from resilient.checkpoint.rng import capture_rng, restore_rng
from resilient.errors import UsageError
from resilient.policy import Policy

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError as error:
    raise UsageError(f"Lightning cannot be used ({error}): pip install 'torch-resilient[lightning]'") from error

from resilient.launch.lightning_io import ResilientCheckpointIO

__all__ = ["ResilientCallback", "ResilientCheckpointIO"]

_log = logging.getLogger("resilient")


class ResilientCallback(Callback):
    """Saves after every optimizer step; `fit` goes on from the newest snapshot. See the module.

    `url`, `policy`: as for Checkpointer. One callback serves one Trainer. Raises UsageError, and what Checkpointer
    raises. After a preemption notice `resilient.Preempted` leaves `fit`.
    """

    def __init__(self, url: str, policy: Policy | None = None) -> None:
        if not isinstance(url, str | os.PathLike) or not os.fspath(url):
            raise UsageError(f"ResilientCallback({url!r}): give the url or folder where durable snapshots go")
        self._url = os.fspath(url)
        self._policy = Policy.from_environment(policy)
        self._saved = 0
        self._position: dict[str, Any] = {}  # of the loops, and the random generators when the epoch began
        self._rng: Mapping[str, Any] | None = None  # of the snapshot, until the first batch begins
        self.checkpointer: Checkpointer | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Modules, optimizers and strategy are made by now; the first batch is not drawn yet."""
        if self.checkpointer is not None or sum(isinstance(one, ResilientCallback) for one in _callbacks(trainer)) > 1:
            raise UsageError("ResilientCallback is in use by another Trainer, or there twice: give each Trainer one")
        self._position = {"loops": {}, "epoch_rng": {}}
        self.checkpointer = Checkpointer(self._url, _state_of(trainer, self._position), self._policy)
        self._saved = self.checkpointer.restore() or 0
        if not self._saved:
            self._before_data()
            return
        if trainer.ckpt_path is not None:
            raise UsageError(
                f"{self._url} has step {self._saved} of this run, and ckpt_path asks for {trainer.ckpt_path}: leave "
                "out ckpt_path to go on, or give another url to begin anew"
            )
        trainer.fit_loop.load_state_dict(deepcopy(self._position["loops"]))
        self._rng = capture_rng()
        self._before_data()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._rng is not None:
            _take_up_loaders(trainer, self._position["epoch_rng"])

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The loaders of later epochs are asked after this."""
        if self._rng is None and trainer.current_epoch:
            self._before_data()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._rng is not None:
            restore_rng(self._rng)
            self._rng = None
        self._save(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step > self._saved:
            self._position["loops"] = deepcopy(trainer.fit_loop.state_dict())

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From the end of an epoch Lightning begins the next one with fresh loaders.

        Those that keep their position draw for it when they are asked here, and again in a job that comes back.
        """
        rng = capture_rng()
        self._position["loops"] = deepcopy(trainer.fit_loop.state_dict())
        restore_rng(rng)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._save(trainer, durable=self._policy.durable_every > 0)
        if self.checkpointer is not None:
            self.checkpointer.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """The memory stays for the job that comes back."""
        self._leave()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._leave()

    def _leave(self) -> None:
        if self.checkpointer is not None:
            self.checkpointer.close(keep_memory=True)
            self.checkpointer = None

    def _before_data(self) -> None:
        """Loaders shuffle with what they draw now: keep it, or in an epoch that goes on let it be what it was."""
        if self._rng is None:
            self._position["epoch_rng"] = capture_rng()
        else:
            restore_rng(self._position["epoch_rng"])

    def _save(self, trainer: Trainer, *, durable: bool = False) -> None:
        if self.checkpointer is not None and trainer.global_step > self._saved:
            self._saved = trainer.global_step
            self.checkpointer.save(self._saved, durable=durable)


class _Stateful:
    """An object of the state that is what two functions say."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer


class _Callbacks(_Stateful):
    """The state of all other callbacks: what EarlyStopping and ModelCheckpoint have seen."""

    def state_dict(self) -> dict[str, Any]:
        found = {one.state_key: one.state_dict() for one in self._others()}
        return {key: state for key, state in found.items() if state}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        for one in self._others():
            if one.state_key in saved:
                one.load_state_dict(deepcopy(saved[one.state_key]))

    def _others(self) -> list[Callback]:
        return [one for one in _callbacks(self._trainer) if not isinstance(one, ResilientCallback)]


class _Module(_Stateful):
    """What the module puts into a checkpoint by itself (`on_save_checkpoint`)."""

    def state_dict(self) -> dict[str, Any]:
        made: dict[str, Any] = {"state_dict": {}}
        self._trainer.lightning_module.on_save_checkpoint(made)
        return {name: value for name, value in made.items() if name != "state_dict"}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        self._trainer.lightning_module.on_load_checkpoint({"state_dict": {}, **deepcopy(dict(saved))})


def _callbacks(trainer: Trainer) -> list[Callback]:
    found: list[Callback] = getattr(trainer, "callbacks")  # noqa: B009 - given to Trainer by another module
    return found


def _state_of(trainer: Trainer, position: dict[str, Any]) -> dict[str, object]:
    state: dict[str, object] = {
        "model": trainer.strategy.model,
        "callbacks": _Callbacks(trainer),
        "module": _Module(trainer),
        "position": position,
    }
    state |= _numbered("optimizer", trainer.optimizers)
    state |= _numbered("scheduler", [config.scheduler for config in trainer.lr_scheduler_configs])
    if trainer.precision_plugin.state_dict():
        state["precision"] = trainer.precision_plugin
    datamodule: Any = getattr(trainer, "datamodule", None)
    return state if datamodule is None else state | {"datamodule": datamodule}


def _numbered(name: str, values: list[Any]) -> dict[str, object]:
    """ "optimizer" where there is one, else "optimizer0", "optimizer1"."""
    return {name if len(values) == 1 else f"{name}{number}": value for number, value in enumerate(values)}


def _take_up_loaders(trainer: Trainer, epoch_rng: Mapping[str, Any]) -> None:
    """Bring the loaders to where they were, in what Lightning leaves undone.

    In a begun epoch those that do not keep their position are wound on. As an epoch begins those that do keep it have
    to end the one before: how they shuffle may follow from that.
    """
    loop: Any = trainer.fit_loop
    fetcher, combined = getattr(loop, "_data_fetcher", None), getattr(loop, "_combined_loader", None)
    if fetcher is None or combined is None:
        _log.warning("this version of Lightning does not show its loaders: the epoch's data begin anew")
        return
    keeping = [loader for loader in combined.flattened if hasattr(loader, "load_state_dict")]
    if loop.restarting and not keeping:
        for loader in combined.flattened:
            _set_epoch(loader, loop.epoch_progress.current.processed)
        for _ in range(loop.epoch_loop.batch_progress.current.processed):
            next(fetcher.iterator)
    elif not loop.restarting and keeping:
        for loader, state in zip(keeping, getattr(loop, "_combined_loader_states_to_load", []), strict=True):
            loader.load_state_dict(state)
            for _ in loader:
                pass
        restore_rng(epoch_rng)
        iter(fetcher)


def _set_epoch(loader: Any, epoch: int) -> None:
    """Samplers that shuffle by the number of the epoch (DistributedSampler) hear of it from Lightning only later."""
    for sampler in (getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None)):
        set_epoch = getattr(sampler, "set_epoch", None)
        if callable(set_epoch):
            set_epoch(epoch)
