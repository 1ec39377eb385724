"""What may be a value in `Checkpointer(state={...})`, and how objects among them are captured and restored.

Modules, optimizers and tensors are saved piece by piece (`leaves.py`, `plan.py`). Everything else becomes an
`ObjectState`: a value of plain parts that `objects.py` encodes. What cannot be saved is refused by name when the
Checkpointer is made, not at step 1000. Not here: the encoding, and the order in which things are restored.
"""

import collections
import copy
import sys
from collections.abc import Mapping, MutableMapping
from enum import Enum
from typing import Any

import numpy as np
import torch
from torch import nn

from resilient.checkpoint.leaves import overlaps
from resilient.checkpoint.objects import decode, encode
from resilient.checkpoint.provided import Provided
from resilient.checkpoint.refusals import type_name
from resilient.errors import LayoutMismatch, StateError

__all__ = ["Kind", "ObjectState", "check_state", "classify"]


class Kind(Enum):
    """How a value of the state is saved."""

    MODULE = "module"
    OPTIMIZER = "optimizer"
    TENSOR = "tensor"
    GENERATOR = "generator"  # torch.Generator
    OBJECT = "object"  # schedulers, gradient scalers, data loaders: anything with state_dict and load_state_dict
    MAPPING = "mapping"  # a dictionary of plain values, restored in place
    PROVIDED = "provided"  # what names its own tensors

    @property
    def is_object(self) -> bool:
        """Whether it is captured by `ObjectState`, not piece by piece."""
        return self in (Kind.GENERATOR, Kind.OBJECT, Kind.MAPPING)


def classify(name: str, value: object) -> Kind:
    """How `state[name]` is saved. Raises StateError, naming it, for what cannot be; says what to do instead."""
    if isinstance(value, Provided):
        return Kind.PROVIDED
    if isinstance(value, nn.Module):
        _refuse_fsdp1(name, value)
        return Kind.MODULE
    if isinstance(value, torch.optim.Optimizer):
        return Kind.OPTIMIZER
    if isinstance(value, torch.Tensor):
        return Kind.TENSOR
    if isinstance(value, torch.Generator):
        return Kind.GENERATOR
    if _is_stateful(value):
        return Kind.OBJECT
    if isinstance(value, MutableMapping):
        return Kind.MAPPING
    raise StateError(f"state[{name!r}] cannot be saved: it is {type_name(value)}; {_todo(name, value)}")


def check_state(state: Mapping[str, object]) -> dict[str, "ObjectState"]:
    """The objects of a state by name, captured once to see that they can be saved. Raises StateError."""
    if not isinstance(state, Mapping):
        raise StateError(f"state must map names to what is saved, not be {type_name(state)}: state={{'model': model}}")
    objects = {}
    for name, value in state.items():
        if not isinstance(name, str) or not name:
            raise StateError(f"names in the state must be non-empty strings, not {name!r}")
        if not name.isprintable() or name.startswith("$"):  # which begins the tags of encoded objects
            raise StateError(f"state[{name!r}]: use a name of printable characters that does not begin with $")
        if classify(name, value).is_object:
            objects[name] = ObjectState(name, value)
    return objects


class ObjectState:
    """One object of the state. All methods belong to the training thread."""

    def __init__(self, name: str, value: object) -> None:
        """Captures once, so that what cannot be saved is refused here, by name: StateError.

        A loader may start its workers for this, as it does for its own `state_dict()`.
        """
        self.name = name
        self.kind = classify(name, value)
        if not self.kind.is_object:
            raise StateError(f"state[{name!r}] is a {self.kind.value}, which is saved piece by piece, not as an object")
        self._value: Any = value
        encode(self.capture(), name)

    def capture(self) -> object:
        """The object's state now. What `state_dict()` returns may share memory with the object: encode or copy it soon.

        Raises StateError for a mapping that holds what cannot be saved, and whatever `state_dict()` raises.
        """
        if self.kind is Kind.GENERATOR:
            return self._value.get_state()
        if self.kind is Kind.OBJECT:
            return self._value.state_dict()
        encoded = encode(dict(self._value), self.name)
        copies = {path: tensor.detach().clone() for path, tensor in encoded.tensors.items()}
        return decode(encoded.text, copies, self.name)

    def apply(self, value: object) -> None:
        """Give the object a state that `capture` returned, perhaps in another process. Does not keep `value`.

        A mapping is changed in place, with the lists, dictionaries, sets and tensors in it, so that whoever holds one
        of them sees what was restored. Raises LayoutMismatch when the saved state is of another kind, and whatever
        `load_state_dict()` raises.
        """
        if self.kind is Kind.GENERATOR:
            if not isinstance(value, torch.Tensor):
                raise self._mismatch(value)
            self._value.set_state(value.cpu().clone())
        elif self.kind is Kind.OBJECT:
            # Many keep what they are given; a second restore must not see what they made of it.
            self._value.load_state_dict(copy.deepcopy(value))
        elif isinstance(value, Mapping):
            _fill(self._value, copy.deepcopy(value), {id(self._value)})
        else:
            raise self._mismatch(value)

    def _mismatch(self, value: object) -> LayoutMismatch:
        return LayoutMismatch(
            f"the snapshot holds {type_name(value)} for state[{self.name!r}], which is now a {self.kind.value}: "
            "give the state the names that it had when it was saved"
        )


