"""From verified images into the live state, in place.

Stages: `propose` checks that the images fit the state and overwrites nothing → `Proposal.install` gives optimizers the
state tensors that they lack → `scatter.py` fills the ranges, block by block → `extras.py` does the rest.
Same world size: a tensor's ranges are found by name and box over the images of the ranks that it is shared with. For
jobs of another size `reshaped.py` has another catalog.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor import empty as empty_dtensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only

from resilient.checkpoint.extras import columns_by_parameter
from resilient.checkpoint.leaves import Leaf, Leaves, overlaps, place_of
from resilient.checkpoint.pieces import Piece
from resilient.checkpoint.provided import Provided
from resilient.checkpoint.record import Record
from resilient.checkpoint.restore.boxes import Filling
from resilient.checkpoint.restore.images import Stored
from resilient.checkpoint.restore.scatter import Range
from resilient.errors import DamagedImage, LayoutMismatch

_log = logging.getLogger("resilient")


Known = Mapping[str, Sequence[Range | Filling]]
"""What fills tensors, by their keys."""


class Catalog:
    """The pieces of all images by name. Only what `rank` may use: its own pieces, and all that are shared."""

    def __init__(self, pieces: Iterable[Stored], rank: int) -> None:
        self._rank = rank
        self._by_key: dict[str, list[Stored]] = {}
        for stored in pieces:
            if not stored.own or stored.image_rank == rank:
                self._by_key.setdefault(stored.key, []).append(stored)

    def needed_keys(self) -> list[str]:
        """What must have its place in this rank's model: all that this rank itself has saved of it.

        Each shared piece is in the image of a rank that held it, so what any rank lacks is noticed by one of them.
        """
        return [
            key
            for key, pieces in self._by_key.items()
            if any(one.image_rank == self._rank and one.kind in ("parameter", "buffer", "tensor") for one in pieces)
        ]

    def of_optimizer(self, item: str) -> dict[str, dict[str, list[Stored]]]:
        """The pieces of an optimizer's state, by parameter and name."""
        found: dict[str, dict[str, list[Stored]]] = {}
        for pieces in self._by_key.values():
            first = pieces[0]
            if first.kind == "optimizer" and first.key.startswith(f"{item}.state."):
                found.setdefault(first.parameter, {})[first.name] = pieces
        return found

    def ranges(self, key: str, local: Tensor, box: Piece, pieces: list[Stored]) -> Sequence[Range | Filling]:
        """Where the bytes of one box are. Raises LayoutMismatch, naming the tensor, where they do not cover it."""
        return ranges_of(key, local, box, pieces)

    def find(self, leaf: Leaf) -> list[Stored]:
        """The pieces from which a tensor can be restored. Other groups of ranks may have another of the same name."""
        return self.shared_with(leaf.group, self._by_key.get(leaf.key, []))

    def shared_with(self, group: tuple[int, ...], pieces: list[Stored]) -> list[Stored]:
        if group:
            return [one for one in pieces if one.image_rank in group]
        return [one for one in pieces if one.own] or pieces


class CutOtherwise(LayoutMismatch):
    """The snapshot has the tensor, cut at other places than this job cuts it. Never leaves this package."""


def is_cut_otherwise(record: Record, found: Leaves) -> bool:
    """Whether a rank's own record is seen at once to be of a job that cut its tensors at other places.

    Only a hint: False says nothing, since of what replicas share a rank may have saved nothing.
    """
    leaves = found.by_key()
    for raw in record.pieces():
        leaf = leaves.get(raw["key"]) if "nbytes" in raw else None
        if leaf is not None and (tuple(raw["offsets"]), tuple(raw["sizes"])) != (leaf.box.offsets, leaf.box.sizes):
            return True
        if leaf is not None and leaf.at is not None and (raw["start"], raw["stop"]) != (leaf.box.start, leaf.box.stop):
            return True
    return False


def ranges_of(key: str, local: Tensor, box: Piece, pieces: list[Stored]) -> list[Range]:
    """Where the bytes of one box are. Raises LayoutMismatch, naming the tensor: CutOtherwise for a matter of cuts."""
    if not pieces:
        raise LayoutMismatch(f"the snapshot has no tensor {key!r}: was it made by another model?")
    if not box.numel and not box.is_box:
        return []  # a rank that has nothing of a flat partition
    stored = sorted(pieces, key=lambda one: one.piece.start)
    if stored[0].dtype != local.dtype or stored[0].piece.shape != box.shape:
        raise LayoutMismatch(
            f"tensor {key!r} is {stored[0].dtype} {stored[0].piece.shape} in the snapshot and "
            f"{local.dtype} {box.shape} in this job"
        )
    found, covered, seen = [], box.start, False
    for one in stored:
        if one.piece.same_box(box):
            seen = True
            if one.piece.start == covered < box.stop:
                start, stop = one.piece.start - box.start, one.piece.stop - box.start
                found.append(Range(one.image_rank, one.offset, one.nbytes, local, start, stop))
                covered = one.piece.stop
    if covered != box.stop or not seen:
        raise CutOtherwise(
            f"tensor {key!r}: the snapshot has {covered - box.start} of the {box.numel} elements of the part at "
            f"{box.offsets} with sizes {box.sizes} that this rank needs: it was sharded differently"
        )
    return found


