"""A checkpoint of `torch.distributed.checkpoint`, planned from any catalog: `dcp.load` takes it into any world.

The state is flattened as DCP flattens it (since torch 2.4): dicts always, lists where there are dicts or tensors in
them. Optimizers are keyed by the names of parameters, as `get_optimizer_state_dict` has them. Tensors are cut into
chunks, since DCP's reader takes whole ones into memory, and files hold about `shard_bytes`, to be written in parallel.
"""

import io
import pickle
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Size, Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from resilient.checkpoint.catalog.catalog import ITEMSIZES
from resilient.checkpoint.dtypes import torch_dtype
from resilient.checkpoint.formats.fetch import boxes_of
from resilient.checkpoint.formats.output import Checksum, Output, Part, SinkOptions, TensorBytes
from resilient.checkpoint.formats.source import Source
from resilient.checkpoint.formats.state_items import tree_of
from resilient.checkpoint.formats.torch_write import torch_parts
from resilient.errors import UsageError

_CHUNK_BYTES = 64 << 20
_VERSION = "1.0.0"


def plan(source: Source, options: SinkOptions) -> list[Output]:
    """Files `__0_<n>.distcp` and, last, `.metadata`.

    Raises UsageError for one file as the target, and for objects that torch's safe reader refuses.
    """
    if options.into is not None:
        raise UsageError(f"a checkpoint of DCP is a folder of several files, not the one file {options.into!r}")
    writer = _Writer(options.shard_bytes)
    for path, leaf in flattened(tree_of(source, options, numbered=False), ()):
        writer.add(path, leaf)
    return writer.outputs()


def flattened(value: Any, path: tuple[Any, ...]) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """As `torch.distributed.checkpoint._traverse.traverse_state_dict`, which also forgets empty dicts."""
    if isinstance(value, dict):
        for key, one in value.items():
            yield from flattened(one, (*path, str(key)))
    elif isinstance(value, list) and not _is_terminal(value):
        for number, one in enumerate(value):
            yield from flattened(one, (*path, number))
    else:
        yield path, value


def _is_terminal(value: Any) -> bool:
    if isinstance(value, dict):
        return False
    if not isinstance(value, list):
        return True
    inner = [one for one in value if isinstance(one, (dict, list))]
    return all(map(_is_terminal, inner)) and not any(map(_is_tensor, value))


@dataclass(slots=True)
class _Writer:
    """Lays blobs out in files, one after the other, and notes where each is."""

    shard_bytes: int
    files: list[list[Part]] = field(default_factory=list)
    used: int = 0
    described: dict[str, Any] = field(default_factory=dict)
    paths: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    stored: dict[MetadataIndex, _StorageInfo] = field(default_factory=dict)
    known: dict[tuple[Part, ...], _StorageInfo] = field(default_factory=dict)

    def add(self, path: tuple[Any, ...], leaf: Any) -> None:
        key = ".".join(map(str, path))
        if key in self.described:
            raise UsageError(f"two entries would both be called {key!r} by DCP: {self.paths[key]} and {path}")
        self.paths[key] = path
        if _is_tensor(leaf):
            self._add_tensor(key, leaf)
        else:
            self.described[key] = BytesStorageMetadata()
            self.stored[MetadataIndex(key)] = self._put_once(leaf)

    def outputs(self) -> list[Output]:
        metadata = Metadata(
            state_dict_metadata=self.described,
            planner_data=self.paths,
            storage_data=self.stored,
            version=_VERSION,
        )
        out = io.BytesIO()
        pickle.dump(metadata, out, protocol=4)
        files = [Output(name=_name(number), parts=tuple(parts)) for number, parts in enumerate(self.files)]
        return [*files, Output(name=".metadata", parts=(out.getvalue(),), last=True)]

    def _add_tensor(self, key: str, leaf: Any) -> None:
        shape = tuple(leaf.sizes if isinstance(leaf, TensorBytes) else leaf.shape)
        dtype = torch_dtype(leaf.dtype) if isinstance(leaf, TensorBytes) else leaf.dtype
        chunks = []
        for number, (offsets, box) in enumerate(_boxes(leaf)):
            sizes = Size(box.sizes if isinstance(box, TensorBytes) else box.shape)
            chunks.append(ChunkStorageMetadata(offsets=Size(offsets), sizes=sizes))
            self.stored[MetadataIndex(key, offsets, number)] = self._put_once(box)
        properties = TensorProperties(dtype=dtype)
        self.described[key] = TensorStorageMetadata(properties=properties, size=Size(shape), chunks=chunks)

    def _put_once(self, leaf: Any) -> _StorageInfo:
        """Tied tensors are one blob, and so are equal values."""
        parts = torch_parts(leaf)
        if parts not in self.known:
            self.known[parts] = self._put(parts)
        return self.known[parts]

    def _put(self, parts: tuple[Part, ...]) -> _StorageInfo:
        nbytes = sum(len(part) if isinstance(part, bytes) else part.nbytes for part in parts)
        if not self.files or (self.used and self.used + nbytes > self.shard_bytes):
            self.files.append([])
            self.used = 0
        file, offset = self.files[-1], self.used
        begin = len(file)
        file += [Checksum(part.part + begin) if isinstance(part, Checksum) else part for part in parts]
        self.used += nbytes
        return _StorageInfo(_name(len(self.files) - 1), offset, nbytes)


def _boxes(leaf: Any) -> Iterator[tuple[tuple[int, ...], Any]]:
    """A tensor as chunks: where each begins, and its bytes."""
    if not isinstance(leaf, TensorBytes):
        yield (0,) * leaf.dim(), leaf
        return
    for offsets, sizes in boxes_of(leaf.sizes, ITEMSIZES[leaf.dtype], _CHUNK_BYTES):
        yield offsets, TensorBytes(leaf.name, offsets, sizes, leaf.dtype, leaf.rank)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, (TensorBytes, Tensor))


def _name(number: int) -> str:
    return f"__0_{number}.distcp"
