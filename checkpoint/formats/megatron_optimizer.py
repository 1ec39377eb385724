"""Which parameter each number of Megatron-LM's optimizer stands for. Pure.

Its groups are made by rule (megatron/core/optimizer: `_get_param_groups`): without weight decay are biases and what has
one dimension; experts of expert parallelism are by themselves; within a group the parameters are in the model's order.
The rule is only believed where every number of parameters and every shape fits.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from resilient.checkpoint.formats.stored import StoredTensor
from resilient.checkpoint.formats.torch_values import is_stored

_HALF = ("float16", "bfloat16")


class Unfit(Exception):
    """The state is not one that is understood; the message says why."""


@dataclass(frozen=True, slots=True)
class Optimizer:
    """`states`: (name of the parameter, key, tensor). `groups`: hyperparameters, with full names as "params"."""

    states: list[tuple[str, str, StoredTensor]]
    groups: list[dict[str, Any]]


def optimizer_of(raw: Any, parameters: Sequence[tuple[str, StoredTensor]]) -> Optimizer:
    """A rank's optimizer; `parameters` are those of its model, by name, in their order. Raises Unfit."""
    if isinstance(raw, list):  # a chain: one for what is dense, one for experts
        parts = [optimizer_of(one, parameters) for one in raw if not isinstance(one, list)]
        return Optimizer([s for part in parts for s in part.states], [g for part in parts for g in part.groups])
    if not isinstance(raw, Mapping):
        raise Unfit("it is no mapping")
    inner = raw.get("optimizer", raw)
    if not isinstance(inner, Mapping) or not isinstance(inner.get("param_groups"), list):
        raise Unfit("it has no parameter groups")
    state = inner.get("state", {})
    if not isinstance(state, Mapping):
        raise Unfit("its state is no mapping")
    masters = raw.get("fp32_from_fp16_params", [])
    states: list[tuple[str, str, StoredTensor]] = []
    groups: list[dict[str, Any]] = []
    for number, group in enumerate(inner["param_groups"]):
        mine = _members(group, parameters)
        for key, (name, tensor) in zip(group["params"], mine, strict=True):
            states += _states(name, tensor, state.get(key, state.get(str(key), {})))
        if masters:
            states += _masters(masters, number, mine)
        told = {key: value for key, value in group.items() if key != "params" and not is_stored(value)}
        groups.append({**told, "params": [f"model.{name}" for name, _ in mine]})
    return Optimizer(states, groups)


def _members(group: Any, parameters: Sequence[tuple[str, StoredTensor]]) -> list[tuple[str, StoredTensor]]:
    if not isinstance(group, Mapping) or not isinstance(group.get("params"), list):
        raise Unfit("a parameter group has no parameters")
    bare = group.get("wd_mult") == 0.0
    expert = bool(group.get("is_expert_parallel", group.get("is_expert", False)))
    found = [
        (name, tensor)
        for name, tensor in parameters
        if ("wd_mult" not in group or _is_bare(name, tensor) == bare) and _is_expert(name) == expert
    ]
    if len(found) != len(group["params"]):
        raise Unfit(f"a group has {len(group['params'])} parameters, where the model has {len(found)} of its kind")
    return found


def _states(name: str, parameter: StoredTensor, state: Any) -> Iterator[tuple[str, str, StoredTensor]]:
    if not isinstance(state, Mapping):
        raise Unfit(f"the state of {name} is no mapping")
    for key, value in state.items():
        if is_stored(value):
            if value.shape != parameter.shape and value.numel != 1:
                raise Unfit(f"{key} of shape {value.shape} should belong to {name} of shape {parameter.shape}")
            yield name, str(key), value


def _masters(
    masters: Any, number: int, mine: Sequence[tuple[str, StoredTensor]]
) -> Iterator[tuple[str, str, StoredTensor]]:
    """Master weights: of the half-precision parameters of each group, in their order."""
    half = [(name, tensor) for name, tensor in mine if tensor.dtype in _HALF]
    held = masters[number] if isinstance(masters, list) and number < len(masters) else None
    if not isinstance(held, list) or len(held) != len(half):
        raise Unfit("its master weights are not those of its groups")
    for (name, tensor), master in zip(half, held, strict=True):
        if not is_stored(master) or master.shape != tensor.shape:
            raise Unfit(f"the master weight of {name} is not of its shape, {tensor.shape}")
        yield name, "fp32", master


def _is_bare(name: str, tensor: StoredTensor) -> bool:
    return name.endswith(".bias") or len(tensor.shape) == 1


def _is_expert(name: str) -> bool:
    return ".experts." in name and ".shared_experts." not in name
