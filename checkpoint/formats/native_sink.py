"""A snapshot of ours from any source: images, fine digests and records for as many ranks as are asked for.

Stages: what is to be saved (`_Saved`) → each rank's share of it, cut as replicas of one job would cut it → an image
(header, tensors, objects), and for it two files that are made from its bytes when they are there: its fine digests and,
last, its record. `Checkpointer.restore` takes the result.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from resilient.checkpoint.catalog.catalog import Catalog, Tensor
from resilient.checkpoint.catalog.meet import boxes_of_range
from resilient.checkpoint.digest import BLOCK_BYTES, FINE_BYTES, FineDigests, block_count, block_range, digest
from resilient.checkpoint.dtypes import safetensors_dtype, torch_dtype
from resilient.checkpoint.formats.folder import Folder
from resilient.checkpoint.formats.output import Output, Part, SinkOptions, TensorBytes
from resilient.checkpoint.formats.source import Source
from resilient.checkpoint.image import PADDING_KEY, Entry, entries_text, header, up_to_page
from resilient.checkpoint.names import digests_name, image_name, record_name
from resilient.checkpoint.objects import encode
from resilient.checkpoint.pieces import Piece, Replicated, share
from resilient.checkpoint.record import Record
from resilient.checkpoint.tail import Tail
from resilient.errors import UsageError

_ALIGN = 64
_RNG = "resilient.rng"
_FLOATING = ("parameter", "buffer", "transient")


@dataclass(frozen=True, slots=True)
class _Saved:
    """A tensor to save, its dtype in the image, and whose it is, where it is one rank's own.

    `values`: the tensor that has them; another where the optimizer's master weights say more.
    """

    tensor: Tensor
    dtype: str
    own: int | None
    values: Tensor

    @property
    def itemsize(self) -> int:
        return replace(self.tensor, dtype=self.dtype).itemsize


@dataclass(frozen=True, slots=True)
class _Placed:
    """A piece of it in an image; `start` and `stop` count elements of the whole tensor, row-major."""

    saved: _Saved
    start: int
    stop: int
    entry: Entry


def plan(source: Source, options: SinkOptions) -> list[Output]:
    """The files of one snapshot of the source's step (0 where it has none), `options.ranks` images.

    Raises UsageError for fewer than one rank, StateError for objects that cannot be saved.
    """
    if options.ranks < 1:
        raise UsageError(f"a snapshot of {options.ranks} ranks was asked for; it takes at least one")
    if options.into is not None:
        raise UsageError(f"a snapshot is a folder of several files, not the one file {options.into!r}: name a folder")
    step = source.catalog.step or 0
    life = f"{0:016x}{digest(source.catalog.text().encode())[:8]}"  # the same when the conversion is taken up again
    shares = _shares(source.catalog, options)
    outputs: list[Output] = []
    for rank, mine in enumerate(shares):
        outputs += _image_of(source, mine, step=step, rank=rank, ranks=options.ranks, life=life)
    return outputs


def _shares(catalog: Catalog, options: SinkOptions) -> list[list[tuple[_Saved, int, int]]]:
    """For each rank, what it saves: its own tensors, and its part of those that all have."""
    ranks, masters = options.ranks, _masters(catalog)
    keeps_own = ranks == catalog.world_size
    together = [tensor for name, tensor in catalog.tensors.items() if not (keeps_own and name in catalog.own)]
    saved = [_saved(tensor, options.dtype, None, masters) for tensor in together]
    cut = share([Replicated(one.tensor.numel, one.itemsize, True) for one in saved], ranks)
    found: list[list[tuple[_Saved, int, int]]] = [[] for _ in range(ranks)]
    for one, ranges in zip(saved, cut, strict=True):
        for rank, (start, stop) in enumerate(ranges):
            if stop > start or (not one.tensor.numel and not rank):
                found[rank].append((one, start, stop))
    for tensors in catalog.own.values() if keeps_own else ():
        for rank, tensor in tensors.items():
            found[rank].append((_saved(tensor, options.dtype, rank, masters), 0, tensor.numel))
    return found


def _saved(tensor: Tensor, wanted: str | None, own: int | None, masters: Mapping[str, Tensor]) -> _Saved:
    """In the dtype that is asked for, for what has values of the model."""
    floating = torch_dtype(tensor.dtype).is_floating_point and tensor.kind in _FLOATING
    if wanted is None or not floating or wanted == tensor.dtype:
        return _Saved(tensor, tensor.dtype, own, tensor)
    master = masters.get(tensor.name)
    better = master is not None and master.shape == tensor.shape and master.itemsize > tensor.itemsize
    return _Saved(tensor, wanted, own, master if master is not None and better else tensor)


def _masters(catalog: Catalog) -> dict[str, Tensor]:
    """The optimizer's copies of parameters in more digits, by the parameter's name."""
    return {tensor.parameter: tensor for tensor in catalog.of_kind("optimizer") if tensor.state == "fp32"}


def _image_of(
    source: Source, mine: Sequence[tuple[_Saved, int, int]], *, step: int, rank: int, ranks: int, life: str
) -> Iterator[Output]:
    placed, end = _placed(mine)
    pad = -end % _ALIGN
    padding = [Entry(PADDING_KEY, "U8", (pad,), end, pad)] if pad else []
    objects = encode(_objects(source, rank), "state")
    tail = Tail(objects, end + pad)
    pieces = _pieces_text(source.catalog, placed)
    texts = [entries_text([*(one.entry for one in placed), *padding]), tail.header_text]
    metadata = {"format": "resilient", "rank": str(rank), "world_size": str(ranks), "step": str(step)}
    begins = up_to_page(sum(len(text.encode()) for text in texts) + 1024)
    written = Tail(objects, 0)
    ending = bytearray(written.end)
    written.write(memoryview(ending))
    parts: list[Part] = [header(texts, metadata, begins)]
    for one in placed:
        parts += _bytes_of(source.catalog, one)
    parts.append(bytes(pad) + ending)
    record = Record(
        run_id="converted",
        life=life,
        step=step,
        rank=rank,
        world_size=ranks,
        plan_digest=digest(pieces.encode()),
        image_name=image_name(step, rank, ranks),
        image_bytes=begins + tail.end,
        blocks=("",) * block_count(begins + tail.end),  # known when they are written
        pieces_text=pieces,
        software={"converted_from": source.catalog.format},
        data_start=begins,
    )
    yield Output(name=record.image_name, parts=tuple(parts))
    yield Output(name=digests_name(step, rank, ranks), last=True, derive=partial(_fine_digests, record.image_name))
    yield Output(name=record_name(step, rank, ranks), last=True, derive=partial(_sealed, record))


def _placed(mine: Sequence[tuple[_Saved, int, int]]) -> tuple[list[_Placed], int]:
    """Where the pieces lie in the data, widest elements first, and where they end."""
    placed: list[_Placed] = []
    offset = 0
    for saved, start, stop in sorted(mine, key=lambda one: -one[0].itemsize):
        code, trailing = safetensors_dtype(torch_dtype(saved.dtype))
        whole = stop - start == saved.tensor.numel
        shape = (*(saved.tensor.shape if whole else (stop - start,)), *(trailing or ()))
        nbytes = (stop - start) * saved.itemsize
        placed.append(_Placed(saved, start, stop, Entry(saved.tensor.name, code, shape, offset, nbytes)))
        offset += nbytes
    return placed, offset


def _bytes_of(catalog: Catalog, one: _Placed) -> Iterator[TensorBytes]:
    tensor = one.saved.values
    rank = None if tensor is catalog.tensors.get(tensor.name) else one.saved.own
    for offsets, sizes in boxes_of_range(one.start, one.stop, tensor.shape):
        yield TensorBytes(tensor.name, offsets, sizes, one.saved.dtype, rank)


def _pieces_text(catalog: Catalog, placed: Sequence[_Placed]) -> str:
    """As the plan of a job describes them (docs/format.md)."""
    hosted = _hosted(catalog)
    found: list[dict[str, Any]] = [_described(one, catalog, hosted) for one in placed]
    found += [{"key": key, "alias_of": first} for key, first in catalog.aliases.items()]
    found += [
        {"optimizer": item, "groups": [group["params"] for group in groups]} for item, groups in catalog.groups.items()
    ]
    return json.dumps(found, separators=(",", ":"))


def _described(one: _Placed, catalog: Catalog, hosted: set[str]) -> dict[str, Any]:
    tensor = one.saved.tensor
    piece = Piece.whole(tensor.shape).part(one.start, one.stop)
    raw: dict[str, Any] = {
        "key": tensor.name,
        "kind": tensor.kind,
        "dtype": one.saved.dtype,
        "shape": list(piece.shape),
        "offsets": list(piece.offsets),
        "sizes": list(piece.sizes),
        "start": piece.start,
        "stop": piece.stop,
        "offset": one.entry.offset,
        "nbytes": one.entry.nbytes,
        "own": one.saved.own is not None,
        "host": tensor.kind == "optimizer" and not tensor.shape and tensor.parameter in hosted,
    }
    if tensor.kind == "optimizer":
        # What has its parameter's shape is spread as the parameter is, where that is spread at all.
        like = catalog.tensors.get(tensor.parameter)
        mesh = like is not None and like.shape == tensor.shape
        raw |= {"parameter": tensor.parameter, "name": tensor.state, "mesh": mesh}
    return raw


def _hosted(catalog: Catalog) -> set[str]:
    """The parameters whose counters of steps lie in host memory, as torch has them unless told otherwise."""
    return {
        name
        for groups in catalog.groups.values()
        for group in groups
        if not (group.get("capturable") or group.get("fused"))
        for name in group["params"]
    }


def _objects(source: Source, rank: int) -> dict[str, Any]:
    """The objects of a rank in the form that `extras.py` gives them, whatever the source is."""
    found = dict(source.objects(rank))
    for item, groups in source.catalog.groups.items():
        held = found.get(item)
        values = dict(held) if isinstance(held, Mapping) else {}
        values["param_groups"] = [{key: group[key] for key in group if key != "params"} for group in groups]
        states = values.get("state", {})
        values["state"] = _columns(states if source.catalog.format == "native" else _with_tensor_steps(states))
        found[item] = values
    for tensor in source.catalog.of_kind("parameter", "buffer", "transient"):
        found.setdefault(tensor.item, {})
    found.setdefault(_RNG, {})
    return found


def _with_tensor_steps(states: Mapping[str, Mapping[Any, Any]]) -> dict[str, dict[Any, Any]]:
    """Counters of steps as torch's optimizers have them; others keep plain numbers."""
    return {
        name: {
            key: torch.tensor(float(value)) if key == "step" and isinstance(value, int | float) else value
            for key, value in state.items()
        }
        for name, state in states.items()
    }