@dataclass(slots=True)
class Proposal:
    """All that a restore will do to the tensors of the state, checked. Nothing has changed yet.

    `cut_otherwise`: it does nothing, for the snapshot is cut at other places than this job.
    """

    ranges: list[Range | Filling] = field(default_factory=list)
    states: list[tuple[Optimizer, Any, dict[Any, Any]]] = field(default_factory=list)  # key of its state, new contents
    cut_otherwise: bool = False

    @property
    def flat(self) -> list[Range]:
        """The ranges of a job that is cut as the one was that made the snapshot: all of them, or none."""
        return [span for span in self.ranges if isinstance(span, Range)]

    def install(self) -> None:
        """Give the optimizers' states their new contents; the tensors in them are filled by the ranges."""
        for optimizer, key, contents in self.states:
            if contents:
                state = optimizer.state[key]
                state.clear()
                state.update(contents)
            else:
                optimizer.state.pop(key, None)


def propose(
    state: Mapping[str, object], found: Leaves, catalog: Catalog, objects: Mapping[str, Any], known: Known | None = None
) -> Proposal:
    """All ranges that restore the state's tensors, and the optimizer state to make for them. `found`: its walk.

    `known`: what `known_ranges` has found already.
    Overwrites nothing. Raises LayoutMismatch, on this rank only: all ranks have to agree before they go on.
    """
    proposal = Proposal()
    _check_names(found, catalog)
    _check_objects(state, objects)
    for leaf in found.leaves:
        if leaf.kind != "optimizer" and leaf.key not in found.provided:
            ranges = (known or {}).get(leaf.key)
            proposal.ranges += _ranges_of_model(leaf, catalog) if ranges is None else ranges
    for item, value in state.items():
        if isinstance(value, Optimizer) and item in objects:
            _propose_optimizer(proposal, item, value, found, catalog, objects[item])
        elif isinstance(value, Provided):
            wanted = value.propose(found, item, catalog)
            proposal.states += wanted.states
            for leaf in wanted.leaves:
                proposal.ranges += _ranges_of_model(leaf, catalog)
    return proposal


def known_ranges(found: Leaves, catalog: Catalog) -> Iterator[tuple[str, Sequence[Range | Filling]]]:
    """By key those of the ranges that `propose` will find for which no objects are needed. Overwrites nothing.

    What does not fit is left out: to say so is up to `propose`.
    """
    for leaf in found.leaves:
        if leaf.kind != "optimizer" and leaf.key not in found.provided and not overlaps(leaf.local):
            with suppress(LayoutMismatch, DamagedImage):
                yield leaf.key, catalog.ranges(leaf.key, leaf.local, leaf.box, catalog.find(leaf))


def _check_names(found: Leaves, catalog: Catalog) -> None:
    """Everything that was saved of the model must have its place; what is new in the job is found elsewhere."""
    known = found.by_key()
    for key in catalog.needed_keys():
        if key in found.aliases:
            raise LayoutMismatch(
                f"tensor {key!r} is one with {found.aliases[key]!r} in this job (tied), but not in the snapshot"
            )
        if key not in known:
            raise LayoutMismatch(f"the snapshot has tensor {key!r}, which this job's state does not have")


def _check_objects(state: Mapping[str, object], objects: Mapping[str, Any]) -> None:
    for item, value in state.items():
        saved = objects.get(item, {"param_groups": []})
        if isinstance(value, Optimizer) and not (isinstance(saved, dict) and "param_groups" in saved):
            raise LayoutMismatch(f"state[{item!r}] is an optimizer, and was none when the snapshot was made")


def _ranges_of_model(leaf: Leaf, catalog: Catalog) -> Sequence[Range | Filling]:
    try:
        ranges = catalog.ranges(leaf.key, leaf.local, leaf.box, catalog.find(leaf))
    except LayoutMismatch as error:
        if leaf.persistent:
            raise
        _log.warning("%s; it is a buffer that need not be in a state, and keeps its present value", error)
        return []
    if overlaps(leaf.local):
        # An expanded tensor: its elements may have values of their own now.
        leaf.tensor.data = leaf.tensor.data.clone(memory_format=torch.contiguous_format)
        ranges = catalog.ranges(leaf.key, leaf.tensor.detach(), leaf.box, catalog.find(leaf))
    return ranges


