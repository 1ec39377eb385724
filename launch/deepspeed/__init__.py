"""The door for DeepSpeed: checkpoints of its engines are ours. `docs/deepspeed.md` is for users.

    from resilient.launch.deepspeed import attach
    engine, *_ = deepspeed.initialize(model=model, config=config)  # with a block "resilient": {"url": ...}
    attach(engine)

Neither torch nor DeepSpeed is imported before one of these names is used.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from resilient.launch.deepspeed.accelerator import attach_when_prepared
    from resilient.launch.deepspeed.hook import Hook, attach, initialize

__all__ = ["Hook", "attach", "attach_when_prepared", "initialize"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from resilient.launch.deepspeed import accelerator, hook

        return getattr(accelerator if name == "attach_when_prepared" else hook, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
