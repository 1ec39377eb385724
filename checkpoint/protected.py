"""`protect`: a Checkpointer that its optimizer drives, so that a training script needs one line.

A step ends when the optimizer's `step()` returns, but what a program changes after that is part of it: the steps of
schedulers and other optimizers, the scaler's update, averages of the model. Where the state has such, the snapshot is
begun when the model is called next. Data loaders, random generators and a program's own objects are nevertheless kept
as they were right after the step, for the next batch may have been drawn by then.
"""

from types import TracebackType
from typing import Any, Self

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from resilient.checkpoint.checkpointer import Checkpointer
from resilient.checkpoint.compiling import uncompiled
from resilient.checkpoint.extras import Captured
from resilient.policy import Policy

_CHANGED_LATER = (LRScheduler, torch.amp.GradScaler, Optimizer, torch.nn.Module, torch.Tensor)


def protect(
    model: torch.nn.Module,
    optimizer: Optimizer,
    url: str,
    *,
    policy: Policy | None = None,
    **state: object,
) -> "Protected":
    """Restore, and save after every optimizer step by itself: the whole library in one call.

    `state`: further items, by name, as for Checkpointer. `protected.step` is the number of steps done so far (0 in a
    fresh job); end with `protected.close()`. With a scheduler, a gradient scaler, another optimizer, module or tensor
    among the items the save of a step is begun by the next call of `model`, or by `optimizer`'s next step where it is
    not called. Where `model` is called again before all of that has changed, make a Checkpointer and call its `save`.
    """
    checkpointer = Checkpointer(url, {"model": model, "optimizer": optimizer, **state}, policy)
    late = frozenset(name for name, value in state.items() if isinstance(value, _CHANGED_LATER))
    return Protected(checkpointer, model, optimizer, late)


class Protected:
    """A Checkpointer that is driven by its optimizer. Made by `protect`; a context manager."""

    def __init__(
        self, checkpointer: Checkpointer, model: torch.nn.Module, optimizer: Optimizer, late: frozenset[str]
    ) -> None:
        """`late`: items that the program changes after the optimizer's step and that belong to it."""
        self.checkpointer = checkpointer
        self.step = checkpointer.restore() or 0
        self._late = late
        self._early: Captured | None = None  # of a step that is still to be saved
        self._hooks: list[Any] = [optimizer.register_step_post_hook(self._after_step)]
        if late:
            # Before FSDP's own hook, which puts other tensors in the place of the parameters.
            self._hooks.append(model.register_forward_pre_hook(self._before_forward, prepend=True))
            self._hooks.append(optimizer.register_step_pre_hook(self._before_step))

    def close(self) -> list[str]:
        """As Checkpointer.close, after the last step is saved; the optimizer is left alone from then on."""
        self._leave()
        return self.checkpointer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leave()
        self.checkpointer.__exit__(kind, error, trace)

    def _leave(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._save_waiting()

    @uncompiled
    def _after_step(self, *_: object) -> None:
        self.step += 1
        if self._late:
            self._early = self.checkpointer._extras.capture_objects(self._late)
        else:
            self.checkpointer.save(self.step)

    @uncompiled
    def _before_forward(self, *_: object) -> None:
        self._save_waiting()

    @uncompiled
    def _before_step(self, *_: object) -> None:
        if self._early is not None:
            self._save_waiting()
            self.checkpointer.fence()

    def _save_waiting(self) -> None:
        early, self._early = self._early, None
        if early is not None and not self.checkpointer._closed:
            self.checkpointer._save(self.step, early)
