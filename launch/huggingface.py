"""Hugging Face's Trainer: a callback that keeps every step, and goes on where the run was.

    callback = ResilientCallback("s3://bucket/run")
    trainer = Trainer(..., callbacks=[callback])
    callback.train(trainer)  # instead of trainer.train()

Trainer fixes how many batches it will skip before any callback is asked. So `train` asks first which step there is,
starts Trainer from a folder that says no more than that, and the callback fills model, optimizer, scheduler, scaler,
TrainerState and random generators from the snapshot. Nothing of Trainer is replaced. docs/integrations.md is for users.
"""

import logging
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import fields
from math import ceil
from tempfile import TemporaryDirectory
from typing import Any

from resilient.checkpoint.checkpointer import Checkpointer
from resilient.checkpoint.rng import capture_rng, restore_rng
from resilient.errors import UsageError
from resilient.policy import Policy

try:
    from safetensors.torch import save_file
    from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
    from transformers.trainer import TRAINER_STATE_NAME
    from transformers.trainer_callback import ExportableState
    from transformers.trainer_utils import TrainOutput
    from transformers.utils import SAFE_WEIGHTS_NAME
except ImportError as error:
    raise UsageError(
        f"the Hugging Face Trainer cannot be used ({error}): pip install 'torch-resilient[huggingface]'"
    ) from error

__all__ = ["ResilientCallback"]

_log = logging.getLogger("resilient")
_MOST_STARTS = 3  # a start is wasted only where a snapshot turned out to be damaged


class ResilientCallback(TrainerCallback):
    """Saves after every optimizer step, when all that belongs to it (logs, evaluation) is done; see the module.

    `url`, `policy`: as for Checkpointer. One callback serves one Trainer. Raises UsageError where Trainer is started
    without it, and what Checkpointer raises. After a preemption notice `resilient.Preempted` leaves `train`.
    """

    def __init__(self, url: str, policy: Policy | None = None) -> None:
        if not isinstance(url, str | os.PathLike) or not os.fspath(url):
            raise UsageError(f"ResilientCallback({url!r}): give the url or folder where durable snapshots go")
        self._url = os.fspath(url)
        self._policy = Policy.from_environment(policy)
        self._trainer: Trainer | None = None
        self._expected = 0  # the step from which Trainer was told to go on
        self._saved = 0
        self._rng: Mapping[str, Any] | None = None  # of the snapshot, until the first step begins
        self.checkpointer: Checkpointer | None = None

    def train(self, trainer: Trainer, **options: Any) -> Any:
        """As `trainer.train(**options)`, from the newest snapshot that there is. Collective."""
        self._check(trainer, options)
        self._trainer = trainer
        try:
            self._expected = self._newest()
            for _ in range(_MOST_STARTS):
                try:
                    with _resume_folder(trainer.args, self._expected) as folder:
                        return trainer.train(resume_from_checkpoint=folder, **options)
                except _Finished:
                    trainer.is_in_train = False
                    _log.info("the run is finished: it has done its %d steps", self._saved)
                    return TrainOutput(self._saved, 0.0, {})
                except _OtherStep as other:
                    _log.warning("Trainer starts again, from step %d: what is newer is damaged", other.step)
                    self._expected = other.step
            raise UsageError(f"{self._url}: snapshots are found and lost again; is another job writing to them?")
        finally:
            self._trainer = None
            self._leave()

    def _check(self, trainer: Trainer, options: Mapping[str, Any]) -> None:
        callbacks = [each for each in trainer.callback_handler.callbacks if isinstance(each, ResilientCallback)]
        if callbacks != [self]:
            what = "is not among its callbacks" if self not in callbacks else "is there with another, or twice"
            raise UsageError(
                f"ResilientCallback.train(trainer): the callback {what}: Trainer(..., callbacks=[callback])"
            )
        if self._trainer is not None:
            raise UsageError("ResilientCallback.train(trainer) was called while it trains: give each Trainer its own")
        if options.get("resume_from_checkpoint") is not None:
            raise UsageError("ResilientCallback.train(trainer) finds out by itself where to resume from")
        if trainer.is_deepspeed_enabled:
            raise UsageError(
                'Trainer with DeepSpeed needs no callback: put a block "resilient" into its DeepSpeed configuration, '
                "and call resilient.launch.deepspeed.attach_when_prepared(trainer.accelerator)"
            )
        if trainer.is_fsdp_enabled:
            raise UsageError(
                "Trainer with FSDP cannot go on from a snapshot, it only reads checkpoints of its own: use DDP or "
                "DeepSpeed, or Accelerate and a Checkpointer (docs/integrations.md)"
            )

    def _newest(self) -> int:
        with Checkpointer(self._url, {"looking": {}}, self._policy) as looking:
            step = looking.newest() or 0
            looking.close(keep_memory=True)
        return step

    # ---- what Trainer calls

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        train_dataloader: Any = None,
        **_: Any,
    ) -> None:
        """All is made by now and the first batch is not drawn yet."""
        trainer = self._trainer
        if trainer is None:
            raise UsageError("start with ResilientCallback.train(trainer), or Trainer begins at step 0 every time")
        self._leave()  # where Trainer starts anew, say with a smaller batch
        self.checkpointer = Checkpointer(self._url, _state_of(trainer), self._policy)
        self._saved = self.checkpointer.restore() or 0
        if self._saved != self._expected:
            raise _OtherStep(self._saved)
        if _would_overshoot(args, state, self._saved, train_dataloader):
            raise _Finished
        self._rng = capture_rng() if self._saved else None

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """The batches of the next step are there, which may have taken random numbers."""
        if self._rng is not None:
            restore_rng(self._rng)
            self._rng = None
        self._save(state.global_step)

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """The last step has none after it, and after the end of training the model may become another."""
        if control.should_training_stop and self.checkpointer is not None:
            self._save(state.global_step, durable=self._policy.durable_every > 0)
            self.checkpointer.fence()  # before the best model is loaded into this one

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.checkpointer is not None:
            self.checkpointer.close()
            self.checkpointer = None

    def _leave(self) -> None:
        """Something went wrong, or begins anew: what is in memory stays there."""
        if self.checkpointer is not None:
            self.checkpointer.close(keep_memory=True)
            self.checkpointer = None

    def _save(self, step: int, *, durable: bool = False) -> None:
        if self.checkpointer is not None and step > self._saved:
            self._saved = step
            self.checkpointer.save(step, durable=durable)


