"""The catalog of a tree of models and optimizers (`state_tree.py`): names, groups, and whose state is whose.

State that is kept by number gets the names of parameters where that is certain: the optimizer has them itself
(`param_names`), or there are as many numbers as the model has parameters, and all shapes fit, or fewer (some are
frozen), and there is one way only to fit the shapes. Else its parameters are called by their numbers, `optimizer.0`,
and the catalog says so in a note.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from resilient.checkpoint.catalog.catalog import Catalog, Kind, Tensor
from resilient.checkpoint.catalog.table import PieceTable
from resilient.checkpoint.dtypes import torch_dtype
from resilient.checkpoint.formats.fetch import fetch
from resilient.checkpoint.formats.source import Source
from resilient.checkpoint.formats.state_tree import Leaf, OptimizerTree, StateTree

_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")  # of batch norm: the ones that all state dicts have
STEPS = ("step", "global_step", "global_steps", "iteration")
"""Keys, at the top of a tree, that may have the step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Leaves:
    """What a format knows of the leaves of its trees: whether a value is one, its pieces, and its values.

    `is_stored`: whether it is one, or anything else that `load` makes a value of. `same`: a key that two tensors have
    which share their bytes; None for those that share them with nothing.
    """

    is_tensor: Callable[[Any], bool]
    is_stored: Callable[[Any], bool]
    pieces: Callable[[Any], PieceTable]
    load: Callable[[Any], Any]
    same: Callable[[Any], Any]


def fill(catalog: Catalog, tree: StateTree, leaves: Leaves) -> dict[str, Any]:
    """Put all tensors of a tree into a catalog, and give its objects, with tensors as leaves (see `loaded`).

    Raises DamagedImage for two tensors of one name.
    """
    filler = _Filler(catalog, tree, leaves)
    for item, model in tree.models.items():
        filler.model(item, model)
    for name, leaf in tree.tensors.items():
        filler.add(name, "tensor", leaf, item=name)
    for item, optimizer in tree.optimizers.items():
        filler.optimizer(item, optimizer)
    objects = {str(key): value for key, value in tree.rest.items()}
    for item, values in (*tree.extra.items(), *filler.objects.items()):
        held = objects.setdefault(item, {})
        objects[item] = {**held, **values} if isinstance(held, dict) else {"": held, **values}
    catalog.step = next((value for key in STEPS if type(value := tree.rest.get(key)) is int), None)
    return objects


def loaded(value: Any, leaves: Leaves) -> Any:
    """An object with real tensors, and whatever else is stored by itself, for its leaves."""
    if leaves.is_stored(value):
        return leaves.load(value)
    if isinstance(value, dict):
        made = {key: loaded(one, leaves) for key, one in value.items()}
        return made if type(value) is dict else _like(value, made)
    if type(value) in (list, tuple):
        return type(value)(loaded(one, leaves) for one in value)
    return value


def read_leaf(source: Source, leaf: Leaf, pieces: PieceTable) -> torch.Tensor:
    """A small tensor that is not in the catalog, contiguous."""
    tensor = Tensor(name="", kind="tensor", dtype=leaf.dtype, shape=leaf.shape, pieces=pieces)
    data = bytearray(tensor.nbytes)
    if data:
        fetch(source, tensor, memoryview(data))
    flat = (
        torch.frombuffer(data, dtype=torch_dtype(leaf.dtype)) if data else torch.empty(0, dtype=torch_dtype(leaf.dtype))
    )
    return flat.reshape(leaf.shape)


def _like(value: Any, made: dict[Any, Any]) -> Any:
    """A dict of another kind with these values: its own copy, since the kind may need more than its values."""
    copy = value.copy()
    copy.update(made)
    return copy


