"""A catalog and its objects as a tree again, for the sinks that write one: torch files and DCP.

An item `app.model` becomes {"app": {"model": ...}}, items `optimizers.0`, `optimizers.1` become a list. The tree is
what `state_tree.py` takes apart, with a `TensorBytes` for each tensor.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from resilient.checkpoint.catalog.catalog import Catalog, Tensor
from resilient.checkpoint.extras import columns_by_parameter
from resilient.checkpoint.formats.output import SinkOptions, TensorBytes
from resilient.checkpoint.formats.source import Source
from resilient.checkpoint.formats.values import is_floating

_OF_SNAPSHOTS = ("state", "param_groups", "made", "others", "on_device")  # see `extras.py`
_EXTRA_STATE = "_extra_state"


def tree_of(source: Source, options: SinkOptions, *, numbered: bool) -> dict[Any, Any]:
    """The whole of a source, as one tree.

    `numbered`: the state of optimizers is keyed by number, as `Optimizer.load_state_dict` takes it, and the groups
    have the names as `param_names`; else by the parameters' names, as `torch.distributed.checkpoint.state_dict` does,
    with the groups in both of its forms.
    """
    catalog, objects = source.catalog, dict(source.objects())
    optimizers = list(dict.fromkeys([*catalog.groups, *(one.item for one in catalog.of_kind("optimizer"))]))
    items: dict[str, Any] = {}
    for item, model in _models(catalog, options).items():
        items[item] = {**model, **_extra_states(objects.pop(item, {}))}
    for tensor in catalog.of_kind("tensor"):
        items[tensor.name] = whole(tensor, tensor.dtype)
    for item in optimizers:
        items[item] = _optimizer(catalog, item, objects.pop(item, {}), numbered)
    tree: dict[Any, Any] = {key: _own(value) for key, value in objects.items()}
    for item, value in items.items():
        _place(tree, item, value)
    return _listed(tree, items)


def whole(tensor: Tensor, dtype: str) -> TensorBytes:
    return TensorBytes(tensor.name, (0,) * len(tensor.shape), tensor.shape, dtype)


def _models(catalog: Catalog, options: SinkOptions) -> dict[str, dict[str, TensorBytes]]:
    masters = {
        tensor.parameter: tensor
        for tensor in (catalog.of_kind("optimizer") if options.dtype is not None else [])
        if tensor.state == "fp32"
    }
    found: dict[str, dict[str, TensorBytes]] = {}
    bytes_of: dict[str, TensorBytes] = {}
    for tensor in catalog.of_kind("parameter", "buffer"):
        made = bytes_of[tensor.name] = _in_dtype(tensor, masters.get(tensor.name), options.dtype)
        found.setdefault(tensor.item, {})[tensor.fqn] = made
    for name, first in catalog.aliases.items():
        if first in bytes_of:
            item = next((item for item in found if name.startswith(f"{item}.")), catalog.tensors[first].item)
            found.setdefault(item, {})[name.removeprefix(f"{item}.")] = bytes_of[first]
    return found


def _in_dtype(tensor: Tensor, master: Tensor | None, dtype: str | None) -> TensorBytes:
    """In the dtype that is asked for; from the optimizer's master weights where these say more in it."""
    if dtype is None or not is_floating(tensor.dtype) or dtype == tensor.dtype:
        return whole(tensor, tensor.dtype)
    if master is not None and master.shape == tensor.shape and master.itemsize > tensor.itemsize:
        return whole(master, dtype)
    return whole(tensor, dtype)


def _extra_states(values: Any) -> dict[str, Any]:
    """`get_extra_state` of modules, under the keys that state dicts have for them."""
    if not isinstance(values, Mapping):
        return {}
    return {_extra_key(str(name)): value for name, value in values.items()}


def _extra_key(name: str) -> str:
    if name.endswith(_EXTRA_STATE):
        return name
    return f"{name}.{_EXTRA_STATE}" if name else _EXTRA_STATE


def _optimizer(catalog: Catalog, item: str, held: Any, numbered: bool) -> dict[str, Any]:
    held = held if isinstance(held, Mapping) else {}
    states = _states(catalog, item, held.get("state", {}))
    groups = catalog.groups.get(item) or [{"params": list(states)}]
    names = [name for group in groups for name in group["params"]]
    short = {name: _fqn(catalog, name) for name in [*states, *names]}
    keys: dict[str, Any] = short | ({name: number for number, name in enumerate(names)} if numbered else {})
    made = []
    for group in groups:
        params = group["params"]
        named = {"param_names": [short[name] for name in params]} if numbered else {}
        made.append({**group, **named, "params": [keys[name] for name in params]})
    others = {key: value for key, value in held.items() if key not in _OF_SNAPSHOTS}
    flattened = {} if numbered else dict(_flattened(groups, short))
    return {"state": {keys[name]: state for name, state in states.items()}, "param_groups": made, **flattened, **others}


def _flattened(groups: Iterable[Mapping[str, Any]], short: Mapping[str, str]) -> Iterator[tuple[str, Any]]:
    """The groups as `flatten_optimizer_state_dict` has them, for jobs that load so; to others they do no harm."""
    for group in groups:
        for name in group["params"]:
            for key, value in group.items():
                if key != "params":
                    yield f"param_groups.{short[name]}.{key}", value


def _states(catalog: Catalog, item: str, values: Any) -> dict[str, dict[str, Any]]:
    """By full name of the parameter; `values`: what is no tensor, by name or as the columns of a snapshot."""
    found: dict[str, dict[str, Any]] = {}
    for tensor in catalog.of_kind("optimizer"):
        if tensor.item == item:
            found.setdefault(tensor.parameter, {})[tensor.state] = whole(tensor, tensor.dtype)
    plain = values if isinstance(values, Mapping) else columns_by_parameter(values)
    for name, state in plain.items():
        found.setdefault(name, {}).update(state)
    return found


def _fqn(catalog: Catalog, name: str) -> str:
    """The name of a parameter in its module."""
    tensor = catalog.tensors.get(name)
    if tensor is not None:
        return tensor.fqn
    first = catalog.tensors.get(catalog.aliases.get(name, ""))
    return name.removeprefix(f"{first.item if first is not None else 'model'}.")


def _own(value: Any) -> Any:
    """The dicts of a tree made anew, for `_place` to put more into them."""
    return {key: _own(one) for key, one in value.items()} if type(value) is dict else value


def _place(tree: dict[Any, Any], item: str, value: Any) -> None:
    """Put an item where its name says; where something else is in the way, under its whole name."""
    *way, last = item.split(".")
    held = tree
    for key in way:
        held = held.setdefault(key, {})
        if type(held) is not dict:
            tree[item] = value
            return
    inner = held.get(last)
    held[last] = {**inner, **value} if type(inner) is dict and type(value) is dict else value


def _listed(tree: dict[Any, Any], items: Mapping[str, Any]) -> dict[Any, Any]:
    """Items that are numbered, all of them from 0 on, as lists."""
    for way in dict.fromkeys(_numbered(items)):
        *outer, last = way.split(".")
        held: Any = tree
        for key in outer:
            held = held.get(key, {}) if type(held) is dict else {}
        inner = held.get(last)
        if type(inner) is dict and list(inner) == [str(number) for number in range(len(inner))]:
            held[last] = list(inner.values())
    return tree


def _numbered(items: Mapping[str, Any]) -> Iterator[str]:
    for item in items:
        way, _, last = item.rpartition(".")
        if way and last.isdigit():
            yield way
