"""The state of every random number generator that a program has without making one: Python, numpy, torch, devices.

Captured on the training thread in well under 0.1 ms, in values that `objects.py` takes. Devices are asked only when the
program has already started them: reading a state must not make a CUDA context. Not here: generators that the program
makes itself (`stateful.py`).
"""

import random
from array import array  # reads a tuple of integers several times faster than numpy
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from resilient.errors import DamagedImage

__all__ = ["capture_rng", "restore_rng"]

# Modules of torch with get_rng_state, set_rng_state, is_initialized and device_count.
_DEVICE_TYPES = ("cuda", "xpu")


def capture_rng() -> dict[str, Any]:
    """{"python", "numpy", "torch", "cuda": [one for each device], ...}; device types that are not in use are left out.

    Nothing in it changes when the generators go on.
    """
    version, words, gauss_next = random.getstate()
    state: dict[str, Any] = {
        "python": {"version": version, "words": np.array(array("I", words)), "gauss_next": gauss_next},
        "numpy": np.random.get_state(legacy=False),
        "torch": torch.get_rng_state(),
    }
    for kind in _DEVICE_TYPES:
        module = getattr(torch, kind, None)
        if module is not None and module.is_available() and module.is_initialized():
            state[kind] = [module.get_rng_state(index) for index in range(module.device_count())]
    return state


def restore_rng(state: Mapping[str, Any]) -> list[str]:
    """Set all generators of `state` that are there. Returns a note for each that is not; the others are set anyway.

    The number of devices may differ. Devices that are not started yet get their state when they are.
    Raises DamagedImage, naming the generator, for a state that none of `capture_rng` is; earlier ones are set by then.
    """
    notes: list[str] = []
    _restore("python", state, notes, _set_python)
    _restore("numpy", state, notes, _set_numpy)
    _restore("torch", state, notes, lambda saved: torch.set_rng_state(_owned(saved)))
    for kind in _DEVICE_TYPES:
        if kind in state:
            notes += _restore_devices(kind, state[kind])
    return notes


def _restore(name: str, state: Mapping[str, Any], notes: list[str], set_state: Callable[[Any], None]) -> None:
    if name not in state:
        notes.append(f"the snapshot has no random state of {name}: its numbers will differ from an undisturbed run")
        return
    try:
        set_state(state[name])
    except (TypeError, ValueError, KeyError, IndexError, AttributeError, OverflowError, RuntimeError) as error:
        raise DamagedImage(f"the random state of {name} cannot be restored ({error}); use another snapshot") from error


def _set_python(saved: Mapping[str, Any]) -> None:
    random.setstate((saved["version"], tuple(saved["words"].tolist()), saved["gauss_next"]))


def _set_numpy(saved: Mapping[str, Any]) -> None:
    np.random.set_state(dict(saved))


def _owned(saved: torch.Tensor) -> torch.Tensor:
    # A copy: torch reads it as a C structure, which must be aligned; in an image it may lie anywhere.
    return saved.cpu().clone()


def _restore_devices(kind: str, saved: list[torch.Tensor]) -> list[str]:
    module = getattr(torch, kind, None)
    present = module.device_count() if module is not None and module.is_available() else 0
    notes = []
    for index in range(max(len(saved), present)):
        if index >= len(saved):
            notes.append(f"the snapshot has no random state for {kind}:{index}: it keeps its present one")
        elif index >= present:
            notes.append(f"the random state of {kind}:{index} was not restored: there is no such device here")
        else:
            _restore(f"{kind}:{index}", {f"{kind}:{index}": saved[index]}, notes, _setter(module, index))
    return notes


def _setter(module: Any, index: int) -> Callable[[torch.Tensor], None]:
    return lambda saved: module.set_rng_state(_owned(saved), index)
