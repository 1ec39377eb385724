"""The tensors of a state, by name: modules, optimizers and single tensors become `Leaf`s.

Names are the parameters' fully qualified names below the name of the item: `model.layers.0.weight`,
`optimizer.state.model.layers.0.weight.exp_avg`. Wrappers (DDP, torch.compile, activation checkpointing) leave no
trace in them. The walk also returns what has to be looked at to know that the structure is still the same
(`watch.py`), so that a save need not walk again. Modules are named by `modules.py`. What cannot be saved is refused by
`unsavable.py`; what is not a tensor is the business of `extras.py`.
"""

import gc
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from torch.optim import Optimizer

from resilient.checkpoint.modules import modules_of, with_extra_state
from resilient.checkpoint.pieces import Piece
from resilient.checkpoint.provided import Provided
from resilient.checkpoint.unsavable import refuse_optimizer, refuse_tensor
from resilient.checkpoint.watch import Watch
from resilient.errors import StateError

Kind = Literal["parameter", "buffer", "optimizer", "tensor"]
_RESERVED = ("resilient.", "__metadata__")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Leaf:
    """One tensor of the state. `tensor` is as the owner holds it (maybe a DTensor), `local` the bytes of this rank.

    `replicas` are the global ranks that hold the same box, and `group` all that hold parts of the same tensor, both
    with this one and ascending; they are empty for a rank's own, of which others may hold something else under the same
    name. `persistent` is false for buffers that the module does not count as its state: they are saved, since a bit
    that they keep is a bit of the next step, but nothing depends on their being in a snapshot.
    For optimizer state `parameter` is the name of the parameter and `name` the key in its state.
    Of a flat partition that an engine keeps, `at` is the element at which the rank's piece, a range of its box, begins.
    """

    key: str
    kind: Kind
    tensor: Tensor
    local: Tensor
    box: Piece
    replicas: tuple[int, ...] = ()
    group: tuple[int, ...] = ()
    persistent: bool = True
    parameter: str = ""
    name: str = ""
    at: int | None = None

    @property
    def live(self) -> Tensor:
        """What the owner holds now for `local`, which is of the time of the walk."""
        if self.at is not None:
            return range_of(self.tensor, self.at, self.box.numel)
        return self.tensor._local_tensor if isinstance(self.tensor, DTensor) else self.tensor

    def is_current(self) -> bool:
        """Whether `local` is still what the owner holds."""
        if self.at is not None:
            return self.live.data_ptr() == self.local.data_ptr()
        return self.live is self.local and self.tensor.shape == self.box.shape

    @property
    def own(self) -> bool:
        """Whether other ranks may hold something else under this name."""
        return not self.group


@dataclass(slots=True)
class Mixed:
    """The states of some parameters of an optimizer that all have the same names: of tensors, and of other things.

    What becomes a tensor only later may stay among the others: it is saved with them, whatever it is.
    """

    tensors: tuple[Any, ...]
    others: tuple[Any, ...]
    parameters: list[Leaf] = field(default_factory=list)
    states: list[dict[Any, Any]] = field(default_factory=list)


@dataclass(slots=True)
class Leaves:
    """All that a walk finds. `aliases` maps a second name of a tied tensor to its first. By optimizer:

    `groups` has the names of each group's parameters; `mixed` the states that are not all tensors; `made`, by
    parameter and name, how to make a state tensor that is neither contiguous nor sharded like its parameter;
    `others` the keys of state that belongs to no parameter. By module: `extra` has the parts with extra state.
    `provided` has the names of the tensors that items have named themselves.
    """

    leaves: list[Leaf] = field(default_factory=list)
    aliases: dict[str, str] = field(default_factory=dict)
    groups: dict[str, list[list[str]]] = field(default_factory=dict)
    mixed: dict[str, dict[Any, Mixed]] = field(default_factory=dict)
    made: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    others: dict[str, list[Any]] = field(default_factory=dict)
    extra: dict[str, dict[str, nn.Module]] = field(default_factory=dict)
    provided: set[str] = field(default_factory=set)
    watch: Watch = field(default_factory=Watch)
    _by_id: dict[int, Leaf] = field(default_factory=dict)
    _by_key: dict[str, Leaf] = field(default_factory=dict)
    _places: dict[Any, "Place"] = field(default_factory=dict)
    _wholes: dict[torch.Size, Piece] = field(default_factory=dict)

    def by_key(self) -> Mapping[str, Leaf]:
        return self._by_key

    def is_current(self) -> bool:
        """Whether another walk would find the same; the values may be others."""
        return self.watch.unchanged() and all(leaf.is_current() for leaf in self.leaves)

    def named(self, tensor: Tensor) -> Leaf | None:
        """The leaf of a parameter or buffer that was walked before."""
        return self._by_id.get(id(tensor))

    def add(self, leaf: Leaf) -> Leaf:
        """Raises StateError for a second tensor of the same name."""
        if self._by_key.setdefault(leaf.key, leaf) is not leaf:
            raise StateError(f"two tensors would be called {leaf.key!r}: give one of the items another name")
        self.leaves.append(leaf)
        return leaf

    def whole(self, shape: torch.Size) -> Piece:
        """The piece that is all of a tensor; one object for all of a shape."""
        known = self._wholes.get(shape)
        if known is None:
            known = self._wholes[shape] = Piece.whole(shape)
        return known

    def place(self, tensor: DTensor) -> "Place":
        """As `place_of`, which is slow, remembered by what it depends on."""
        key = (tensor.device_mesh, tensor.placements, tensor.shape)
        known = self._places.get(key)
        if known is None:
            known = self._places[key] = place_of(tensor)
        return known


