"""The plan: which bytes of the state go where in this rank's image. Made once, used at every save.

`make_plan` decides; `Plan` answers what capture asks at each save, at some ten nanoseconds a tensor: are the tensors
still where they were (`look`), what do samples of them say (`fingerprints`), which copies fill the image (`moves`).
Replicas find their shares without a message, because they walk the same state in the same order.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from resilient.checkpoint.copying import Batch, Move, batched, chunks
from resilient.checkpoint.device import DeviceCopies
from resilient.checkpoint.digest import digest
from resilient.checkpoint.dtypes import dtype_name, safetensors_dtype
from resilient.checkpoint.fingerprint import Fingerprints, Sampled
from resilient.checkpoint.image import PADDING_KEY, Entry, entries_text, up_to_page
from resilient.checkpoint.leaves import Leaf, Leaves, no_collection
from resilient.checkpoint.pieces import Piece, Replicated, share

_EARLY_BYTES = 1 << 20
_ALIGN = 64
_CACHED_MOVES = 8
_TRUTH = {True: "true", False: "false"}
_text = json.JSONEncoder(separators=(",", ":")).encode


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """One piece of this rank's image.

    `early`: copied inside `save`, because it changes before the fence, or has to be made contiguous on its device.
    """

    leaf: Leaf
    piece: Piece
    entry: Entry
    early: bool

    @property
    def start(self) -> int:
        """Where the piece begins in what this rank holds, in elements."""
        return self.piece.start - self.leaf.box.start


@dataclass(frozen=True, slots=True)
class Look:
    """Where the lazily copied tensors are and how often they were written, as seen at one moment."""

    addresses: list[int]
    versions: list[int]


class Plan:
    """Where each piece of a rank goes in its image. Used by the training thread and by one capture thread.

    `data_bytes` are those of the planned tensors; the objects' bytes follow them. `sources` are aliases of the
    tensors, in the order of `planned`: they keep the memory alive that `moves` and `fingerprints` address.
    """

    def __init__(self, planned: Sequence[Planned], data_bytes: int, pieces_text: str) -> None:
        self.planned = list(planned)
        self.data_bytes = data_bytes
        self.pieces_text = pieces_text
        self.digest = digest(pieces_text.encode())
        padding = [Entry(PADDING_KEY, "U8", (pad,), data_bytes - pad, pad)] if (pad := _padding(planned)) else []
        self.header_text = entries_text([one.entry for one in planned] + padding)
        self._early = [one for one in planned if one.early]
        self._staging = [torch.empty_like(one.leaf.live, memory_format=torch.contiguous_format) for one in self._early]
        self._lazy = [one for one in planned if not one.early]
        self._watched: list[tuple[Any, bool]] = [
            (one.leaf.tensor, isinstance(one.leaf.tensor, DTensor)) for one in self._lazy
        ]  # of a flat partition all of it: where its ranges lie follows
        self._relocate()

    @property
    def tensors(self) -> int:
        return len(self.planned)

    def copy_early(self) -> None:
        """Copy at once what changes early. Called by `save`, on the training thread."""
        if self._early:
            with torch.no_grad():
                torch._foreach_copy_(self._staging, [one.leaf.live for one in self._early], non_blocking=True)

    def look(self) -> Look:
        """Read addresses and version counters of the lazily copied tensors now."""
        locals_ = [tensor._local_tensor if sharded else tensor for tensor, sharded in self._watched]
        return Look([tensor.data_ptr() for tensor in locals_], [tensor._version for tensor, _ in self._watched])

    def moved(self, look: Look) -> bool:
        """Whether a tensor has other memory than the plan knows (`.data` was replaced); if so, follow it."""
        if look.addresses == self._addresses:
            return False
        self._relocate()
        return True

    def torn(self, before: Look, after: Look) -> list[str]:
        """Names of the tensors that were written or moved between two looks."""
        rows = zip(self._lazy, before.addresses, after.addresses, before.versions, after.versions, strict=True)
        return [one.leaf.key for one, a, b, v, w in rows if a != b or v != w]

    def changed(self, samples: Any, data: memoryview) -> list[str]:
        """Names of the tensors whose copy differs from the samples that were taken at the save."""
        on_host = [self._sampled[number].leaf.key for number in self.fingerprints.changed(samples, data)]
        return on_host + [key for device in self.devices for key in device.changed(data)]

    def moves(self, data_address: int) -> tuple[list[Move | Batch], list[int]]:
        """The copies of host tensors to an image whose data begins there, in its order, and where each one ends."""
        cached = self._moves.get(data_address)
        if cached is None:
            rows = zip(self.planned, self.sources, strict=True)
            single = [move for one, source in rows for move in _moves_of(one, source, data_address)]
            work = batched(single)
            cached = work, [_end(unit) - data_address for unit in work]
            if len(self._moves) >= _CACHED_MOVES:
                self._moves.clear()
            self._moves[data_address] = cached
        return cached

    def _relocate(self) -> None:
        staging = iter(self._staging)
        self.sources = [next(staging) if one.early else one.leaf.live.detach() for one in self.planned]
        self._moves: dict[int, tuple[list[Move | Batch], list[int]]] = {}
        lazy = [(one, source) for one, source in zip(self.planned, self.sources, strict=True) if not one.early]
        self._addresses = self.look().addresses
        host = [(one, source) for one, source in lazy if source.is_cpu]
        self._sampled = [one for one, _ in host]
        self.fingerprints = Fingerprints(
            [Sampled(source, one.start, one.start + one.piece.numel, one.entry.offset) for one, source in host]
        )
        self.devices = self._device_copies()

    def _device_copies(self) -> list[DeviceCopies]:
        by_device: dict[torch.device, list[tuple[Tensor, int, str]]] = {}
        for one, source in zip(self.planned, self.sources, strict=True):
            if not source.is_cpu and one.piece.numel:
                flat = source.view(-1)[one.start : one.start + one.piece.numel]
                by_device.setdefault(source.device, []).append((flat, one.entry.offset, one.leaf.key))
        return [
            DeviceCopies(device, [row[:2] for row in rows], [row[2] for row in rows])
            for device, rows in by_device.items()
        ]


def make_plan(found: Leaves, rank: int, early_keys: frozenset[str] = frozenset()) -> Plan:
    """Lay out what `rank` saves of the state. Pure but for the staging tensors. `early_keys`: also copied at once."""
    with no_collection():
        return _make_plan(found, rank, early_keys)


def _make_plan(found: Leaves, rank: int, early_keys: frozenset[str]) -> Plan:
    mine = [(leaf, piece) for leaf, piece in _shares(found.leaves, rank) if piece.numel or not prod(leaf.box.sizes)]
    mine.sort(key=lambda pair: -pair[0].local.element_size())
    planned, offset = [], 0
    for leaf, piece in mine:
        entry = _entry(leaf, piece, offset)
        early = (
            leaf.key in early_keys
            or (leaf.kind in ("buffer", "tensor") and entry.nbytes <= _EARLY_BYTES)
            or not (leaf.local.is_cpu or leaf.local.is_contiguous())
        )
        planned.append(Planned(leaf=leaf, piece=piece, entry=entry, early=early))
        offset += entry.nbytes
    pieces = [_described(one) for one in planned]
    pieces += [_text({"key": key, "alias_of": first}) for key, first in found.aliases.items()]
    pieces += [_text({"optimizer": item, "groups": names}) for item, names in found.groups.items()]
    return Plan(planned, _aligned(offset), f"[{','.join(pieces)}]")


def data_start(plan: Plan, extra_header: str) -> int:
    """Where the data of an image begins. Room is rounded up, so that objects which grow a little move nothing."""
    return up_to_page(len(plan.header_text.encode()) + _roomy(len(extra_header.encode()), 4096) + 1024)


def capacity(plan: Plan, begins: int, objects_bytes: int) -> int:
    """Bytes of a buffer for this plan's images, with the same kind of room for the objects."""
    return begins + up_to_page(plan.data_bytes + _roomy(objects_bytes, 16 << 10))


