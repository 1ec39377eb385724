"""The tensors of a state, by name: modules, optimizers and single tensors become `Leaf`s.

Names are the parameters' fully qualified names below the name of the item: `model.layers.0.weight`,
`optimizer.state.model.layers.0.weight.exp_avg`. Wrappers (DDP, torch.compile, activation checkpointing) leave no
trace in them. The walk also returns what has to be looked at to know that the structure is still the same
(`Watch`), so that a save need not walk again. What is not a tensor is `objects.py`'s.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parameter import UninitializedTensorMixin
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from resilient.checkpoint.dtypes import safetensors_dtype
from resilient.checkpoint.pieces import Piece
from resilient.errors import StateError

Kind = Literal["parameter", "buffer", "optimizer", "tensor"]
_TRANSPARENT = frozenset({"_orig_mod", "_checkpoint_wrapped_module"})


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Leaf:
    """One tensor of the state. `tensor` is as the owner holds it (maybe a DTensor), `local` the bytes of this rank.

    `replicas` are the global ranks that hold the same box, this one included, in ascending order; `own` says that
    other ranks may hold something else under the same name. For optimizer state `parameter` is the name of the
    parameter and `name` the key in its state.
    """

    key: str
    kind: Kind
    tensor: Tensor
    local: Tensor
    box: Piece
    replicas: tuple[int, ...]
    own: bool
    parameter: str = ""
    name: str = ""


class Watch:
    """Looks at a structure that was walked before and tells whether it is still the same, in well under 0.1 us a value.

    Compares identities: list equality tries identity first, and what is not identical is treated as changed when the
    comparison itself fails (tensors of several elements). A one-element tensor replaced by an equal one counts as the
    same, and may: the value that would be saved is the same.
    """

    def __init__(self) -> None:
        self._views: list[Iterable[object]] = []
        self._seen: list[object] = []

    def add(self, container: dict[Any, Any] | list[Any]) -> None:
        """Watch the values of a dictionary, or the items of a list, for replacement and change of number."""
        self._views.append(container.values() if isinstance(container, dict) else container)

    def add_keys(self, container: Mapping[Any, object], keys: Sequence[Any]) -> None:
        """Watch only some values of a mapping (others change at every step)."""
        self._views.append(_Keys(container, tuple(keys)))

    def freeze(self) -> None:
        self._seen = list(chain.from_iterable(self._views))

    def unchanged(self) -> bool:
        try:
            return list(chain.from_iterable(self._views)) == self._seen
        except (RuntimeError, KeyError, TypeError):
            return False  # tensors of several elements have no truth value: something was replaced


@dataclass(frozen=True, slots=True)
class _Keys:
    container: Mapping[Any, object]
    keys: tuple[Any, ...]

    def __iter__(self) -> Iterator[object]:
        yield len(self.container)
        yield from map(self.container.__getitem__, self.keys)


@dataclass(slots=True)
class Leaves:
    """All that a walk finds. `aliases` maps a second name of a tied tensor to its first."""

    leaves: list[Leaf] = field(default_factory=list)
    aliases: dict[str, str] = field(default_factory=dict)
    groups: dict[str, list[list[str]]] = field(default_factory=dict)  # optimizer → names of each group's parameters
    mixed: dict[str, list[tuple[Leaf, dict[str, Any]]]] = field(default_factory=dict)  # state that is not all tensors
    watch: Watch = field(default_factory=Watch)
    _by_id: dict[int, Leaf] = field(default_factory=dict)

    def by_key(self) -> dict[str, Leaf]:
        return {leaf.key: leaf for leaf in self.leaves}

    def named(self, tensor: Tensor) -> Leaf | None:
        """The leaf of a parameter or buffer that was walked before."""
        return self._by_id.get(id(tensor))


def walk(state: Mapping[str, object]) -> Leaves:
    """Walk modules and tensors first, then optimizers, which are named after the parameters.

    Raises StateError, naming it, for a tensor that cannot be saved and for a parameter that an optimizer holds but
    nothing else in the state.
    """
    found = Leaves()
    for item, value in state.items():
        if isinstance(value, nn.Module):
            _walk_module(found, value, item, ())
        elif isinstance(value, Tensor):
            _add(found, item, "tensor", value, ())
    for item, value in state.items():
        if isinstance(value, Optimizer):
            _walk_optimizer(found, value, item)
    found.watch.freeze()
    return found


def _walk_module(found: Leaves, module: nn.Module, prefix: str, replicas: tuple[int, ...]) -> None:
    if isinstance(module, DistributedDataParallel):
        group = torch.distributed.get_process_group_ranks(module.process_group)
        _walk_module(found, module.module, prefix, tuple(sorted(group)))
        return
    found.watch.add(module._modules)
    for kind, tensors in (("parameter", module._parameters), ("buffer", module._buffers)):
        found.watch.add(tensors)
        for name, tensor in tensors.items():
            if tensor is not None and name not in module._non_persistent_buffers_set:
                _add(found, f"{prefix}.{name}", "parameter" if kind == "parameter" else "buffer", tensor, replicas)
    for name, child in module._modules.items():
        if child is not None:
            _walk_module(found, child, prefix if name in _TRANSPARENT else f"{prefix}.{name}", replicas)


def _walk_optimizer(found: Leaves, optimizer: Optimizer, item: str) -> None:
    watch = found.watch
    watch.add_keys(optimizer.__dict__, ("state", "param_groups"))
    watch.add(optimizer.param_groups)
    watch.add(optimizer.state)
    found.groups[item], found.mixed[item] = [], []
    for number, group in enumerate(optimizer.param_groups):
        watch.add(group["params"])
        names = [
            _parameter_of(found, parameter, item, number, index) for index, parameter in enumerate(group["params"])
        ]
        found.groups[item].append([leaf.key for leaf in names])
        for parameter, leaf in zip(group["params"], names, strict=True):
            if parameter in optimizer.state:
                _walk_parameter_state(found, optimizer.state[parameter], leaf, item)


def _parameter_of(found: Leaves, parameter: Tensor, item: str, group: int, index: int) -> Leaf:
    leaf = found.named(parameter)
    if leaf is None:
        raise StateError(
            f"parameter {index} of group {group} of optimizer {item!r}, shape {tuple(parameter.shape)}, is in no "
            "module or tensor of the state: add the module it belongs to"
        )
    return leaf


def _walk_parameter_state(found: Leaves, state: dict[str, Any], parameter: Leaf, item: str) -> None:
    tensors = [name for name, value in state.items() if isinstance(value, Tensor)]
    if len(tensors) == len(state):
        found.watch.add(state)
    else:
        found.watch.add_keys(state, tensors)
        found.mixed[item].append((parameter, state))
    for name in tensors:
        _add_optimizer_state(found, f"{item}.state.{parameter.key}.{name}", state[name], parameter, name)


def _add_optimizer_state(found: Leaves, key: str, tensor: Tensor, parameter: Leaf, name: str) -> None:
    """Optimizer state follows its parameter: replicated with it, sharded with it, or this rank's own."""
    replicas, own = parameter.replicas, parameter.own
    if isinstance(parameter.tensor, DTensor) and not isinstance(tensor, DTensor):
        # A counter is the same on all ranks of the mesh; any other plain tensor belongs to the shard beside it.
        whole_mesh = tuple(sorted(parameter.tensor.device_mesh.mesh.flatten().tolist()))
        replicas, own = (whole_mesh, False) if tensor.dim() == 0 else ((), True)
    _append(found, key, "optimizer", tensor, replicas, own=own, parameter=parameter.key, name=name)