def walk(state: Mapping[str, object]) -> Leaves:
    """Walk modules and tensors first, then optimizers, which are named after the parameters.

    FSDP2 modules that an evaluation left unsharded are sharded again, as their own `state_dict` does it.
    Raises StateError, naming it, for what cannot be saved and for a parameter that an optimizer holds but nothing else
    in the state.
    """
    with no_collection():
        return _walk(state)


@contextmanager
def no_collection() -> Iterator[None]:
    """No garbage collection meanwhile: for making many objects, all to stay, which the collector would look at again
    and again together with all others of the program, for more time than it takes to make them."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _walk(state: Mapping[str, object]) -> Leaves:
    found = Leaves()
    for item, value in state.items():
        if item.startswith(_RESERVED):
            raise StateError(f"state[{item!r}]: names that begin with {item[: item.find('.') + 1] or item!r} are ours")
        if isinstance(value, Provided):
            before = len(found.leaves)
            value.walk(found, item)
            found.provided.update(leaf.key for leaf in found.leaves[before:])
        elif isinstance(value, nn.Module):
            _walk_module(found, value, item)
            found.extra[item] = with_extra_state(value)
        elif isinstance(value, Tensor):
            _add(found, item, "tensor", value)
    for item, value in state.items():
        if isinstance(value, Optimizer):
            _walk_optimizer(found, value, item)
    found.watch.freeze()
    return found


def _walk_module(found: Leaves, module: nn.Module, item: str) -> None:
    _reshard(module)
    watch = found.watch
    parents: list[dict[str, Any]] = []
    watch.add_value(parents, "_modules")  # deleting from a list of modules gives it another dictionary
    for prefix, part, home in modules_of(module, item):
        if part._modules or isinstance(part, nn.ModuleList | nn.Sequential):
            parents.append(part.__dict__)
        watch.add(part._modules)
        watch.add(part._parameters)
        watch.add(part._buffers)
        for name, tensor in part._parameters.items():
            if tensor is not None:
                ranks = home.ranks if id(tensor) not in home.ignored else ()
                _add(found, f"{prefix}.{name}", "parameter", tensor, ranks)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                # Under DDP too each rank has its own: the ranks change them in forward, each with its own batch.
                persistent = name not in part._non_persistent_buffers_set
                _add(found, f"{prefix}.{name}", "buffer", buffer, persistent=persistent)


def _reshard(module: nn.Module) -> None:
    """After a forward without a backward FSDP2 holds plain parameters in place of the sharded ones."""
    loaded = sys.modules.get("torch.distributed.fsdp")  # not imported for this: without it there is no such module
    kind: Any = getattr(loaded, "FSDPModule", None)
    if kind is not None:
        for part in module.modules():
            if isinstance(part, kind):
                sharded: Any = part
                sharded.reshard()


def _walk_optimizer(found: Leaves, optimizer: Optimizer, item: str) -> None:
    refuse_optimizer(optimizer, item)
    watch = found.watch
    watch.add_keys(optimizer.__dict__, ("state", "param_groups"))
    watch.add(optimizer.param_groups)
    watch.add(optimizer.state)
    found.groups[item], found.mixed[item], found.made[item] = [], {}, {}
    found.others[item] = [key for key in optimizer.state if not isinstance(key, Tensor)]
    for number, group in enumerate(optimizer.param_groups):
        parameters = group["params"]
        watch.add(parameters)
        leaves = [_parameter_of(found, parameter, item, number, index) for index, parameter in enumerate(parameters)]
        found.groups[item].append([leaf.key for leaf in leaves])
        for parameter, leaf in zip(parameters, leaves, strict=True):
            if parameter in optimizer.state:
                _walk_parameter_state(found, optimizer.state[parameter], leaf, item)
    for mixed in found.mixed[item].values():
        watch.add_columns(mixed.states, mixed.tensors)


def _parameter_of(found: Leaves, parameter: Tensor, item: str, group: int, index: int) -> Leaf:
    leaf = found.named(parameter)
    if leaf is None:
        raise StateError(
            f"parameter {index} of group {group} of optimizer {item!r}, shape {tuple(parameter.shape)}, is in no "
            "module or tensor of the state: add the module it belongs to"
        )
    return leaf


def _walk_parameter_state(found: Leaves, state: dict[str, Any], parameter: Leaf, item: str) -> None:
    tensors = tuple(name for name, value in state.items() if isinstance(value, Tensor))
    if len(tensors) == len(state):
        found.watch.add(state)
    else:
        names = tensors, tuple(name for name in state if name not in tensors)
        mixed = found.mixed[item].setdefault(names, Mixed(*names))
        mixed.parameters.append(parameter)
        mixed.states.append(state)
    for name in tensors:
        key = f"{item}.state.{parameter.key}.{name}"
        made = _add_optimizer_state(found, key, state[name], parameter, name)
        if made:
            found.made[item].setdefault(parameter.key, {})[name] = made


def _add_optimizer_state(found: Leaves, key: str, tensor: Tensor, parameter: Leaf, name: str) -> dict[str, Any]:
    """Optimizer state follows its parameter: replicated with it, sharded with it, or this rank's own.

    Returns how to make it anew where that is not plain from its dtype and shape.
    """
    replicas = group = parameter.group
    like = parameter.tensor
    if isinstance(like, DTensor) and not isinstance(tensor, DTensor) and tensor.dim():
        replicas = group = ()  # a counter is the same on all ranks of the mesh; this belongs to the shard beside it
    _append(found, key, "optimizer", tensor, replicas, group, parameter=parameter.key, name=name)
    if not isinstance(tensor, DTensor):
        return {} if tensor.is_contiguous() or overlaps(tensor) else {"strides": list(tensor.stride())}
    if isinstance(like, DTensor) and (tensor.placements, tensor.shape) == (like.placements, like.shape):
        return {}
    return {"placements": _placements(key, tensor, like)}


def _placements(key: str, tensor: DTensor, like: Tensor) -> list[int | None]:
    """For each dimension of the parameter's mesh the dimension that is sharded over it, None where it is replicated."""
    plain = all(placement.is_replicate() or type(placement) is Shard for placement in tensor.placements)
    if not (isinstance(like, DTensor) and tensor.device_mesh == like.device_mesh and plain):
        raise StateError(f"tensor {key!r} is spread over ranks in another way than its parameter: it cannot be rebuilt")
    return [getattr(placement, "dim", None) for placement in tensor.placements]


