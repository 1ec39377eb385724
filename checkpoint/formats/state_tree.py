"""What a tree of Python containers and tensors holds: models, optimizers, and the rest.

Files of `torch.save` and torch DCP have such trees, and no word on what is what; it is told by the shape of the tree.
An optimizer is a dict with `state` and `param_groups`; a model is a dict of tensors alone, or of tensors for the most
part; what is neither stays an object. Items are called by their keys, joined with dots: {"app": {"model": ...}} has the
item `app.model`; where the whole tree is one, `model` or `optimizer`. Next: `state_catalog.py`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from resilient.checkpoint.formats.values import is_floating

LARGE_BYTES = 1 << 20
"""A tensor that belongs to no model or optimizer is an object, to be held in memory, if it is smaller."""
_MOST_DEPTH = 64
_EXTRA_STATE = "_extra_state"
_STATE, _GROUPS = "state", "param_groups"


class Leaf(Protocol):
    """A tensor in the tree."""

    @property
    def dtype(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def nbytes(self) -> int: ...


Path = tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class OptimizerTree:
    """`states`: of each parameter, by its key (a name, or a number), its state. `groups`: each with its "params"."""

    states: dict[Any, dict[Any, Any]]
    groups: list[dict[str, Any]]


@dataclass(slots=True)
class StateTree:
    """The parts of a tree, by item. `rest`: what remains, with small tensors in it, by the keys that it had.

    `tensors`: large ones that belong to nothing. `extra`: of an item what it has besides (`_extra_state` of modules).
    """

    models: dict[str, dict[str, Leaf]] = field(default_factory=dict)
    optimizers: dict[str, OptimizerTree] = field(default_factory=dict)
    tensors: dict[str, Leaf] = field(default_factory=dict)
    extra: dict[str, dict[str, Any]] = field(default_factory=dict)
    rest: dict[Any, Any] = field(default_factory=dict)


def classify(tree: Any, is_tensor: Callable[[Any], bool]) -> StateTree:
    """Tell what is in a tree. Raises ValueError for one that is nested very deep, or contains itself."""
    walk = _Walk(is_tensor)
    rest = walk.visit(tree, ())
    if rest is not _TAKEN:
        walk.found.rest = rest if isinstance(rest, dict) else {"object": rest}
    return walk.found


_TAKEN: Any = object()


class _Walk:
    def __init__(self, is_tensor: Callable[[Any], bool]) -> None:
        self.is_tensor = is_tensor
        self.found = StateTree()

    def visit(self, value: Any, path: Path) -> Any:
        """What remains of a value, `_TAKEN` for nothing."""
        if len(path) > _MOST_DEPTH:
            raise ValueError(f"it is nested more than {_MOST_DEPTH} deep, or contains itself: {_item(path[:4], '')}...")
        if self.is_tensor(value):
            return self._tensor(value, path)
        if isinstance(value, dict) and value:
            return self._mapping(value, path)
        if isinstance(value, (list, tuple)) and value and all(self._is_whole(one) for one in value):
            for number, one in enumerate(value):
                self.visit(one, (*path, number))
            return _TAKEN
        return value

    def _tensor(self, leaf: Leaf, path: Path) -> Any:
        if leaf.nbytes < LARGE_BYTES and path:
            return leaf
        self.found.tensors[_item(path, "tensor")] = leaf
        return _TAKEN

    def _mapping(self, value: dict[Any, Any], path: Path) -> Any:
        optimizer = _optimizer(value)
        if optimizer is not None:
            item = _item(path, "optimizer")
            self.found.optimizers[item] = optimizer
            if _GROUPS in value:
                self._keep(item, {key: one for key, one in value.items() if not _is_of_optimizer(key)})
            return _TAKEN
        if self._is_model(value):
            self._model(value, _item(path, "model"))
            return _TAKEN
        if self._is_mostly_model(value):
            mine = {key: one for key, one in value.items() if self.is_tensor(one)}
            self._model(mine, _item(path, "model"))
            value = {key: one for key, one in value.items() if key not in mine}
        rest = {key: self.visit(one, (*path, key)) for key, one in value.items()}
        return {key: one for key, one in rest.items() if one is not _TAKEN} or _TAKEN

    def _is_whole(self, value: Any) -> bool:
        """Whether all of it becomes an item."""
        return isinstance(value, dict) and bool(value) and (_optimizer(value) is not None or self._is_model(value))

    def _is_model(self, value: dict[Any, Any]) -> bool:
        tensors = [one for one in value.values() if self.is_tensor(one)]
        others = [key for key, one in value.items() if not self.is_tensor(one) and not _is_extra(key)]
        return not others and any(map(_is_weight, tensors))

    def _is_mostly_model(self, value: dict[Any, Any]) -> bool:
        """Whether it has a model's tensors beside other things: most values are tensors, under names."""
        tensors = [one for key, one in value.items() if type(key) is str and self.is_tensor(one)]
        return 2 * len(tensors) >= len(value) and any(map(_is_weight, tensors))

    def _model(self, value: dict[Any, Any], item: str) -> None:
        self.found.models[item] = {str(key): one for key, one in value.items() if self.is_tensor(one)}
        self._keep(item, {key: one for key, one in value.items() if not self.is_tensor(one)})

    def _keep(self, item: str, values: dict[Any, Any]) -> None:
        if values:
            self.found.extra.setdefault(item, {}).update(values)


