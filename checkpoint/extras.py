"""All of the state that is not a tensor of a module or optimizer: hyperparameters, schedulers, loaders, RNG, objects.

Captured at once, inside `save`, since it changes early; it is small. Encoded by `objects.py` into the image's tail.
For each optimizer of the state: `param_groups` (names of parameters are in the record), `state` (what is not a plain
tensor: columns of values by name, for parameters that have the same names), and where they are needed `made`, `others`
(see `Leaves`) and `on_device` (whose tensors lay on the parameter's accelerator).
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from resilient.checkpoint.leaves import Leaf, Leaves, Mixed
from resilient.checkpoint.objects import Encoded, encode
from resilient.checkpoint.provided import Provided
from resilient.checkpoint.rng import capture_rng, restore_rng
from resilient.checkpoint.stateful import ObjectState
from resilient.errors import StateError

_RNG = "resilient.rng"


@dataclass(frozen=True, slots=True)
class Captured:
    """All of it at one moment, encoded as far as it has to be while the training waits."""

    rng: Mapping[str, Any]
    values: Encoded

    def encoded(self) -> Encoded:
        """The whole, for an image. May be called from any thread."""
        rng = encode({_RNG: self.rng}, "state")
        return Encoded({**rng.tree, **self.values.tree}, {**rng.tensors, **self.values.tensors})


class Extras:
    """Captures and applies the objects of a state. `objects` wraps what is neither module nor tensor."""

    def __init__(self, state: Mapping[str, object], objects: Mapping[str, ObjectState]) -> None:
        self._state = state
        self._objects = objects

    def capture(self, found: Leaves, earlier: Captured | None = None) -> Captured:
        """Everything as it is now, with tensors of its own, but for what is in `earlier`, which stays as it was.

        On the training thread; raises StateError.
        """
        value: dict[str, Any] = {}
        for item, held in self._state.items():
            if earlier is not None and item in earlier.values.tree:
                continue
            if isinstance(held, Provided):
                value[item] = held.capture()
            elif isinstance(held, Optimizer):
                value[item] = _optimizer_values(held, found, item)
            elif isinstance(held, nn.Module):
                value[item] = {name: part.get_extra_state() for name, part in found.extra[item].items()}
            elif item in self._objects:
                value[item] = self._objects[item].capture()
        now = _with_copies(value)
        if earlier is None:
            return Captured(capture_rng(), now)
        joined = Encoded({**now.tree, **earlier.values.tree}, {**now.tensors, **earlier.values.tensors})
        return Captured(earlier.rng, joined)

    def capture_objects(self, late: Collection[str]) -> Captured:
        """The random generators and the objects but for those in `late`, for a later `capture`. Raises StateError."""
        value = {item: held.capture() for item, held in self._objects.items() if item not in late}
        return Captured(capture_rng(), _with_copies(value))

    def apply(self, value: Mapping[str, Any], found: Leaves, groups: Mapping[str, list[list[str]]]) -> list[str]:
        """Give everything its saved value, RNG last. Returns notes on what could not be restored.

        `groups`: for each saved optimizer the names of the parameters in each of its groups.
        """
        gone = sorted(value.keys() - self._state.keys() - {_RNG})
        notes = [f"the snapshot has {item!r}, which this job's state does not have: it is left alone" for item in gone]
        for item, held in self._state.items():
            if isinstance(held, Tensor):
                continue
            if item not in value:
                notes.append(f"the snapshot has nothing for {item!r}: it keeps its present state")
            elif isinstance(held, Provided):
                notes += held.apply(value[item], groups.get(item, []), found, item)
            elif isinstance(held, Optimizer):
                saved = list(zip(groups[item], value[item]["param_groups"], strict=True))
                notes += apply_groups(held.param_groups, saved, found.groups[item], item)
            elif isinstance(held, nn.Module):
                notes += apply_extra_states(found.extra[item], value[item], item)
            else:
                self._objects[item].apply(value[item])
                # A StatefulDataLoader makes its iterator when it is next asked for anything, and draws a random number
                # for it: now, since the run that was saved drew it long ago.
                self._objects[item].capture()
        return notes + list(restore_rng(value[_RNG]))


def _with_copies(value: Mapping[str, Any]) -> Encoded:
    encoded = encode(value, "state")
    return Encoded(encoded.tree, {path: _copied(path, tensor) for path, tensor in encoded.tensors.items()})


def _copied(path: str, tensor: Tensor) -> Tensor:
    if isinstance(tensor, DTensor):
        raise StateError(
            f"{path!r} cannot be saved: a DTensor inside an object; keep it as a buffer of a module, as a tensor "
            "of the state by itself, or save its `full_tensor()`"
        )
    return tensor.detach().clone()


def _optimizer_values(optimizer: Optimizer, found: Leaves, item: str) -> dict[str, Any]:
    groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    mixed = found.mixed[item].values()
    state = [
        {
            "parameters": [leaf.key for leaf in one.parameters],
            "values": {name: [held[name] for held in one.states] for name in one.others},
        }
        for one in mixed
    ]
    values: dict[str, Any] = {"param_groups": groups, "state": state}
    optional = {
        "made": found.made[item],
        "others": {key: optimizer.state[key] for key in found.others[item]},
        "on_device": {leaf.key: names for one in mixed for leaf, names in _on_device(one)},
    }
    return values | {key: value for key, value in optional.items() if value}


def _on_device(mixed: Mixed) -> Iterator[tuple[Leaf, list[Any]]]:
    """The names of nested state whose tensors lie on the parameter's accelerator."""
    for leaf, held in zip(mixed.parameters, mixed.states, strict=True):
        if leaf.local.is_cpu:
            continue
        nested = {name: tree_leaves(held[name]) for name in mixed.others}
        device = leaf.local.device
        yield (
            leaf,
            [n for n, parts in nested.items() if any(isinstance(t, Tensor) and t.device == device for t in parts)],
        )