def _roomy(count: int, least: int) -> int:
    return max(least, 1 << (count - 1).bit_length())


def _shares(leaves: Sequence[Leaf], rank: int) -> list[tuple[Leaf, Piece]]:
    """The piece of each leaf that this rank saves: all of its own, its share of what is replicated."""
    alone = [(leaf, leaf.box) for leaf in leaves if len(leaf.replicas) <= 1]
    together = sorted((leaf for leaf in leaves if len(leaf.replicas) > 1), key=lambda leaf: leaf.replicas)
    for ranks, group in groupby(together, key=lambda leaf: leaf.replicas):
        members = sorted(group, key=lambda leaf: leaf.key)
        described = [
            Replicated(leaf.box.numel, leaf.local.element_size(), leaf.local.is_contiguous()) for leaf in members
        ]
        index = ranks.index(rank)
        for leaf, ranges in zip(members, share(described, len(ranks)), strict=True):
            # An empty tensor has nothing to share: its first replica says that it exists.
            if leaf.box.numel or index == 0:
                start, stop = ranges[index]
                alone.append((leaf, leaf.box.part(leaf.box.start + start, leaf.box.start + stop)))
    return alone


def _entry(leaf: Leaf, piece: Piece, offset: int) -> Entry:
    code, trailing = safetensors_dtype(leaf.local.dtype)
    shape = piece.sizes if piece.is_box else (piece.numel,)
    return Entry(leaf.key, code, (*shape, *(trailing or ())), offset, piece.numel * leaf.local.element_size())