def _item(path: Path, default: str) -> str:
    return ".".join(map(str, path)) or default


def _is_of_optimizer(key: Any) -> bool:
    """Whether it is a part of an optimizer; our sink for DCP writes the groups in the flattened form, too."""
    return key in (_STATE, _GROUPS) or str(key).startswith(f"{_GROUPS}.")


def _is_extra(key: Any) -> bool:
    return str(key).endswith(_EXTRA_STATE)


def _is_weight(leaf: Leaf) -> bool:
    """Not the state of a random generator, not a counter."""
    return (is_floating(leaf.dtype) and len(leaf.shape) > 0) or leaf.nbytes >= LARGE_BYTES


def _optimizer(value: Mapping[Any, Any]) -> OptimizerTree | None:
    states, groups = value.get(_STATE, {}), value.get(_GROUPS)  # DCP forgets a `state` without anything in it
    if isinstance(states, dict) and isinstance(groups, list) and all(isinstance(one, dict) for one in groups):
        if all(isinstance(group.get("params"), (list, tuple)) for group in groups):
            plain = {key: dict(one) if isinstance(one, dict) else {"": one} for key, one in states.items()}
            return OptimizerTree(plain, [{**group, "params": list(group["params"])} for group in groups])
        return None
    if all(isinstance(key, str) and key.startswith((f"{_STATE}.", f"{_GROUPS}.")) for key in value):
        return _flattened(value)
    return None


def _flattened(value: Mapping[str, Any]) -> OptimizerTree | None:
    """`state.<parameter>.<state>` and `param_groups.<parameter>.<hyperparameter>`, as torch's DCP flattens."""
    states: dict[Any, dict[Any, Any]] = {}
    values: dict[str, dict[str, Any]] = {}
    for key, one in value.items():
        kind, _, rest = key.partition(".")
        parameter, _, name = rest.rpartition(".")
        (states if kind == _STATE else values).setdefault(parameter, {})[name] = one
    if not values:
        return None
    groups: list[dict[str, Any]] = []
    for parameter, held in values.items():
        mine = {key: one for key, one in held.items() if key != "params"}
        same = next((group for group in groups if {k: v for k, v in group.items() if k != "params"} == mine), None)
        if same is None:
            groups.append({**mine, "params": [parameter]})
        else:
            same["params"].append(parameter)
    return OptimizerTree(states, groups)
