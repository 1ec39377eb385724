"""Engines that Accelerate makes, as Hugging Face's Trainer does: attached when they are there, before they load.

    trainer = Trainer(args=TrainingArguments(deepspeed=config, ...), ...)
    attach_when_prepared(trainer.accelerator)
    trainer.train(resume_from_checkpoint=...)

One attribute of this accelerator object is replaced, and put back when its engine is attached.
"""

from collections.abc import Mapping
from functools import wraps
from typing import Any

from resilient.errors import UsageError
from resilient.launch.deepspeed.hook import attach


def attach_when_prepared(accelerator: Any, *, state: Mapping[str, object] | None = None) -> None:
    """Have `accelerator.prepare` attach the engine that it makes; if it has made one, attach it now.

    `state`: as for `attach`, which raises then what it raises. Raises UsageError for an accelerator without a
    DeepSpeed plugin.
    """
    if getattr(getattr(accelerator, "state", None), "deepspeed_plugin", None) is None:
        raise UsageError(f"{type(accelerator).__name__} has no DeepSpeed plugin: give it a DeepSpeed configuration")
    if _engine_of(accelerator) is not None:
        attach(_engine_of(accelerator), state=state)
        return
    prepare = accelerator.prepare

    @wraps(prepare)
    def attaching(*arguments: Any, **how: Any) -> Any:
        made = prepare(*arguments, **how)
        engine = _engine_of(accelerator)
        if engine is not None:
            del accelerator.prepare
            attach(engine, state=state)
        return made

    accelerator.prepare = attaching


def _engine_of(accelerator: Any) -> Any:
    return getattr(getattr(accelerator, "deepspeed_engine_wrapped", None), "engine", None)