def columns_by_parameter(columns: Iterable[Mapping[str, Any]]) -> dict[str, dict[Any, Any]]:
    """The `state` of an optimizer's values: what each parameter has that is not a tensor, by name."""
    found: dict[str, dict[Any, Any]] = {}
    for one in columns:
        for number, key in enumerate(one["parameters"]):
            found[key] = {name: values[number] for name, values in one["values"].items()}
    return found


def apply_groups(
    live: Sequence[dict[str, Any]],
    saved: Sequence[tuple[Sequence[str], dict[str, Any]]],
    names: Sequence[Sequence[str]],
    item: str,
) -> list[str]:
    """Match groups by the parameters in them, not by number: a script may build them in another order."""
    notes = []
    written: set[int] = set()
    empty = [values for theirs, values in saved if not theirs]  # these have only their order
    for group, own in zip(live, names, strict=True):
        same = [values for theirs, values in saved if set(theirs) & set(own)] if own else empty[:1]
        if not own:
            del empty[:1]
        if not same:
            notes.append(f"optimizer {item!r}: no saved group holds {own[:1]}; its hyperparameters stay")
            continue
        for key, value in same[0].items():
            group[key] = _given(group.get(key), value, written)
    return notes


def _given(live: Any, value: Any, written: set[int]) -> Any:
    """`value`, in the live tensor where that is possible: a compiled or captured step may hold this very tensor.

    Groups may share one tensor; it can take the value of one of them, and that of others only if it is the same.
    """
    if not (isinstance(live, Tensor) and isinstance(value, Tensor)):
        return value
    value = value.to(live.device)
    if (live.shape, live.dtype) != (value.shape, value.dtype):
        return value
    if id(live) in written:
        return live if bool((live == value).all()) else value
    written.add(id(live))
    live.data.copy_(value)
    return live


def apply_extra_states(live: Mapping[str, nn.Module], value: Mapping[str, Any], item: str) -> list[str]:
    for name, part in live.items():
        if name in value:
            part.set_extra_state(value[name])
    lost = [f"{name!r} of {item!r} has extra state only in the snapshot" for name in value.keys() - live.keys()]
    return lost + [f"{name!r} of {item!r} has no extra state in the snapshot" for name in live.keys() - value.keys()]
