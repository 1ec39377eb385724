"""Keeps torch's compiler out of what is hooked to models and optimizers: it compiles the hooks of what it compiles."""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

Hook = TypeVar("Hook", bound=Callable[..., Any])


def uncompiled(hook: Hook) -> Hook:
    """The same function, which a compiled model or step calls as it is."""
    return cast(Hook, torch.compiler.disable(hook))