def _propose_optimizer(
    proposal: Proposal, item: str, optimizer: Optimizer, found: Leaves, catalog: Catalog, values: Mapping[str, Any]
) -> None:
    """The state that the snapshot has for each parameter: live tensors where they fit, new ones where they do not."""
    leaves, saved = found.by_key(), catalog.of_optimizer(item)
    plain = columns_by_parameter(values["state"])
    made, on_device = values.get("made", {}), values.get("on_device", {})
    for key in {name for names in found.groups[item] for name in names}:
        parameter = leaves[key]
        live = optimizer.state.get(parameter.tensor, {})
        contents: dict[Any, Any] = {}
        for name, value in plain.get(key, {}).items():
            contents[name] = _on_device(value, parameter.local.device) if name in on_device.get(key, ()) else value
        for name, pieces in saved.get(key, {}).items():
            usable = catalog.shared_with(() if pieces[0].own else parameter.group, pieces)
            if usable:
                contents[name] = tensor = _tensor_for(usable[0], parameter, live.get(name), made.get(key, {}).get(name))
                proposal.ranges += _ranges_of_state(catalog, usable, tensor, parameter)
        proposal.states.append((optimizer, parameter.tensor, contents))
    for key, contents in values.get("others", {}).items():
        proposal.states.append((optimizer, key, contents))


def _ranges_of_state(
    catalog: Catalog, pieces: list[Stored], tensor: Tensor, parameter: Leaf
) -> Sequence[Range | Filling]:
    if not isinstance(tensor, DTensor):
        return catalog.ranges(pieces[0].key, tensor.detach(), Piece.whole(tensor.shape), pieces)
    box = parameter.box if _is_cut_alike(tensor, parameter.tensor) else place_of(tensor).box
    return catalog.ranges(pieces[0].key, tensor._local_tensor.detach(), box, pieces)


def _is_cut_alike(tensor: DTensor, like: Tensor) -> bool:
    """Whether it lies on its ranks as another does, so that its box is known: to find it out again takes long."""
    return (
        isinstance(like, DTensor)
        and tensor.device_mesh is like.device_mesh
        and (tensor.placements, tensor.shape) == (like.placements, like.shape)
    )


def _on_device(value: Any, device: torch.device) -> Any:
    return tree_map_only(Tensor, lambda tensor: tensor.to(device), value)


def _tensor_for(stored: Stored, parameter: Leaf, live: Any, made: dict[str, Any] | None) -> Tensor:
    """A tensor for saved optimizer state: the live one if it fits, else one that is made as the saved one was."""
    shape, like = stored.piece.shape, parameter.tensor
    placements = _placements(stored, like, live, made)
    if isinstance(live, Tensor) and live.dtype == stored.dtype and tuple(live.shape) == shape:
        same = (list(live.placements) if isinstance(live, DTensor) else None) == placements
        if same and not overlaps(live):
            return live
    if placements is not None and isinstance(like, DTensor):
        if (list(like.placements), tuple(like.shape)) == (placements, shape):
            return torch.empty_like(like, dtype=stored.dtype, requires_grad=False)
        return empty_dtensor(shape, dtype=stored.dtype, device_mesh=like.device_mesh, placements=placements)
    device = torch.device("cpu") if stored.host else parameter.local.device
    if made is not None and "strides" in made:
        return torch.empty_strided(shape, made["strides"], dtype=stored.dtype, device=device)
    return torch.empty(shape, dtype=stored.dtype, device=device)


def _placements(stored: Stored, like: Tensor, live: Any, made: dict[str, Any] | None) -> list[Any] | None:
    """How saved state is spread over its parameter's mesh; None for what is not."""
    if not isinstance(like, DTensor):
        return None
    if made is None or "placements" not in made:
        if stored.mesh:
            return list(like.placements)
        return _placements_of(live, stored)
    said = made["placements"]
    if len(said) == like.device_mesh.ndim:
        return [Replicate() if dim is None else Shard(dim) for dim in said]
    # Of another mesh: cut along the same dimensions, over the axes over which its parameter is.
    return [one if isinstance(one, Shard) and one.dim in said else Replicate() for one in like.placements]


def _placements_of(live: Any, stored: Stored) -> list[Any] | None:
    """How live state lies that the snapshot has from a job without a mesh: factored moments, say."""
    if not isinstance(live, DTensor) or (live.dtype, tuple(live.shape)) != (stored.dtype, stored.piece.shape):
        return None
    return list(live.placements) if all(isinstance(one, Shard | Replicate) for one in live.placements) else None
