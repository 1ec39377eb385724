"""An open checkpoint of `torch.distributed.checkpoint`.

`.metadata` names tensors by flattened keys and says which keys of the state lead to each, so the state's tree is made
again and taken apart like any other (`state_tree.py`). A part of a tensor is read alone, where DCP's own reader takes
whole blobs; `verify` compares the checksums in the blobs, which DCP's never looks at. docs/formats/dcp.md is for users.
"""

import math
from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

from resilient.checkpoint.catalog.catalog import Catalog, File
from resilient.checkpoint.formats.dcp_blobs import Blobs, blob_key
from resilient.checkpoint.formats.dcp_metadata import (
    Blob,
    Metadata,
    StoredBytes,
    TensorEntry,
)
from resilient.checkpoint.formats.folder import Folder
from resilient.checkpoint.formats.source import Finding, Progress, Reference, Source
from resilient.checkpoint.formats.state_catalog import STEPS, Leaves, fill, loaded, read_leaf
from resilient.checkpoint.formats.state_tree import classify
from resilient.checkpoint.formats.torch_values import read_value
from resilient.errors import DamagedImage, RestoreError

__all__ = ["DcpSource"]

FORMAT = "dcp"
_SMALL_BYTES = 4 << 10  # of an object: likely a number that many entries have
_MOST_GAPS = 1 << 20


class DcpSource(Source):
    """See the module."""

    def __init__(self, reference: Reference, folder: Folder, metadata: Metadata) -> None:
        super().__init__(reference, folder, Catalog(format=FORMAT))
        self.metadata = metadata
        self.blobs = Blobs(folder)
        self._values: dict[bytes, Any] = {}
        check_files(folder, metadata)
        self._leaves = Leaves(
            is_tensor=_is_tensor, is_stored=_is_stored, pieces=self.blobs.pieces, load=self._load, same=_same
        )
        try:
            tree = tree_of(metadata, self._first)
            self._objects = fill(self.catalog, classify(tree, _is_tensor), self._leaves)
        except ValueError as error:
            raise DamagedImage(f"{folder.where('.metadata')}: {error}") from error
        self.catalog.files = [File(file.name, folder.size(file.name)) for file in self.blobs.files]

    def read(self, file: int, offset: int, into: memoryview) -> None:
        self.blobs.read(file, offset, into)

    def objects(self, rank: int = 0) -> dict[str, Any]:
        """What is no tensor of the catalog, by the state's keys."""
        made: dict[str, Any] = loaded(self._objects, self._leaves)
        return made

    def verify(self, progress: Progress) -> Iterator[Finding]:
        """Compares each blob with the checksum in it; safetensors files have none."""
        for entry in self.metadata.entries.values():
            if isinstance(entry, TensorEntry):
                self.blobs.pieces(entry)  # those of objects may not have been asked for
        yield from self.blobs.verify(self.catalog, progress)
        for entry in self.metadata.entries.values():
            if isinstance(entry, StoredBytes):
                yield from self._verify_object(entry)
                progress(entry.blob.nbytes)

    def _verify_object(self, entry: StoredBytes) -> Iterator[Finding]:
        try:
            self._load(entry)
        except (OSError, RestoreError) as error:
            yield Finding(entry.blob.name, (entry.key,), str(error))

    def _first(self, entry: TensorEntry | StoredBytes, path: tuple[Any, ...]) -> Any:
        """What stands in the tree for an entry: hyperparameters and steps themselves, which the catalog has."""
        wanted = _is_hyperparameter(path) or (len(path) == 1 and path[0] in STEPS)
        if not wanted or (isinstance(entry, TensorEntry) and math.prod(entry.shape) != 1):
            return entry
        value = self._load(entry)
        return value.item() if isinstance(entry, TensorEntry) else value

    def _load(self, entry: TensorEntry | StoredBytes) -> Any:
        if isinstance(entry, TensorEntry):
            return read_leaf(self, entry, self.blobs.pieces(entry))
        blob = entry.blob
        if blob.nbytes > _SMALL_BYTES:
            return self._value(blob)
        data = bytearray(blob.nbytes)
        self.folder.read(blob.name, blob.offset, memoryview(data))
        if bytes(data) not in self._values:
            self._values[bytes(data)] = self._value(blob)
        return deepcopy(self._values[bytes(data)])

    def _value(self, blob: Blob) -> Any:
        trust = self.reference.trust_pickle
        return read_value(self.folder, blob.name, begin=blob.offset, nbytes=blob.nbytes, trust=trust)


def tree_of(metadata: Metadata, leaf: Callable[[Any, tuple[Any, ...]], Any]) -> Any:
    """The tree of the state that was saved: `leaf(entry, path)` for each entry. Keys of dicts are text; gaps are None.

    Raises ValueError for paths that contradict one another.
    """
    tree: dict[Any, Any] = {}
    for key, entry in metadata.entries.items():
        path = metadata.paths.get(key, (key,))
        held = tree
        for one in path[:-1]:
            held = held.setdefault(one, {})
            if type(held) is not dict:
                raise ValueError(f"the path {path} of {key!r} leads through another entry")
        if path[-1] in held:
            raise ValueError(f"two entries have the path {path}")
        held[path[-1]] = leaf(entry, path)
    return _lists(tree)


def _lists(value: Any) -> Any:
    """Dicts by number as the lists that they were."""
    if type(value) is not dict:
        return value
    made = {key: _lists(one) for key, one in value.items()}
    if not made or any(type(key) is not int for key in made):
        return made
    if not 0 <= min(made) <= max(made) < _MOST_GAPS + len(made):
        raise ValueError(f"a list with an element number {max(made)} and no others near it")
    return [made.get(number) for number in range(max(made) + 1)]


def check_files(folder: Folder, metadata: Metadata) -> None:
    """Raises DamagedImage for a file that is not there, or ends before a blob does."""
    sizes: dict[str, int] = {}
    for key, blob in _all_blobs(metadata):
        if blob.name not in sizes:
            if not folder.has(blob.name):
                raise DamagedImage(f"{folder.where(blob.name)} is not there; {key!r} should lie in it")
            sizes[blob.name] = folder.size(blob.name)
        if blob.offset + blob.nbytes > sizes[blob.name]:
            raise DamagedImage(
                f"{folder.where(blob.name)} has {sizes[blob.name]} bytes; {key!r} should lie in it at {blob.offset}, "
                f"{blob.nbytes} bytes: the file was cut short, or is of another checkpoint"
            )


def _all_blobs(metadata: Metadata) -> Iterator[tuple[str, Blob]]:
    for key, entry in metadata.entries.items():
        if isinstance(entry, StoredBytes):
            yield key, entry.blob
            continue
        for chunk in entry.chunks:
            yield key, chunk.blob


def _is_tensor(value: Any) -> bool:
    return isinstance(value, TensorEntry)


def _is_stored(value: Any) -> bool:
    return isinstance(value, (TensorEntry, StoredBytes))


def _same(entry: TensorEntry) -> Any:
    """Equal for tensors of one shape that lie in the same blobs, as tied ones do that we wrote."""
    return (entry.shape, *(blob_key(entry, chunk) for chunk in entry.chunks)) if entry.chunks else None


def _is_hyperparameter(path: tuple[Any, ...]) -> bool:
    return any(key == "param_groups" or str(key).startswith("param_groups.") for key in path)
