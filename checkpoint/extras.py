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
    """Captures and applies the objects of a state. `objects[name]` wraps each item that is neither module nor tensor."""

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

    def apply(self, value: Mapping[str, Any], found: Leaves) -> list[str]:
        """Give everything its saved value, RNG last. Returns notes on what could not be restored."""
        notes: list[str] = []
        for item, held in self._state.items():
            if isinstance(held, Tensor):
                continue
            if item not in value:
                notes.append(f"the snapshot has nothing for {item!r}: it keeps its present state")
            elif isinstance(held, Optimizer):
                notes += _apply_groups(held, value[item]["param_groups"], found.groups[item], item)
            elif isinstance(held, nn.Module):
                _apply_extra_states(held, value[item])
            else:
                self._objects[item].apply(value[item])
        return notes + list(restore_rng(value[_RNG]))


def _optimizer_values(optimizer: Optimizer, found: Leaves, item: str) -> dict[str, Any]:
    """Hyperparameters of each group with the names of its parameters, and state that is not a plain tensor."""
    groups = [
        {"names": names, "values": {key: value for key, value in group.items() if key != "params"}}
        for group, names in zip(optimizer.param_groups, found.groups[item], strict=True)
    ]
    state = {}
    for parameter, held in optimizer.state.items():
        leaf = found.named(parameter)
        rest = {name: value for name, value in held.items() if not isinstance(value, Tensor)}
        if leaf is not None and rest:
            state[leaf.key] = rest
    return {"param_groups": groups, "state": state}


def _apply_groups(
    optimizer: Optimizer, groups: list[dict[str, Any]], names: list[list[str]], item: str
) -> list[str]:
    """Match groups by the parameters in them, not by number: a script may build them in another order."""
    notes = []
    for group, own in zip(optimizer.param_groups, names, strict=True):
        saved = next((one for one in groups if set(one["names"]) & set(own)), None)
        if saved is None and not own and len(groups) == len(names):
            saved = groups[names.index(own)]
        if saved is None:
            notes.append(f"optimizer {item!r}: no saved group holds {own[:1]}; its hyperparameters stay")
            continue
        for key, value in saved["values"].items():
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
