"""From verified images into the live state, in place.

Stages: check that the images fit the state (before anything is overwritten) → make optimizer state that is missing →
copy ranges into tensors with several threads → give objects, hyperparameters and RNG their values. Same world size:
a tensor's ranges are found by name and box over the images of all ranks that hold a replica.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from resilient.checkpoint.copying import Move, batched, chunks, cpu_threads, run_moves
from resilient.checkpoint.leaves import Leaf, Leaves, walk
from resilient.checkpoint.pieces import Piece
from resilient.checkpoint.restore.images import Stored
from resilient.errors import LayoutMismatch


@dataclass(frozen=True, slots=True)
class Range:
    """Bytes [offset, offset + nbytes) of rank `image_rank`'s image are elements [start, stop) of `local`, flat."""

    image_rank: int
    offset: int
    nbytes: int
    local: Tensor
    start: int
    stop: int


class Catalog:
    """The pieces of all images by name. Only what a rank may use: its own pieces, and all that are shared."""

    def __init__(self, pieces: Iterable[Stored], rank: int) -> None:
        self._by_key: dict[str, list[Stored]] = {}
        for stored in pieces:
            if not stored.own or stored.image_rank == rank:
                self._by_key.setdefault(stored.key, []).append(stored)

    def keys(self) -> set[str]:
        return set(self._by_key)

    def is_optimizer(self, key: str) -> bool:
        return self._by_key[key][0].kind == "optimizer"

    def optimizer_states(self) -> list[Stored]:
        """One piece of each optimizer tensor, to make it from."""
        return [stored[0] for stored in self._by_key.values() if stored[0].kind == "optimizer"]

    def ranges(self, key: str, local: Tensor, box: Piece) -> list[Range]:
        """Where the bytes of one box are. Raises LayoutMismatch, naming the tensor, where they do not cover it."""
        stored = sorted(self._by_key.get(key, ()), key=lambda one: one.piece.start)
        if not stored:
            raise LayoutMismatch(f"the snapshot has no tensor {key!r}: was it made by another model?")
        if stored[0].dtype != local.dtype or stored[0].piece.shape != box.shape:
            raise LayoutMismatch(
                f"tensor {key!r} is {stored[0].dtype} {stored[0].piece.shape} in the snapshot and "
                f"{local.dtype} {box.shape} in this job"
            )
        found, covered = [], 0
        for one in stored:
            if one.piece.same_box(box) and one.piece.start == covered:
                span = Range(one.image_rank, one.offset, one.nbytes, local, one.piece.start, one.piece.stop)
                found.append(span)
                covered = one.piece.stop
        if covered != box.numel:
            raise LayoutMismatch(
                f"tensor {key!r}: the snapshot has {covered} of the {box.numel} elements of the part at {box.offsets} "
                f"with sizes {box.sizes} that this rank needs: it was sharded differently"
            )
        return found


def plan_load(state: Mapping[str, object], catalog: Catalog, objects: Mapping[str, Any]) -> list[Range]:
    """All ranges that restore the state's tensors. Raises LayoutMismatch; makes missing optimizer state, no more."""
    found = walk(state)
    model = [leaf for leaf in found.leaves if leaf.kind != "optimizer"]
    ranges = [span for leaf in model for span in catalog.ranges(leaf.key, leaf.local, leaf.box)]
    _check_names(found, catalog)
    _make_optimizer_state(state, found, catalog, objects)
    for leaf in walk(state).leaves:
        if leaf.kind == "optimizer":
            ranges += catalog.ranges(leaf.key, leaf.local, leaf.box)
    return ranges


def run_load(ranges: Iterable[Range], views: Mapping[int, memoryview]) -> int:
    """Copy ranges out of images. Returns the number of bytes. `views[rank]` is that rank's whole image."""
    addresses = {rank: _address(view) for rank, view in views.items()}
    moves: list[Move] = []
    total = 0
    with torch.no_grad():
        for span in ranges:
            total += span.nbytes
            if not span.nbytes:
                continue
            source = addresses[span.image_rank] + span.offset
            if span.local.device.type == "cpu" and span.local.is_contiguous():
                begin = span.local.data_ptr() + span.start * span.local.element_size()
                moves += chunks(begin, source, span.nbytes)
            else:
                _copy_tensor(span, views[span.image_rank])
    run_moves(batched(moves), cpu_threads())
    return total


def _copy_tensor(span: Range, view: memoryview) -> None:
    """To a device, or into a tensor that is not contiguous."""
    data = bytearray(view[span.offset : span.offset + span.nbytes])
    flat = torch.frombuffer(data, dtype=torch.uint8).view(span.local.dtype)
    if span.local.is_contiguous():
        span.local.view(-1)[span.start : span.stop].copy_(flat)
    else:
        span.local.copy_(flat.view(span.local.shape))


def _address(view: memoryview) -> int:
    """The address of a view; it may be read-only."""
    return int(np.frombuffer(view, dtype=np.uint8).ctypes.data)


def _check_names(found: Leaves, catalog: Catalog) -> None:
    """Everything that was saved of the model must have its place; what is new in the job was found before."""
    known = {leaf.key for leaf in found.leaves} | set(found.aliases)
    lost = [key for key in catalog.keys() - known if not catalog.is_optimizer(key)]
    if lost:
        raise LayoutMismatch(f"the snapshot has tensor {min(lost)!r}, which this job's state does not have")


def _make_optimizer_state(
    state: Mapping[str, object], found: Leaves, catalog: Catalog, objects: Mapping[str, Any]
) -> None:
    """Give each optimizer the state that the snapshot has: tensors made where they are missing or of another kind."""
    parameters = {leaf.key: leaf for leaf in found.leaves}
    for item, optimizer in state.items():
        if not isinstance(optimizer, Optimizer):
            continue
        saved: dict[str, dict[str, Stored]] = {}
        for stored in catalog.optimizer_states():
            if stored.key.startswith(f"{item}.state.") and stored.parameter in parameters:
                saved.setdefault(stored.parameter, {})[stored.name] = stored
        values = objects.get(item, {}).get("state", {})
        for key in {name for names in found.groups[item] for name in names}:
            _fit(optimizer, parameters[key], saved.get(key, {}), values.get(key, {}))


def _fit(optimizer: Optimizer, parameter: Leaf, tensors: dict[str, Stored], values: dict[str, Any]) -> None:
    if not tensors and not values:
        optimizer.state.pop(parameter.tensor, None)
        return
    state = optimizer.state[parameter.tensor]
    for name in set(state) - set(tensors) - set(values):
        del state[name]
    for name, stored in tensors.items():
        live = state.get(name)
        if not isinstance(live, Tensor) or live.dtype != stored.dtype or tuple(live.shape) != stored.piece.shape:
            state[name] = _empty(stored, parameter)
    state.update(values)


def _empty(stored: Stored, parameter: Leaf) -> Tensor:
    """A tensor for saved optimizer state: sharded like its parameter if it was, on its device unless on the host."""
    like = parameter.tensor
    if stored.mesh and isinstance(like, DTensor) and stored.piece.shape == tuple(like.shape):
        return torch.zeros_like(like, dtype=stored.dtype, memory_format=torch.contiguous_format)
    device = torch.device("cpu") if stored.host else parameter.local.device
    return torch.empty(stored.piece.shape, dtype=stored.dtype, device=device)
