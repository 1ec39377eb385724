"""Resilience for distributed PyTorch training: every step safe, for the price of a background copy.

    checkpointer = resilient.Checkpointer(url, state={"model": model, "optimizer": optimizer})
    start = checkpointer.restore()
    ...
    checkpointer.save(step)

This package only re-exports. The names are loaded when they are first used, so that the agent, which never touches a
tensor, need not import torch. Errors are in `resilient.errors`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from resilient.checkpoint.checkpointer import Checkpointer as Checkpointer
    from resilient.checkpoint.handle import SaveHandle as SaveHandle
    from resilient.checkpoint.protected import protect as protect
    from resilient.errors import Preempted as Preempted
    from resilient.errors import ResilientError as ResilientError
    from resilient.policy import Policy as Policy

__version__ = "0.1.0"
__all__ = ["Checkpointer", "Policy", "Preempted", "ResilientError", "SaveHandle", "protect"]

_HOMES = {
    "Checkpointer": "resilient.checkpoint.checkpointer",
    "Policy": "resilient.policy",
    "Preempted": "resilient.errors",
    "ResilientError": "resilient.errors",
    "SaveHandle": "resilient.checkpoint.handle",
    "protect": "resilient.checkpoint.protected",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'resilient' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