class _OtherStep(Exception):
    """The snapshot that was restored is not the one that Trainer was started from."""

    def __init__(self, step: int) -> None:
        super().__init__(f"step {step}")
        self.step = step


class _Finished(Exception):
    """All steps have been done; Trainer would do another."""


def _would_overshoot(args: TrainingArguments, state: TrainerState, step: int, loader: Any) -> bool:
    """Whether the run is finished and Trainer would not see it: it looks only after a step, or where an epoch ends."""
    if not 0 < state.max_steps <= step or not hasattr(loader, "__len__"):
        return False
    return step % max(1, ceil(len(loader) / args.gradient_accumulation_steps)) != 0


class _Progress:
    """TrainerState, and the state of the callbacks that have some (EarlyStoppingCallback), as one object."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer

    def state_dict(self) -> dict[str, Any]:
        kept = {one.name: getattr(self._trainer.state, one.name) for one in fields(TrainerState)}
        del kept["stateful_callbacks"]
        return {"state": kept, "callbacks": [callback.state()["attributes"] for callback in self._stateful()]}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """What this process was told anew (how long to train, how often to log) stays."""
        state = self._trainer.state
        for name in saved["state"].keys() & _CARRIED:
            setattr(state, name, deepcopy(saved["state"][name]))
        for callback, attributes in zip(self._stateful(), saved["callbacks"], strict=False):
            for name, value in attributes.items():
                setattr(callback, name, value)

    def _stateful(self) -> list[ExportableState]:
        return [each for each in self._trainer.callback_handler.callbacks if isinstance(each, ExportableState)]


_CARRIED = frozenset(
    "epoch global_step num_input_tokens_seen total_flos log_history best_metric best_global_step "
    "best_model_checkpoint".split()
)


def _state_of(trainer: Trainer) -> dict[str, object]:
    optimizer: Any = trainer.optimizer
    scaler = getattr(optimizer, "scaler", None)
    state: dict[str, object] = {
        "model": trainer.model_wrapped,
        "optimizer": getattr(optimizer, "optimizer", optimizer),  # what Accelerate has wrapped
        "trainer": _Progress(trainer),
    }
    if trainer.lr_scheduler is not None:
        state["scheduler"] = trainer.lr_scheduler
    return state if scaler is None else state | {"scaler": scaler}


def _resume_folder(args: TrainingArguments, step: int) -> "AbstractContextManager[str | None]":
    """A checkpoint for Trainer that has the step and nothing else; None for a run that begins."""
    return _ResumeFolder(args, step) if step else nullcontext()


class _ResumeFolder:
    """See `_resume_folder`. Trainer wants weights as well, and says that all of them are missing: that is not told."""

    def __init__(self, args: TrainingArguments, step: int) -> None:
        self._args = args
        self._step = step
        self._folder = TemporaryDirectory(prefix="resilient-")
        self._logger = logging.getLogger("transformers.trainer")

    def __enter__(self) -> str:
        folder = self._folder.name
        state = TrainerState(global_step=self._step, train_batch_size=self._args.train_batch_size)
        for name in ("logging_steps", "eval_steps", "save_steps"):
            setattr(state, name, getattr(self._args, name))
        state.save_to_json(os.path.join(folder, TRAINER_STATE_NAME))
        save_file({}, os.path.join(folder, SAFE_WEIGHTS_NAME), metadata={"format": "pt"})
        self._logger.addFilter(_not_about_missing_keys)
        return folder

    def __exit__(self, *_: object) -> None:
        self._logger.removeFilter(_not_about_missing_keys)
        self._folder.cleanup()


def _not_about_missing_keys(record: logging.LogRecord) -> bool:
    return "missing keys" not in record.getMessage()