def _is_stateful(value: object) -> bool:
    if isinstance(value, type):
        return False
    return callable(getattr(value, "state_dict", None)) and callable(getattr(value, "load_state_dict", None))


def _refuse_fsdp1(name: str, module: nn.Module) -> None:
    loaded = sys.modules.get("torch.distributed.fsdp")  # not imported for this: without it there is no such module
    kind: type | None = getattr(loaded, "FullyShardedDataParallel", None)
    for path, part in module.named_modules():
        if kind and isinstance(part, kind):
            where = f"{path!r} in state[{name!r}]" if path else f"state[{name!r}]"
            raise StateError(
                f"{where} cannot be saved: it is wrapped in FullyShardedDataParallel (FSDP1), whose flat parameters "
                "have no names; shard with torch.distributed.fsdp.fully_shard instead"
            )


def _todo(name: str, value: object) -> str:
    if isinstance(value, type):
        return "give an instance of it, not the class"
    for one, other in (("state_dict", "load_state_dict"), ("load_state_dict", "state_dict")):
        if hasattr(value, one):
            return f"it has {one}() but no {other}(): add it"
    if isinstance(value, (np.random.Generator, np.random.RandomState)):
        return "wrap it in an object whose state_dict() returns `{'state': generator.bit_generator.state}`"
    if value is None or isinstance(value, (bool, int, float, str, list, tuple, set, frozenset)):
        return f"it could not be restored in place: put it in a dictionary, as state={{{name!r}: {{'value': ...}}}}"
    return "give its class state_dict() and load_state_dict()"


def _fill(live: Any, saved: Mapping[Any, Any], used: set[int]) -> None:
    """Give a mapping the contents of `saved`, in its order. Keys of `live` that were not saved go."""
    merged = {key: _merge(live.get(key), value, used) for key, value in saved.items()}
    live.clear()
    for key, value in merged.items():
        live[key] = value


def _merge(live: Any, saved: Any, used: set[int]) -> Any:
    """`live` with the contents of `saved`, changed in place where its type allows, else `saved` itself.

    `used` are the ids of what was changed already: what stands in two places may have been two when it was saved.
    """
    if not _same_sort(live, saved) or id(live) in used:
        return saved
    used.add(id(live))
    if isinstance(live, dict):
        _fill(live, saved, used)
    elif isinstance(live, (list, collections.deque)):
        places = [*live, *[None] * len(saved)]
        merged = [_merge(place, item, used) for place, item in zip(places, saved, strict=False)]
        live.clear()
        live.extend(merged)
    elif isinstance(live, set):
        live.clear()
        live.update(saved)
    elif isinstance(live, torch.Tensor):
        with torch.no_grad():
            live.copy_(saved)
    else:
        live[...] = saved
    return live


def _same_sort(live: Any, saved: Any) -> bool:
    """Whether `live` can take the contents of `saved` in place and is then equal to it."""
    if isinstance(live, torch.Tensor) and isinstance(saved, torch.Tensor):
        return live.shape == saved.shape and live.dtype == saved.dtype and not overlaps(live)
    if isinstance(live, np.ndarray) and isinstance(saved, np.ndarray):
        return bool(live.shape == saved.shape and live.dtype == saved.dtype)
    if type(live) is not type(saved) or not isinstance(live, (dict, list, set, collections.deque)):
        return False
    return getattr(live, "maxlen", None) == getattr(saved, "maxlen", None)
