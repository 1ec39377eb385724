"""The bytes of DCP's blobs: each is a whole file of `torch.save`, or lies in a safetensors file; a part of a tensor.

Where in a blob the elements are stands in the blob. To look into all of them would take a read of each before anything
is known; so a catalog has them at addresses of our own, in which every blob is its elements alone, row-major, one
after the other; and where they are is looked up when a blob is first read.
"""

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from resilient.checkpoint.catalog.catalog import ITEMSIZES, Catalog, Tensor
from resilient.checkpoint.catalog.table import FILE, OFFSET, PieceTable, StoredPiece, row_major
from resilient.checkpoint.formats.dcp_metadata import Blob, Chunk, TensorEntry
from resilient.checkpoint.formats.fetch import fetch
from resilient.checkpoint.formats.folder import Folder
from resilient.checkpoint.formats.hf_header import MOST_HEADER_BYTES, header_bytes, parse_header, strict_json
from resilient.checkpoint.formats.source import Finding, Progress
from resilient.checkpoint.formats.stored import StoredTensor
from resilient.checkpoint.formats.torch_source import checked
from resilient.checkpoint.formats.torch_values import OneFile
from resilient.checkpoint.formats.torch_zip import Member, open_archive
from resilient.checkpoint.pieces import Piece
from resilient.errors import DamagedImage, RestoreError

_SAVED = "DCP_SHARDING_INFO"  # in the metadata of the safetensors files: of each tensor where its part begins
_ARCHIVE = b"PK\3\4"


@dataclass(frozen=True, slots=True, eq=False)
class Held:
    """What a blob should hold: a part of a tensor. `begin`: its address."""

    blob: Blob
    begin: int
    key: str
    dtype: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


@dataclass(slots=True)
class BlobFile:
    """A file of the checkpoint: its blobs, by address."""

    name: str
    number: int
    held: list[Held] = field(default_factory=list)
    begins: list[int] = field(default_factory=list)
    end: int = 0


