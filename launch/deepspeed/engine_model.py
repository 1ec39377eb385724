"""The module of a DeepSpeed engine as an item of a state: parameters and buffers by name, frozen ones too.

With ZeRO-1 and 2 each data-parallel rank holds every parameter, and they share in saving them; with ZeRO-3 each holds a
flat range. Where masters are of the parameters' own dtype they are saved as the parameters, once. What is trained is
not loaded here: it follows from the masters (`engine_optimizer.py`), as in DeepSpeed itself.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor

from resilient.checkpoint.extras import apply_extra_states
from resilient.checkpoint.formats.deepspeed_engine import Flat, flats, ranks_of, replicas_of, shape_of
from resilient.checkpoint.formats.deepspeed_zero import Fragment, parts_of_rank
from resilient.checkpoint.leaves import Leaf, Leaves, range_of
from resilient.checkpoint.modules import modules_of, with_extra_state
from resilient.checkpoint.pieces import Piece
from resilient.checkpoint.provided import Provided, Saved, Wanted
from resilient.checkpoint.unsavable import refuse_tensor
from resilient.launch.deepspeed.names import Names


class EngineModel(Provided):
    """Holds the engine; all methods are for the training thread."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    def walk(self, found: Leaves, item: str) -> None:
        names = Names(self._engine)
        held = masters(self._engine)
        firsts: dict[int, str] = {}
        for name, parameter in self._engine.module.named_parameters(remove_duplicate=False):
            key = f"{item}.{names.of(name)}"
            first = firsts.setdefault(id(parameter), key)
            if first != key:
                found.aliases[key] = first
                continue
            refuse_tensor(key, parameter)
            own = held.get(self._engine.param_names.get(parameter, ""))
            found.add(self._parameter(key, parameter, own))
        for key, part, name, buffer in self._buffers(item, names):
            first = firsts.setdefault(id(buffer), key)
            if first != key:
                found.aliases[key] = first
                continue
            refuse_tensor(key, buffer)
            found.add(_whole(key, "buffer", buffer, persistent=name not in part._non_persistent_buffers_set))
        for _, part, _ in modules_of(self._engine.module):
            found.watch.add(part._buffers)
        found.extra[item] = with_extra_state(self._engine.module)

    def capture(self) -> dict[str, Any]:
        return {name: part.get_extra_state() for name, part in with_extra_state(self._engine.module).items()}

    def propose(self, found: Leaves, item: str, saved: Saved) -> Wanted:
        names = Names(self._engine)
        trained = {f"{item}.{names.of(name)}" for flat in flats(self._engine) for name in flat.names}
        prefix = f"{item}."
        mine = [leaf for leaf in found.leaves if leaf.key.startswith(prefix) and leaf.key in found.provided]
        return Wanted([leaf for leaf in mine if leaf.kind != "optimizer" and leaf.key not in trained])

    def apply(self, value: Any, groups: Sequence[Sequence[str]], found: Leaves, item: str) -> list[str]:
        return apply_extra_states(found.extra[item], value, item)

    def _parameter(self, key: str, parameter: Any, own: tuple[Flat, Fragment] | None) -> Leaf:
        if own is not None and own[0].separate and own[0].master.dtype == parameter.dtype:
            return of_master(key, *own, shape_of(parameter), kind="parameter")
        if hasattr(parameter, "ds_tensor"):
            return _partition(key, parameter)
        return _whole(key, "parameter", parameter, replicas_of(self._engine, parameter))

    def _buffers(self, item: str, names: Names) -> Iterator[tuple[str, Any, str, Tensor]]:
        for prefix, part, _ in modules_of(self._engine.module):
            for name, buffer in part._buffers.items():
                if buffer is not None:
                    full = f"{prefix}.{name}" if prefix else name
                    yield f"{item}.{names.of(full)}", part, name, buffer


def masters(engine: Any) -> dict[str, tuple[Flat, Fragment]]:
    """By the engine's name of a parameter: the master that has some of it, and which part; of none an empty part."""
    found: dict[str, tuple[Flat, Fragment]] = {}
    for flat in flats(engine):
        found |= {name: (flat, Fragment(name, 0, 0, 0)) for name in flat.names}
        found |= {one.name: (flat, one) for one in flat.fragments}
    return found


def of_master(
    key: str,
    flat: Flat,
    fragment: Fragment,
    shape: Sequence[int],
    *,
    kind: Any,
    tensor: Tensor | None = None,
    parameter: str = "",
    name: str = "",
) -> Leaf:
    """What a rank has of a parameter in a flat master, or in a `tensor` of optimizer state that is cut like it."""
    held = flat.master if tensor is None else tensor
    if not flat.cut:
        return _whole(key, kind, held, flat.ranks, parameter=parameter, name=name)
    return _range(key, kind, held, fragment, shape, flat.ranks, flat.copied, parameter=parameter, name=name)


def _partition(key: str, parameter: Any) -> Leaf:
    """What a rank of ZeRO-3 has of a parameter."""
    group = parameter.ds_process_group
    shape = shape_of(parameter)
    [fragment] = parts_of_rank({key: shape}, dist.get_rank(group), dist.get_world_size(group))
    return _range(key, "parameter", parameter.ds_tensor, fragment, shape, ranks_of(group))


def _range(
    key: str,
    kind: Any,
    tensor: Tensor,
    fragment: Fragment,
    shape: Sequence[int],
    group: tuple[int, ...],
    copied: bool = False,
    *,
    parameter: str = "",
    name: str = "",
) -> Leaf:
    box = Piece.whole(shape).part(fragment.begin, fragment.begin + fragment.numel)
    local = range_of(tensor, fragment.start, fragment.numel)
    return Leaf(
        key=key,
        kind=kind,
        tensor=tensor,
        local=local.view(box.sizes) if box.is_box else local,
        box=box,
        replicas=group if copied else (),
        group=group,
        parameter=parameter,
        name=name,
        at=fragment.start,
    )


def _whole(
    key: str,
    kind: Any,
    tensor: Tensor,
    replicas: tuple[int, ...] = (),
    *,
    persistent: bool = True,
    parameter: str = "",
    name: str = "",
) -> Leaf:
    return Leaf(
        key=key,
        kind=kind,
        tensor=tensor,
        local=tensor,
        box=Piece.whole(tensor.shape),
        replicas=replicas,
        group=replicas,
        persistent=persistent,
        parameter=parameter,
        name=name,
    )
