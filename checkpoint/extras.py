"""All of the state that is not a tensor of a module or optimizer: hyperparameters, schedulers, loaders, RNG, objects.

Captured at once, inside `save`, since it changes early; it is small. Encoded by `objects.py` into the image's tail.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from resilient.checkpoint.leaves import Leaves
from resilient.checkpoint.objects import Encoded, encode
from resilient.checkpoint.rng import capture_rng, restore_rng
from resilient.checkpoint.stateful import ObjectState, unwrapped

_RNG = "resilient.rng"


class Extras:
    """Captures and applies the objects of a state. `objects` wraps what is neither module nor tensor."""

    def __init__(self, state: Mapping[str, object], objects: Mapping[str, ObjectState]) -> None:
        self._state = state
        self._objects = objects

    def capture(self, found: Leaves) -> Encoded:
        """Everything as it is now, with tensors of its own. On the training thread; raises StateError."""
        value: dict[str, Any] = {_RNG: capture_rng()}
        for item, held in self._state.items():
            if isinstance(held, Optimizer):
                value[item] = _optimizer_values(held, found, item)
            elif isinstance(held, nn.Module):
                value[item] = _extra_states(held)
            elif item in self._objects:
                value[item] = self._objects[item].capture()
        encoded = encode(value, "state")
        return Encoded(encoded.text, {key: tensor.detach().clone() for key, tensor in encoded.tensors.items()})

    def apply(self, value: Mapping[str, Any], found: Leaves, groups: Mapping[str, list[list[str]]]) -> list[str]:
        """Give everything its saved value, RNG last. Returns notes on what could not be restored.

        `groups`: for each saved optimizer the names of the parameters in each of its groups.
        """
        notes: list[str] = []
        for item, held in self._state.items():
            if isinstance(held, Tensor):
                continue
            if item not in value:
                notes.append(f"the snapshot has nothing for {item!r}: it keeps its present state")
            elif isinstance(held, Optimizer):
                saved = list(zip(groups[item], value[item]["param_groups"], strict=True))
                notes += _apply_groups(held, saved, found.groups[item], item)
            elif isinstance(held, nn.Module):
                _apply_extra_states(held, value[item])
            else:
                self._objects[item].apply(value[item])
        return notes + list(restore_rng(value[_RNG]))


def _optimizer_values(optimizer: Optimizer, found: Leaves, item: str) -> dict[str, Any]:
    """Hyperparameters of each group, and state that is not a plain tensor. Names of parameters are in the plan."""
    groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    state = {
        leaf.key: {name: value for name, value in held.items() if not isinstance(value, Tensor)}
        for leaf, held in found.mixed[item]
    }
    return {"param_groups": groups, "state": state}


def _apply_groups(
    optimizer: Optimizer, saved: list[tuple[list[str], dict[str, Any]]], names: list[list[str]], item: str
) -> list[str]:
    """Match groups by the parameters in them, not by number: a script may build them in another order."""
    notes = []
    for number, (group, own) in enumerate(zip(optimizer.param_groups, names, strict=True)):
        same = [values for theirs, values in saved if set(theirs) & set(own)]
        if not same and not own and len(saved) == len(names):
            same = [saved[number][1]]  # an empty group has only its number
        if not same:
            notes.append(f"optimizer {item!r}: no saved group holds {own[:1]}; its hyperparameters stay")
            continue
        for key, value in same[0].items():
            live = group.get(key)
            if isinstance(live, Tensor) and isinstance(value, Tensor):
                live.data.copy_(value)  # a compiled or captured step may hold this very tensor
            else:
                group[key] = value
    return notes


def _extra_states(module: nn.Module) -> dict[str, Any]:
    return {
        name: part.get_extra_state()
        for name, part in unwrapped(module).named_modules()
        if type(part).get_extra_state is not nn.Module.get_extra_state
    }


def _apply_extra_states(module: nn.Module, value: Mapping[str, Any]) -> None:
    for name, part in unwrapped(module).named_modules():
        if name in value:
            part.set_extra_state(value[name])