def _add(found: Leaves, key: str, kind: Kind, tensor: Tensor, replicas: tuple[int, ...]) -> None:
    known = found.named(tensor)
    if known is not None:
        found.aliases[key] = known.key
        return
    leaf = _append(found, key, kind, tensor, replicas, own=not replicas and not isinstance(tensor, DTensor))
    found._by_id[id(tensor)] = leaf


def _append(
    found: Leaves,
    key: str,
    kind: Kind,
    tensor: Tensor,
    replicas: tuple[int, ...],
    *,
    own: bool,
    parameter: str = "",
    name: str = "",
) -> Leaf:
    _refuse_what_cannot_be_saved(key, tensor)
    if isinstance(tensor, DTensor):
        box, replicas = place(tensor)
        local = tensor._local_tensor
    else:
        box, local = Piece.whole(tensor.shape), tensor
    leaf = Leaf(
        key=key,
        kind=kind,
        tensor=tensor,
        local=local.detach(),
        box=box,
        replicas=replicas,
        own=own,
        parameter=parameter,
        name=name,
    )
    found.leaves.append(leaf)
    return leaf


def place(tensor: DTensor) -> tuple[Piece, tuple[int, ...]]:
    """This rank's box of a DTensor, and the global ranks that hold the same box."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    mesh, placements = tensor.device_mesh, tensor.placements
    sizes, offsets = compute_local_shape_and_global_offset(tensor.shape, mesh, placements)
    here = mesh.get_coordinate()
    index: tuple[slice | int, ...] = tuple(
        slice(None) if placement.is_replicate() else coordinate
        for placement, coordinate in zip(placements, here or (), strict=True)
    )
    replicas = tuple(sorted(mesh.mesh[index].flatten().tolist()))
    if 0 in sizes:  # an empty shard may report an offset beyond the end
        offsets = tuple(min(offset, size) for offset, size in zip(offsets, tensor.shape, strict=True))
    return Piece.box(tensor.shape, offsets, sizes), replicas


def _refuse_what_cannot_be_saved(key: str, tensor: Tensor) -> None:
    problem = ""
    try:
        safetensors_dtype(tensor.dtype)
    except StateError as error:
        raise StateError(f"tensor {key!r}: {error}") from error
    if isinstance(tensor, UninitializedTensorMixin):
        problem = "is not initialised yet: run one forward pass before making the Checkpointer"
    elif tensor.is_meta:
        problem = "is on the meta device and has no bytes: materialise it first (to_empty)"
    elif tensor.layout is not torch.strided:
        problem = f"has layout {tensor.layout}, and only strided tensors can be saved: convert it to dense"
    elif tensor.is_conj() or tensor.is_neg():
        problem = "is a lazy conjugate or negation: call resolve_conj() and resolve_neg() on it first"
    elif tensor.is_quantized or tensor.is_nested:
        problem = "is quantized or nested: save its parts as plain tensors"
    elif isinstance(tensor, DTensor) and any(placement.is_partial() for placement in tensor.placements):
        problem = "is a partial sum over the mesh: redistribute it to Shard or Replicate first"
    elif type(tensor) not in (Tensor, nn.Parameter) and not isinstance(tensor, DTensor):
        problem = f"is a {type(tensor).__name__}, a tensor class that is not known here: save what is inside of it"
    if problem:
        raise StateError(f"tensor {key!r} {problem}")