def _columns(states: Mapping[str, Mapping[Any, Any]]) -> list[dict[str, Any]]:
    """State that is no tensor as columns: the parameters that have the same names together."""
    together: dict[tuple[Any, ...], list[str]] = {}
    for name, state in states.items():
        together.setdefault(tuple(state), []).append(name)
    return [
        {"parameters": names, "values": {key: [states[name][key] for name in names] for key in keys}}
        for keys, names in together.items()
    ]


def _fine_digests(image: str, folder: Folder) -> bytes:
    found = FineDigests()
    for block in _blocks(folder, image):
        found.update(block)
    return found.finish()


def _sealed(record: Record, folder: Folder) -> bytes:
    """The text of the record, with the digests of the image that has been written."""
    name = digests_name(record.step, record.rank, record.world_size)
    fine = folder.read_all(name, -(-record.image_bytes // FINE_BYTES) * 16)
    blocks = tuple(digest(block) for block in _blocks(folder, record.image_name))
    return replace(record, blocks=blocks, fine=digest(fine)).text().encode()


def _blocks(folder: Folder, image: str) -> Iterator[memoryview]:
    """Each is overwritten by the next."""
    nbytes = folder.size(image)
    room = memoryview(bytearray(min(nbytes, BLOCK_BYTES)))
    for number in range(block_count(nbytes)):
        begin, end = block_range(number, nbytes)
        folder.read(image, begin, room[: end - begin])
        yield room[: end - begin]