class _Filler:
    def __init__(self, catalog: Catalog, tree: StateTree, leaves: Leaves) -> None:
        self.catalog = catalog
        self.tree = tree
        self.leaves = leaves
        self.first: dict[Any, str] = {}
        self.objects: dict[str, dict[str, Any]] = {}

    def add(self, name: str, kind: Kind, leaf: Leaf, *, item: str, parameter: str = "", state: str = "") -> None:
        self.catalog.add(
            Tensor(
                name=name,
                kind=kind,
                dtype=leaf.dtype,
                shape=leaf.shape,
                pieces=self.leaves.pieces(leaf),
                item=item,
                parameter=parameter,
                state=state,
            )
        )

    def model(self, item: str, model: dict[str, Leaf]) -> None:
        for fqn, leaf in model.items():
            name, same = f"{item}.{fqn}", self.leaves.same(leaf)
            if same is not None and same in self.first:
                self.catalog.aliases[name] = self.first[same]
                continue
            if same is not None:
                self.first[same] = name
            self.add(name, "buffer" if _is_buffer(fqn) else "parameter", leaf, item=item)

    def optimizer(self, item: str, optimizer: OptimizerTree) -> None:
        names = self._names(item, optimizer)
        groups: list[dict[str, Any]] = []
        others: dict[str, dict[Any, Any]] = {}
        for group in optimizer.groups:
            held = {key: self._number(value) for key, value in group.items() if key not in ("params", "param_names")}
            groups.append({**held, "params": [names[key] for key in group["params"]]})
        self.catalog.groups[item] = groups
        for key, state in optimizer.states.items():
            parameter = names.get(key) or names.get(_as_number(key)) or f"{item}.{key}"
            for name, value in state.items():
                if self.leaves.is_tensor(value):
                    full = f"{item}.state.{parameter}.{name}"
                    self.add(full, "optimizer", value, item=item, parameter=parameter, state=str(name))
                else:
                    others.setdefault(parameter, {})[name] = value
        if others:
            self.objects.setdefault(item, {})["state"] = others

    def _number(self, value: Any) -> Any:
        """A hyperparameter that is held as a tensor (`capturable`) as the number that it is."""
        if self.leaves.is_tensor(value) and math.prod(value.shape) == 1:
            return self.leaves.load(value).item()
        return loaded(value, self.leaves)

    def _names(self, item: str, optimizer: OptimizerTree) -> dict[Any, str]:
        """The full name of each of an optimizer's parameters, by its key."""
        keys = [key for group in optimizer.groups for key in group["params"]]
        models = self._models_for(item)
        if all(isinstance(key, str) and not key.isdigit() for key in keys):
            return {key: _full(key, models) for key in keys}
        given = [name for group in optimizer.groups for name in group.get("param_names", ())]
        if len(given) == len(keys):
            return {key: _full(name, models) for key, name in zip(keys, given, strict=True)}
        for model in models:
            order = self._order(model, optimizer, keys)
            if order is not None:
                return {key: f"{model}.{fqn}" for key, fqn in zip(keys, order, strict=True)}
        if keys:
            self.catalog.notes.append(
                f"the parameters of {item!r} have numbers, and no model is there whose parameters they fit; they are "
                f"called {item}.{keys[0]} and so on"
            )
        return {key: f"{item}.{key}" for key in keys}

    def _models_for(self, item: str) -> dict[str, dict[str, Leaf]]:
        """The models, those beside the optimizer first."""
        beside = item.rpartition(".")[0]
        order = sorted(self.tree.models, key=lambda model: model.rpartition(".")[0] != beside)
        return {model: self.tree.models[model] for model in order}

    def _order(self, model: str, optimizer: OptimizerTree, keys: Sequence[Any]) -> list[str] | None:
        """A model's parameters in the optimizer's order, where one is found that its state fits."""
        candidates = {
            fqn: leaf
            for fqn, leaf in self.tree.models[model].items()
            if not _is_buffer(fqn) and f"{model}.{fqn}" not in self.catalog.aliases
        }
        states = {_as_number(key): state for key, state in optimizer.states.items()}
        if len(candidates) > len(keys):
            large = (self._large(states.get(_as_number(key), {})) for key in keys)
            return _only_way(candidates, [shapes[0] if shapes else None for shapes in large])
        if len(candidates) < len(keys):
            return None
        for order in _orders(candidates, [len(group["params"]) for group in optimizer.groups]):
            shapes = {_as_number(key): candidates[fqn].shape for key, fqn in zip(keys, order, strict=True)}
            if all(self._fits(shapes.get(key), state) for key, state in states.items()):
                return order
        return None

    def _large(self, state: dict[Any, Any]) -> list[tuple[int, ...]]:
        """The shapes of what is more than one number."""
        shapes = [value.shape for value in state.values() if self.leaves.is_tensor(value)]
        return [one for one in shapes if math.prod(one) > 1]

    def _fits(self, shape: tuple[int, ...] | None, state: dict[Any, Any]) -> bool:
        """Whether state can be that of a parameter of a shape: of its shape, or one row or column of it."""
        large = self._large(state)
        if shape is None:
            return not large
        return not large or any(one == shape or one in _factors(shape) for one in large)


def _orders(candidates: dict[str, Leaf], sizes: Sequence[int]) -> Iterator[list[str]]:
    """Orders that optimizers have: the model's own; or matrices and the rest apart, as weight decay wants it."""
    yield list(candidates)
    matrices = [fqn for fqn, leaf in candidates.items() if len(leaf.shape) >= 2]
    others = [fqn for fqn in candidates if fqn not in set(matrices)]
    if list(sizes) == [len(matrices), len(others)]:
        yield matrices + others
    if list(sizes) == [len(others), len(matrices)]:
        yield others + matrices


def _only_way(candidates: dict[str, Leaf], shapes: Sequence[tuple[int, ...] | None]) -> list[str] | None:
    """Which of a model's parameters these are, in its order, some being left out; None where there are two ways.

    There is one way if it is the same to take the first that fits each time, and from the end the last that fits.
    """
    names = list(candidates)
    first = _taken(names, candidates, shapes)
    last = _taken(names[::-1], candidates, shapes[::-1])
    return first if first and last and first == last[::-1] else None


def _taken(
    names: Sequence[str], candidates: dict[str, Leaf], shapes: Sequence[tuple[int, ...] | None]
) -> list[str] | None:
    left = iter(names)
    found = [next((name for name in left if shape in (None, candidates[name].shape)), None) for shape in shapes]
    return None if None in found else [name for name in found if name is not None]


def _factors(shape: tuple[int, ...]) -> set[tuple[int, ...]]:
    """The shapes of a matrix's rows and columns, with the other dimension dropped or 1."""
    found: set[tuple[int, ...]] = set()
    for dim in range(len(shape)):
        found |= {shape[:dim] + shape[dim + 1 :], (*shape[:dim], 1, *shape[dim + 1 :])}
    return found


def _as_number(key: Any) -> Any:
    """DCP makes the keys of dicts text, but not what stands in a group's "params"."""
    return int(key) if isinstance(key, str) and key.isdigit() else key


def _full(fqn: str, models: dict[str, dict[str, Leaf]]) -> str:
    """The full name of a parameter by its name in a model; a wrapper may have put `module.` before it."""
    for model, tensors in models.items():
        for name in (fqn, f"module.{fqn}"):
            if name in tensors:
                return f"{model}.{name}"
    return f"{next(iter(models), 'model')}.{fqn}"


def _is_buffer(fqn: str) -> bool:
    return fqn.rpartition(".")[2] in _BUFFERS
