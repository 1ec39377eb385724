"""The optimizer of a DeepSpeed engine as an item of a state: masters, their state and hyperparameters, by parameter.

ZeRO keeps flat partitions of many parameters; here each parameter's range of them is a piece of its own, so that a
snapshot says nothing about the stage or the number of ranks that made it, and any of them can load it. Masters are the
state `fp32` where parameters are kept in another precision. When all is loaded, the engine makes the parameters anew
from the masters.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from resilient.checkpoint.extras import apply_groups, columns_by_parameter
from resilient.checkpoint.formats.deepspeed_engine import Flat, flats, group_names, inner, partitioned, renew, shape_of
from resilient.checkpoint.formats.deepspeed_zero import MASTER, Fragment
from resilient.checkpoint.leaves import Leaf, Leaves
from resilient.checkpoint.pieces import Piece
from resilient.checkpoint.provided import Provided, Saved, Wanted
from resilient.checkpoint.restore.images import Stored
from resilient.errors import LayoutMismatch, StateError
from resilient.launch.deepspeed.engine_model import of_master
from resilient.launch.deepspeed.names import Names

_States = Mapping[str, Mapping[str, list[Stored]]]


class EngineOptimizer(Provided):
    """Holds the engine; all methods are for the training thread. `model`: the name of the item with the module."""

    def __init__(self, engine: Any, model: str = "model") -> None:
        self._engine = engine
        self._model = model

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The live groups of the optimizer within the engine's."""
        groups: list[dict[str, Any]] = inner(self._engine).param_groups
        return groups

    def walk(self, found: Leaves, item: str) -> None:
        layout = _Layout(self._engine, self._model)
        found.groups[item] = layout.groups()
        found.watch.add(self.param_groups)
        found.watch.add(inner(self._engine).state)
        for flat in layout.flats:
            found.watch.add_keys(flat.state, list(flat.state))
            for fragment in flat.fragments:
                for leaf in self._leaves(item, layout, flat, fragment):
                    found.add(leaf)

    def capture(self) -> dict[str, Any]:
        layout = _Layout(self._engine, self._model)
        groups = [{key: value for key, value in group.items() if key != "params"} for group in self.param_groups]
        return {"param_groups": groups, "state": list(_columns(layout))}

    def propose(self, found: Leaves, item: str, saved: Saved) -> Wanted:
        layout = _Layout(self._engine, self._model)
        states = saved.of_optimizer(item)
        leaves: list[Leaf] = []
        contents = []
        for flat in layout.flats:
            leaves += [self._master(item, layout, flat, one, states) for one in flat.fragments]
            made: dict[Any, Any] = {}
            for name in _names_of(flat, layout, states):
                made[name], wanted = self._state(item, layout, flat, name, states)
                leaves += wanted
            contents.append((inner(self._engine), flat.master, made))
        return Wanted(leaves, contents)

    def apply(self, value: Any, groups: Sequence[Sequence[str]], found: Leaves, item: str) -> list[str]:
        layout = _Layout(self._engine, self._model)
        plain = columns_by_parameter(value["state"])
        with torch.no_grad(), partitioned(self._engine):
            for flat in layout.flats:
                for name in flat.names:
                    flat.state.update(plain.get(layout.key(name), {}))
            renew(self._engine, layout.flats)
        saved = list(zip(groups, value["param_groups"], strict=True))
        return apply_groups(self.param_groups, saved, layout.groups(), item)

    def _leaves(self, item: str, layout: "_Layout", flat: Flat, fragment: Fragment) -> Iterator[Leaf]:
        """The tensors of one parameter's range: its master, where it is not saved as the parameter, and its state."""
        key, shape = layout.key(fragment.name), layout.shapes[fragment.name]
        if flat.separate and flat.master.dtype != layout.dtypes[fragment.name]:
            full = _full(item, key, MASTER)
            yield of_master(full, flat, fragment, shape, kind="optimizer", parameter=key, name=MASTER)
        for name, tensor in flat.state.items():
            if not isinstance(tensor, Tensor):
                continue
            full = _full(item, key, name)
            if tensor.shape == flat.master.shape:
                how: Any = {"kind": "optimizer", "tensor": tensor, "parameter": key, "name": name}
                yield of_master(full, flat, fragment, shape, **how)
            elif not flat.cut:
                yield _whole(full, flat, tensor, flat.ranks, parameter=key, name=name)
            elif tensor.numel() == 1 and not tensor.dim():
                if not fragment.begin and fragment.numel:  # one of the ranks says it, for all have the same
                    yield _whole(full, flat, tensor, flat.ranks if flat.copied else (), parameter=key, name=name)
            else:
                raise StateError(
                    f"state {name!r} of the optimizer has the shape {tuple(tensor.shape)} for a partition of the shape "
                    f"{tuple(flat.master.shape)}, with {fragment.name}: it cannot be told by parameter"
                )

    def _master(self, item: str, layout: "_Layout", flat: Flat, fragment: Fragment, states: _States) -> Leaf:
        """What a master is filled from: the saved master, or a parameter that was kept in full precision."""
        key = layout.key(fragment.name)
        source = _full(item, key, MASTER) if MASTER in states.get(key, {}) else key
        return of_master(source, flat, fragment, layout.shapes[fragment.name], kind="optimizer")

    def _state(self, item: str, layout: "_Layout", flat: Flat, name: str, states: _States) -> tuple[Tensor, list[Leaf]]:
        """A tensor for one state of a flat master, the live one where it fits; and what of it is to be filled."""
        having = [one for one in flat.fragments if name in states.get(layout.key(one.name), {})]
        keys = [layout.key(one.name) for one in having] or [
            key for key in map(layout.key, flat.names) if name in states.get(key, {})
        ]
        stored = states[keys[0]][name][0]
        whole = all(states[layout.key(one.name)][name][0].piece.shape == layout.shapes[one.name] for one in having)
        live = flat.state.get(name)
        device = torch.device("cpu") if stored.host else flat.master.device
        if not whole if flat.cut else stored.piece.shape != tuple(flat.master.shape):
            if flat.cut and stored.piece.shape:
                raise LayoutMismatch(
                    f"state {name!r} of {keys[0]!r} has the shape {stored.piece.shape} in the snapshot: it cannot be "
                    "put into a partition of many parameters; restore with the ZeRO stage that made it"
                )
            shape: Any = stored.piece.shape
            tensor = _fitting(live, shape, stored.dtype, device)
            first = next((one for one in having if not one.begin and one.numel), None)
            key = keys[0] if first is None else layout.key(first.name)
            return tensor, [_whole(_full(item, key, name), flat, tensor, flat.ranks, parameter=key, name=name)]
        tensor = _fitting(live, flat.master.shape, stored.dtype, flat.master.device)
        return tensor, [
            of_master(
                _full(item, layout.key(one.name), name),
                flat,
                one,
                layout.shapes[one.name],
                kind="optimizer",
                tensor=tensor,
                parameter=layout.key(one.name),
                name=name,
            )
            for one in having
        ]