class Blobs:
    """The blobs of the tensors whose pieces were asked for. `files` are numbered in their order."""

    def __init__(self, folder: Folder) -> None:
        self.folder = folder
        self.files: list[BlobFile] = []
        self._numbers: dict[str, int] = {}
        self._known: dict[Any, int] = {}
        self._located: dict[Held, StoredTensor] = {}
        self._row_major: tuple[Held, bytes] | None = None

    def pieces(self, entry: TensorEntry) -> PieceTable:
        """The pieces of a tensor, at their addresses."""
        rows = [
            (*self._address(entry, chunk), 0, chunk.numel, *chunk.offsets, *chunk.sizes, *row_major(chunk.sizes))
            for chunk in entry.chunks
        ]
        return PieceTable(len(entry.shape), np.array(rows, dtype=np.int64))

    def read(self, number: int, address: int, into: memoryview) -> None:
        """Fill `into` from one blob of a file. Raises DamagedImage for a blob that is not what the metadata say."""
        file = self.files[number]
        held = file.held[bisect_right(file.begins, address) - 1]
        stored = self.located(held)
        skip = address - held.begin
        if stored.is_contiguous:
            self.folder.read(file.name, stored.offset + skip, into)
            return
        if self._row_major is None or self._row_major[0] is not held:  # a transposed view was saved: once, as a whole
            self._row_major = held, self._in_order(stored, file.name)
        into.cast("B")[:] = self._row_major[1][skip : skip + into.nbytes]

    def located(self, held: Held) -> StoredTensor:
        """Where the elements of a blob are in its file."""
        found = self._located.get(held)
        if found is None:
            found = self._locate(held)
            if (found.dtype, found.shape) != (held.dtype, held.sizes):
                raise DamagedImage(
                    f"{self._where(held)} should hold {held.dtype}{held.sizes} of tensor {held.key!r}; it holds "
                    f"{found.dtype}{found.shape}"
                )
            self._located[held] = found
        return found

    def problem(self, held: Held, progress: Progress) -> str | None:
        """What is wrong with a blob, all of which is read. Of a safetensors file, only that it cannot be read."""
        try:
            stored, blob = self.located(held), held.blob
            member = Member(stored.offset, stored.nbytes, 0)
            if _is_archive(self.folder, blob):
                archive = open_archive(self.folder, blob.name, begin=blob.offset, nbytes=blob.nbytes)
                member = archive.member(f"data/{stored.storage}")
        except (OSError, RestoreError) as error:
            return f"cannot be read: {error}"
        return checked(self.folder, blob.name, member, progress)

    def verify(self, catalog: Catalog, progress: Progress) -> Iterator[Finding]:
        """What is wrong with the blobs of a catalog's tensors, by the checksums in them."""
        names: dict[tuple[int, int], list[str]] = {}
        for tensor in catalog.tensors.values():
            for row in tensor.pieces.rows.tolist():
                names.setdefault((row[FILE], row[OFFSET]), []).append(tensor.name)
        for file in self.files:
            for held in file.held:
                problem = self.problem(held, progress)
                if problem is not None:
                    tensors = tuple(names.get((file.number, held.begin), [held.key]))
                    yield Finding(file.name, tensors, f"the part at {list(held.offsets)}: {problem}")

    def _address(self, entry: TensorEntry, chunk: Chunk) -> tuple[int, int]:
        """File number and address; the same for two tensors that share a blob."""
        number = self._numbers.setdefault(chunk.blob.name, len(self.files))
        if number == len(self.files):
            self.files.append(BlobFile(chunk.blob.name, number))
        same, file = blob_key(entry, chunk), self.files[number]
        if same not in self._known:
            self._known[same] = file.end
            file.held.append(Held(chunk.blob, file.end, entry.key, entry.dtype, chunk.offsets, chunk.sizes))
            file.begins.append(file.end)
            file.end += chunk.numel * ITEMSIZES[entry.dtype]
        return number, self._known[same]

    def _locate(self, held: Held) -> StoredTensor:
        blob = held.blob
        if not _is_archive(self.folder, blob):
            return self._in_safetensors(held)
        found = open_archive(self.folder, blob.name, begin=blob.offset, nbytes=blob.nbytes).tree()
        if type(found) is not StoredTensor:
            raise DamagedImage(
                f"{self._where(held)} should hold a part of tensor {held.key!r}; it holds something else"
            )
        return found

    def _in_safetensors(self, held: Held) -> StoredTensor:
        """DCP writes one such file for many tensors; all their entries have the place where it begins."""
        name, begin = held.blob.name, held.blob.offset
        where, size = self._where(held), self.folder.size(name) - begin
        head = bytearray(8)
        self.folder.read(name, begin, memoryview(head))
        text = bytearray(min(MOST_HEADER_BYTES, header_bytes(bytes(head), size, where)))
        self.folder.read(name, begin + 8, memoryview(text))
        header = parse_header(bytes(text), size, where)
        saved = strict_json(header.metadata.get(_SAVED, "{}").encode(), f"the metadata of {where}").get(held.key, {})
        for entry in header.entries:
            if entry.name != held.key:
                continue
            if list(saved.get("saved_offsets", held.offsets)) != list(held.offsets):
                raise DamagedImage(
                    f"{where} has tensor {held.key!r} at {saved['saved_offsets']}, not {list(held.offsets)}: of the "
                    "parts of a tensor that a rank holds, DCP's safetensors writer keeps the last alone"
                )
            return StoredTensor(entry.dtype, entry.shape, row_major(entry.shape), begin + entry.offset, entry.name)
        raise DamagedImage(f"{where} has no tensor {held.key!r}")

    def _in_order(self, stored: StoredTensor, name: str) -> bytes:
        """The elements of a tensor that is stored with other strides."""
        piece = StoredPiece(piece=Piece.whole(stored.shape), file=0, offset=stored.offset, strides=stored.strides)
        pieces = PieceTable.of([piece])
        tensor = Tensor(name="", kind="tensor", dtype=stored.dtype, shape=stored.shape, pieces=pieces)
        data = bytearray(stored.nbytes)
        fetch(OneFile(self.folder, name), tensor, memoryview(data))
        return bytes(data)

    def _where(self, held: Held) -> str:
        return f"{self.folder.where(held.blob.name)} at {held.blob.offset}"


def blob_key(entry: TensorEntry, chunk: Chunk) -> Any:
    """Equal for chunks that are the same bytes. Those in a safetensors file all name the place where it begins."""
    blob = chunk.blob
    if blob.nbytes > chunk.numel * ITEMSIZES[entry.dtype]:  # an archive is more than the elements in it
        return blob.name, blob.offset, chunk.sizes, entry.dtype
    return blob.name, blob.offset, chunk.sizes, entry.dtype, entry.key, chunk.offsets


def _is_archive(folder: Folder, blob: Blob) -> bool:
    start = bytearray(min(4, max(0, folder.size(blob.name) - blob.offset)))
    folder.read(blob.name, blob.offset, memoryview(start))
    return bytes(start) == _ARCHIVE
