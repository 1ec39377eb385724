"""The `.metadata` of torch's DCP: which tensors and objects there are, and which blob of which file has each part.

It is a pickle of a few classes of `torch.distributed.checkpoint`, read without them: they become records of ours
(`torch_pickle.py`). Every number in it is checked. Versions: what torch 2.3 to 2.13 write, also one file for each rank
(`__0.metadata`, ...), as they write it without collectives.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from resilient.checkpoint.catalog.catalog import ITEMSIZES
from resilient.checkpoint.formats.folder import Folder
from resilient.checkpoint.formats.pickle_names import Call
from resilient.checkpoint.formats.torch_pickle import load_pickle
from resilient.errors import DamagedImage, NotACheckpoint

__all__ = ["Blob", "Chunk", "Metadata", "StoredBytes", "TensorEntry", "merged", "read_metadata"]

NAME = ".metadata"
_MOST = 1 << 62
_MOST_BYTES = 4 << 30
_CHECKPOINT = "torch.distributed.checkpoint"


@dataclass(frozen=True, slots=True)
class Blob:
    """Where an entry lies: `nbytes` of the file `name` from `offset` on. What its bytes are: see `dcp_blobs.py`."""

    name: str
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Chunk:
    """A box of a tensor, in a blob."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    blob: Blob

    @property
    def numel(self) -> int:
        return math.prod(self.sizes)


