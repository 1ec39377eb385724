"""Safetensors as Hugging Face lays it out: one file, shards with an index, or plain shards. A source; `hf_sink` writes.

Tensors are called `model.<FQN>`. What the format cannot say, files that we wrote have in their metadata (`Extra`):
tied weights, which are buffers, dtypes that are stored as others, the step; and `optimizer.safetensors` beside them has
the optimizer's state. Files of others lack it: all their tensors are parameters, tied ones are there once.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from resilient.checkpoint.catalog.catalog import Catalog, File, Tensor
from resilient.checkpoint.catalog.table import PieceTable, StoredPiece
from resilient.checkpoint.formats.folder import Folder
from resilient.checkpoint.formats.hf_extra import OPTIMIZER_FILE, Extra, parse_extra
from resilient.checkpoint.formats.hf_header import Entry, Header, header_bytes, parse_header, strict_json
from resilient.checkpoint.formats.hf_sink import plan
from resilient.checkpoint.formats.source import Reference, Source
from resilient.checkpoint.pieces import Piece
from resilient.errors import DamagedImage, NotACheckpoint

__all__ = ["open_source", "plan", "read_header", "recognise"]

FORMAT = "safetensors"
_SUFFIX = ".safetensors"
_INDEX = ".safetensors.index.json"
_NUMBERED = re.compile(r".*-(\d{5})-of-(\d{5})\.safetensors")
_MOST_INDEX_BYTES = 100_000_000


def recognise(folder: Folder) -> bool:
    """Whether there is a .safetensors file or an index of some, not in a folder below."""
    return any(name.endswith((_SUFFIX, _INDEX)) and "/" not in name for name in folder.names)


def open_source(folder: Folder, reference: Reference) -> Source:
    """Raises NotACheckpoint, DamagedImage, NewerFormat, FileNotFoundError, LevelFailed."""
    names, index, notes = _files(folder)
    headers = {name: read_header(folder, name) for name in names}
    extras = {name: parse_extra(header.metadata, folder.where(name)) for name, header in headers.items()}
    catalog = Catalog(format=FORMAT, notes=notes)
    for number, (name, header) in enumerate(headers.items()):
        catalog.files.append(File(name, folder.size(name)))
        entries = [entry for entry in header.entries if index.get(entry.name, name) == name]
        _add_file(catalog, number, entries, extras[name], folder.where(name))
    _check_index(folder, index, headers)
    for extra in extras.values():
        _add_aliases(catalog, extra)
    return SafetensorsSource(reference, folder, catalog)


class SafetensorsSource(Source):
    """See the module."""

    def objects(self, rank: int = 0) -> dict[str, Any]:
        """Nothing: the format has tensors alone."""
        return {}


def read_header(folder: Folder, name: str) -> Header:
    """The header of one file. Raises DamagedImage, FileNotFoundError, LevelFailed."""
    size, where = folder.size(name), folder.where(name)
    head = bytearray(8)
    if size < 8:
        raise DamagedImage(f"{where} is no safetensors file: it has {size} bytes")
    folder.read(name, 0, memoryview(head))
    text = bytearray(header_bytes(bytes(head), size, where))
    folder.read(name, 8, memoryview(text))
    return parse_header(bytes(text), size, where)


def _files(folder: Folder) -> tuple[list[str], dict[str, str], list[str]]:
    """The files of the model, its index (which file has which tensor; empty without one), and what to note."""
    if folder.only_file is not None:
        return [folder.only_file], {}, []
    top = [name for name in folder.names if "/" not in name]
    optimizer = [name for name in top if name == OPTIMIZER_FILE]
    indices = [name for name in top if name.endswith(_INDEX)]
    plain = [name for name in top if name.endswith(_SUFFIX) and name != OPTIMIZER_FILE]
    if "model.safetensors" in plain:  # what transformers takes first
        notes = [f"beside model.safetensors there is {name}, which was not read" for name in indices]
        return ["model.safetensors", *optimizer], {}, notes
    if len(indices) == 1 or "model" + _INDEX in indices:
        name = indices[0] if len(indices) == 1 else "model" + _INDEX
        index = _read_index(folder, name)
        return [*sorted(set(index.values())), *optimizer], index, []
    if indices:
        raise NotACheckpoint(
            f"{folder.url} has the indices of several models ({', '.join(indices)}): give each a folder"
        )
    shards = [name for name in plain if name.startswith("model")] or plain
    notes = [f"{name} was not read: it does not begin with `model`" for name in plain if name not in shards]
    if not shards and not optimizer:
        raise NotACheckpoint(f"{folder.url} has no .safetensors file")
    _check_numbered(folder, shards)
    return [*shards, *optimizer], {}, notes


def _check_numbered(folder: Folder, shards: Iterable[str]) -> None:
    """Of shards that say how many there are, all are there."""
    for shard in shards:
        match = _NUMBERED.fullmatch(shard)
        for number in range(1, int(match[2]) + 1) if match else ():
            name = f"{shard[: match.start(1)]}{number:05d}{shard[match.end(1) :]}" if match else ""
            if not folder.has(name):
                raise DamagedImage(f"{folder.where(name)} is not there; {shard} says that it should be")


def _read_index(folder: Folder, name: str) -> dict[str, str]:
    where = folder.where(name)
    index = strict_json(folder.read_all(name, _MOST_INDEX_BYTES), where).get("weight_map")
    if not isinstance(index, dict) or not index:
        raise DamagedImage(f"{where} has no weight_map")
    for tensor, file in index.items():
        if not isinstance(file, str) or "/" in file or not file.endswith(_SUFFIX):
            raise DamagedImage(f"{where} says that tensor {tensor!r} is in {file!r}, which is no file beside it")
        if not folder.has(file):
            raise DamagedImage(f"{where} says that tensor {tensor!r} is in {file}, which is not there")
    return index


def _check_index(folder: Folder, index: Mapping[str, str], headers: Mapping[str, Header]) -> None:
    have = {name: {entry.name for entry in header.entries} for name, header in headers.items()}
    for tensor, file in index.items():
        if tensor not in have[file]:
            raise DamagedImage(f"{folder.where(file)} has no tensor {tensor!r}; the index says that it is there")


def _add_file(catalog: Catalog, number: int, entries: Iterable[Entry], extra: Extra, where: str) -> None:
    if extra.step is not None:
        catalog.step = extra.step
    catalog.groups |= extra.groups
    for entry in entries:
        tensor = _tensor(number, entry, extra, where)
        if tensor.name in catalog.tensors:
            raise DamagedImage(
                f"tensor {entry.name!r} of {where} is in another file, too, and no index says which counts"
            )
        catalog.add(tensor)


def _tensor(number: int, entry: Entry, extra: Extra, where: str) -> Tensor:
    dtype, shape = extra.true_dtype(entry, where)
    pieces = PieceTable.of([StoredPiece(piece=Piece.whole(shape), file=number, offset=entry.offset)])
    state = extra.states.get(entry.name)
    if state is not None:
        return Tensor(
            name=entry.name,
            kind="optimizer",
            dtype=dtype,
            shape=shape,
            pieces=pieces,
            item=state.item,
            parameter=state.parameter,
            state=state.state,
        )
    return Tensor(
        name=f"{extra.item}.{entry.name}",
        kind="buffer" if entry.name in extra.buffers else "parameter",
        dtype=dtype,
        shape=shape,
        pieces=pieces,
        item=extra.item,
    )


def _add_aliases(catalog: Catalog, extra: Extra) -> None:
    """Tied weights. A name that is there as a tensor is none: somebody has changed the files since."""
    for second, first in extra.aliases.items():
        name, of = f"{extra.item}.{second}", f"{extra.item}.{first}"
        if of in catalog.tensors and name not in catalog.tensors:
            catalog.aliases[name] = of