def _add(
    found: Leaves, key: str, kind: Kind, tensor: Tensor, replicas: tuple[int, ...] = (), *, persistent: bool = True
) -> None:
    known = found.named(tensor)
    if known is None:
        found._by_id[id(tensor)] = _append(found, key, kind, tensor, replicas, replicas, persistent=persistent)
    elif known.key != key:
        found.aliases[key] = known.key


def _append(
    found: Leaves,
    key: str,
    kind: Kind,
    tensor: Tensor,
    replicas: tuple[int, ...],
    group: tuple[int, ...],
    *,
    persistent: bool = True,
    parameter: str = "",
    name: str = "",
) -> Leaf:
    refuse_tensor(key, tensor)
    if isinstance(tensor, DTensor):
        place = found.place(tensor)
        box, replicas, group, local = place.box, place.replicas, place.group, tensor._local_tensor
    else:
        box, local = found.whole(tensor.shape), tensor
    return found.add(
        Leaf(
            key=key,
            kind=kind,
            tensor=tensor,
            local=local,
            box=box,
            replicas=replicas,
            group=group,
            persistent=persistent,
            parameter=parameter,
            name=name,
        )
    )


def overlaps(tensor: Tensor) -> bool:
    """Whether elements share memory with one another, so that they cannot be written each by itself."""
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return True
            reach += stride * (size - 1)
    return False


def range_of(tensor: Tensor, at: int, numel: int) -> Tensor:
    """Elements of a contiguous tensor, flat, as a view."""
    return tensor.detach().view(-1)[at : at + numel]


@dataclass(frozen=True, slots=True)
class Place:
    """This rank's box of a DTensor, the global ranks that hold the same box, and all ranks of its mesh."""

    box: Piece
    replicas: tuple[int, ...]
    group: tuple[int, ...]


def place_of(tensor: DTensor) -> Place:
    """Where this rank's part of a DTensor lies. The rank belongs to its mesh."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    mesh, placements = tensor.device_mesh, tensor.placements
    sizes, offsets = compute_local_shape_and_global_offset(tensor.shape, mesh, placements)
    index: tuple[slice | int, ...] = tuple(
        slice(None) if placement.is_replicate() else coordinate
        for placement, coordinate in zip(placements, mesh.get_coordinate() or (), strict=True)
    )
    if 0 in sizes:  # an empty shard may report an offset beyond the end
        offsets = tuple(min(offset, size) for offset, size in zip(offsets, tensor.shape, strict=True))
    ranks = mesh.mesh
    return Place(
        Piece.box(tensor.shape, offsets, sizes),
        replicas=tuple(sorted(ranks[index].flatten().tolist())),
        group=tuple(sorted(ranks.flatten().tolist())),
    )