def _described(one: Planned) -> str:
    """The entry of a piece in the record, as JSON: put together by hand, since a plan may have very many."""
    leaf, piece = one.leaf, one.piece
    kind = leaf.kind if leaf.persistent else "transient"
    text = (
        f'{{"key":{json.dumps(leaf.key)},"kind":"{kind}","dtype":"{dtype_name(leaf.local.dtype)}",'
        f'"shape":{_list(piece.shape)},"offsets":{_list(piece.offsets)},"sizes":{_list(piece.sizes)},'
        f'"start":{piece.start},"stop":{piece.stop},"offset":{one.entry.offset},"nbytes":{one.entry.nbytes},'
        f'"own":{_TRUTH[leaf.own]},"host":{_TRUTH[leaf.local.is_cpu]}'
    )
    if leaf.kind == "optimizer":
        mesh = _TRUTH[isinstance(leaf.tensor, DTensor)]
        text += f',"parameter":{json.dumps(leaf.parameter)},"name":{json.dumps(leaf.name)},"mesh":{mesh}'
    return text + "}"


def _list(numbers: Sequence[int]) -> str:
    return f"[{','.join(map(str, numbers))}]"


def _moves_of(one: Planned, source: Tensor, data_address: int) -> list[Move]:
    target = data_address + one.entry.offset
    if not source.is_cpu or not one.entry.nbytes:
        return []
    if not source.is_contiguous():
        return [Move(target, source.data_ptr(), one.entry.nbytes, source)]
    return chunks(target, source.data_ptr() + one.start * source.element_size(), one.entry.nbytes)


def _padding(planned: Sequence[Planned]) -> int:
    end = max((one.entry.offset + one.entry.nbytes for one in planned), default=0)
    return _aligned(end) - end


def _aligned(count: int) -> int:
    """So that the objects' tensors after the planned ones lie aligned."""
    return -(-count // _ALIGN) * _ALIGN


def _end(unit: Move | Batch) -> int:
    last = unit.moves[-1] if isinstance(unit, Batch) else unit
    return last.target + last.nbytes