@dataclass(frozen=True, slots=True, eq=False)
class TensorEntry:
    """A tensor of the checkpoint; `key` is its flattened name."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEMSIZES[self.dtype]


@dataclass(frozen=True, slots=True, eq=False)
class StoredBytes:
    """An object of the checkpoint: a file of `torch.save` in a blob."""

    key: str
    blob: Blob


@dataclass(slots=True)
class Metadata:
    """All entries by flattened name, and for each the keys that lead to it in the state (`paths`)."""

    entries: dict[str, TensorEntry | StoredBytes] = field(default_factory=dict)
    paths: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    other: Any = None


def read_metadata(
    folder: Folder, name: str = NAME, *, extra: Mapping[str, Any] | None = None, trust: bool = False
) -> Metadata:
    """One file of metadata. `extra`, `trust`: what else its pickle may ask for (Megatron's classes), see `load_pickle`.

    Raises FileNotFoundError, LevelFailed, NotACheckpoint for a pickle of something else, DamagedImage.
    """
    where = folder.where(name)
    raw = load_pickle(folder.read_all(name, _MOST_BYTES), where, extra=_names() | dict(extra or {}), trust=trust)
    if not _is(raw, "Metadata"):
        raise NotACheckpoint(f"{where} is a pickle, but not the metadata of a checkpoint of torch.distributed")
    try:
        return _Reading(where, vars(raw)).metadata()
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DamagedImage(f"{where} cannot be read ({type(error).__name__}: {error})") from error


def merged(parts: Iterable[Metadata]) -> Metadata:
    """The metadata of ranks that each wrote their own; of what several have, the first counts."""
    whole = Metadata()
    for part in parts:
        whole.paths = part.paths | whole.paths
        for key, entry in part.entries.items():
            held = whole.entries.setdefault(key, entry)
            if held is entry or not isinstance(held, TensorEntry) or not isinstance(entry, TensorEntry):
                continue
            if (held.dtype, held.shape) != (entry.dtype, entry.shape):
                raise DamagedImage(f"ranks do not agree what tensor {key!r} is: {held.shape} or {entry.shape}")
            known = {chunk.offsets for chunk in held.chunks}
            more = tuple(chunk for chunk in entry.chunks if chunk.offsets not in known)
            whole.entries[key] = TensorEntry(key, held.dtype, held.shape, held.chunks + more)
    return whole


class _Record:
    """Stands for one of DCP's classes. A class is made for each reading, since a pickle can set its attributes."""

    kind = ""

    def __init__(self, *args: Any) -> None:
        pass


def _names() -> dict[str, Any]:
    def of(kind: str, **more: Any) -> Any:
        return type("Record", (_Record,), {"kind": kind, **more})

    def setstate(self: Any, state: Any) -> None:
        self.dtype = state[0]

    properties = of("TensorProperties", __setstate__=setstate)
    encoding = Call("MEM_FORMAT_ENCODING", lambda value: value)
    kinds = ("Metadata", "TensorStorageMetadata", "ChunkStorageMetadata", "BytesStorageMetadata", "MetadataIndex")
    sharded = "torch.distributed._shard.sharded_tensor.metadata"
    return {
        "torch.Size": tuple,  # there may be millions; what is in them is looked at here
        **{f"{_CHECKPOINT}.metadata.{kind}": of(kind) for kind in (*kinds, "StorageMeta")},
        f"{_CHECKPOINT}.filesystem._StorageInfo": of("_StorageInfo"),
        f"{_CHECKPOINT}.metadata.TensorProperties": properties,
        f"{_CHECKPOINT}.metadata._MEM_FORMAT_ENCODING": encoding,
        f"{sharded}.TensorProperties": properties,  # until torch 2.3
        f"{sharded}.MEM_FORMAT_ENCODING": encoding,
    }


def _is(value: Any, kind: str) -> bool:
    return isinstance(value, _Record) and value.kind == kind


class _Reading:
    """One pickle's records as entries; raises whatever records of other kinds than expected make Python raise."""

    def __init__(self, where: str, raw: Mapping[str, Any]) -> None:
        self.where = where
        self.raw = raw
        self.blobs: dict[tuple[str, Any], Blob] = {}
        self.files: set[str] = set()

    def metadata(self) -> Metadata:
        for index, info in dict.items(self.raw["storage_data"]):
            held = vars(index)
            self.blobs[held["fqn"], held.get("offset")] = self._blob(vars(info))
        made = Metadata(other=self.raw)
        for key, one in dict.items(self.raw["state_dict_metadata"]):
            made.entries[_text(key)] = (
                self._tensor(key, vars(one))
                if not _is(one, "BytesStorageMetadata")
                else (StoredBytes(key, self._find(key, None)))
            )
        paths = self.raw.get("planner_data")
        if isinstance(paths, dict):
            made.paths = {_text(key): _path(path) for key, path in dict.items(paths) if isinstance(path, tuple)}
        return made

    def _tensor(self, key: str, held: Mapping[str, Any]) -> TensorEntry:
        shape, dtype = _sizes(held["size"]), held["properties"].dtype
        if not isinstance(dtype, torch.dtype):
            raise TypeError(f"the dtype of {key!r} is {dtype!r}")
        name = str(dtype).removeprefix("torch.")
        if name not in ITEMSIZES:
            raise NotACheckpoint(f"{self.where}: tensor {key!r} is {name}, which is not read")
        boxes = [(_sizes(vars(one)["offsets"]), _sizes(vars(one)["sizes"])) for one in held["chunks"]]
        if any(len(offsets) != len(shape) or len(sizes) != len(shape) for offsets, sizes in boxes):
            raise ValueError(f"a chunk of {key!r} has other dimensions than the tensor")
        chunks = (Chunk(*box, self._find(key, box[0])) for box in boxes if math.prod(box[1]))
        return TensorEntry(key, name, shape, tuple(chunks))

    def _find(self, key: str, offsets: tuple[int, ...] | None) -> Blob:
        found = self.blobs.get((key, offsets))
        if found is None and offsets is not None and not any(offsets):
            found = self.blobs.get((key, None))
        if found is None:
            raise DamagedImage(f"{self.where} does not say where {key!r} is stored (its part at {offsets})")
        return found

    def _blob(self, held: Mapping[str, Any]) -> Blob:
        if held.get("transform_descriptors"):
            raise NotACheckpoint(
                f"{self.where}: the checkpoint was written through the extension {held['transform_descriptors'][0]!r} "
                "(compressed, say), which is not read; save it without `_extensions`"
            )
        name, offset, length = held["relative_path"], held["offset"], held["length"]
        if type(offset) is not int or type(length) is not int or offset < 0 or length < 0:
            raise ValueError(f"{length!r} bytes at {offset!r} of {name}")
        if name not in self.files:
            if _text(name).startswith("/") or "\0" in name or ".." in name.split("/"):
                raise DamagedImage(f"{self.where} names the file {name!r}, which is none within the checkpoint")
            self.files.add(name)
        return Blob(name, offset, length)


def _text(value: Any) -> str:
    if type(value) is not str:
        raise TypeError(f"{value!r} is no name")
    return value


def _sizes(value: Any) -> tuple[int, ...]:
    if type(value) is not tuple:
        raise TypeError(f"{value!r} is no size")
    for one in value:
        if type(one) is not int or not 0 <= one < _MOST:
            raise ValueError(f"{value} is no size")
    return value


def _path(value: tuple[Any, ...]) -> tuple[Any, ...]:
    if not 0 < len(value) <= 64 or any(type(key) not in (str, int) for key in value):
        raise ValueError(f"{value!r} is no path")
    return value