class _Layout:
    """The engine's masters, and its parameters' names in a snapshot, shapes and dtypes: as they are now."""

    def __init__(self, engine: Any, model: str) -> None:
        self._names = Names(engine)
        self._model = model
        self._groups = group_names(engine)
        self.flats = flats(engine)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        for parameter, name in engine.param_names.items():
            self.shapes[name] = shape_of(parameter)
            self.dtypes[name] = parameter.dtype

    def key(self, name: str) -> str:
        return f"{self._model}.{self._names.of(name)}"

    def groups(self) -> list[list[str]]:
        return [[self.key(name) for name in names] for names in self._groups]


def _full(item: str, parameter: str, name: Any) -> str:
    return f"{item}.state.{parameter}.{name}"


def _names_of(flat: Flat, layout: _Layout, states: _States) -> list[str]:
    """The states that the snapshot has for a flat master, beside the master itself."""
    keys = map(layout.key, flat.names)
    return list({name: None for key in keys for name in states.get(key, {}) if name != MASTER})


def _columns(layout: _Layout) -> Iterator[dict[str, Any]]:
    """What is no tensor in the state of each master, said of each of its parameters (see `extras.py`)."""
    for flat in layout.flats:
        others = {name: value for name, value in flat.state.items() if not isinstance(value, Tensor)}
        if others:
            parameters = [layout.key(name) for name in flat.names]
            values = {name: [value] * len(parameters) for name, value in others.items()}
            yield {"parameters": parameters, "values": values}


def _fitting(live: Any, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The live tensor if it fits, else one of zeros: the padding of a partition is not saved."""
    if isinstance(live, Tensor) and tuple(live.shape) == tuple(shape) and live.dtype == dtype:
        return live
    return torch.zeros(tuple(shape), dtype=dtype, device=device)


def _whole(full: str, flat: Flat, tensor: Tensor, replicas: tuple[int, ...], *, parameter: str, name: str) -> Leaf:
    return Leaf(
        key=full,
        kind="optimizer",
        tensor=tensor,
        local=tensor,
        box=Piece.whole(tensor.shape),
        replicas=replicas,
        group=flat.ranks,
        parameter=parameter,
        name=name,
    )
