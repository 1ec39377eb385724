"""Tensors that are cut in any way, their bytes in memory, and a source over them that counts what is read."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise, product
from typing import Any

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from resilient.checkpoint.catalog.catalog import Catalog, File, Tensor
from resilient.checkpoint.catalog.meet import Box
from resilient.checkpoint.catalog.table import PieceTable, StoredPiece, row_major
from resilient.checkpoint.formats.folder import Folder
from resilient.checkpoint.formats.source import Reference, Source
from resilient.checkpoint.pieces import Piece
from resilient.errors import DamagedImage

Array = NDArray[np.uint32]
ITEMSIZE = 4
steady = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # on a machine that is busy, too


class BytesSource(Source):
    """Files in memory. `reads`: (file, offset, bytes) of each read."""

    def __init__(self, catalog: Catalog, files: Sequence[bytes]) -> None:
        super().__init__(Reference(url="nowhere"), Folder("nowhere"), catalog)
        self.contents = files
        self.reads: list[tuple[int, int, int]] = []

    def read(self, file: int, offset: int, into: memoryview) -> None:
        data = self.contents[file][offset : offset + into.nbytes] if offset >= 0 else b""
        if len(data) < into.nbytes:
            raise DamagedImage(f"file {file} ends before {offset + into.nbytes}")
        self.reads.append((file, offset, into.nbytes))
        into[:] = data

    def objects(self, rank: int = 0) -> dict[str, Any]:
        return {}

    @property
    def nbytes_read(self) -> int:
        return sum(nbytes for _, _, nbytes in self.reads)


def values(shape: Sequence[int]) -> Array:
    """Elements that are all different."""
    return np.arange(1, math.prod(shape) + 1, dtype=np.uint32).reshape(tuple(shape))


def sliced(array: Array, box: Box) -> Array:
    offsets, sizes = box
    found: Array = array[tuple(slice(at, at + size) for at, size in zip(offsets, sizes, strict=True))]
    return found


@dataclass
class Pool:
    """Files that are being filled. Bytes that nobody wants lie before and behind what is put into one."""

    files: list[bytes] = field(default_factory=list)

    def put(self, array: Array, before: int = 0) -> tuple[int, int]:
        """A new file with an array, row-major. Returns its number and the offset of the array."""
        self.files.append(b"\xee" * before + np.ascontiguousarray(array).tobytes() + b"\xdd" * (before % 3))
        return len(self.files) - 1, before

    def source(self, tensor: Tensor) -> BytesSource:
        catalog = Catalog(format="test", files=[File(f"{n}.bin", len(data)) for n, data in enumerate(self.files)])
        catalog.add(tensor)
        return BytesSource(catalog, self.files)


def shapes(most_dims: int = 4, most: int = 7) -> st.SearchStrategy[tuple[int, ...]]:
    return st.lists(st.integers(1, most), max_size=most_dims).map(tuple)


@st.composite
def boxes(draw: st.DrawFn, shape: tuple[int, ...]) -> Box:
    """A box of a tensor; possibly an empty one."""
    low = tuple(draw(st.integers(0, size)) for size in shape)
    return low, tuple(draw(st.integers(0, size - at)) for size, at in zip(shape, low, strict=True))


@st.composite
def partitions(draw: st.DrawFn, shape: tuple[int, ...]) -> list[Box]:
    """A tensor as a grid of boxes, by cuts along each dimension."""
    spans = []
    for size in shape:
        cuts = sorted({0, size, *draw(st.lists(st.integers(0, size), max_size=2))})
        spans.append(list(pairwise(cuts)))
    return [(tuple(a for a, _ in one), tuple(b - a for a, b in one)) for one in product(*spans)]


@st.composite
def stored(draw: st.DrawFn, array: Array, pool: Pool) -> list[StoredPiece]:
    """An array, cut and put into files: boxes, transposed boxes, and flat ranges of boxes, in any order."""
    found: list[StoredPiece] = []
    for offsets, sizes in draw(partitions(array.shape)):
        box, whole = sliced(array, (offsets, sizes)), Piece.box(array.shape, offsets, sizes)
        before = draw(st.integers(0, 9))
        if draw(st.booleans()) and len(sizes) > 1:
            strides = tuple(reversed(row_major(tuple(reversed(sizes)))))
            file, offset = pool.put(box.T, before)
            found.append(StoredPiece(piece=whole, file=file, offset=offset, strides=strides))
            continue
        cuts = sorted({0, whole.stop, *draw(st.lists(st.integers(0, whole.stop), max_size=2))})
        for start, stop in pairwise(cuts):
            file, offset = pool.put(box.reshape(-1)[start:stop], before)
            found.append(StoredPiece(piece=whole.part(start, stop), file=file, offset=offset))
    return draw(st.permutations(found))


def tensor_of(shape: tuple[int, ...], pieces: Sequence[StoredPiece]) -> Tensor:
    return Tensor(name="model.x", kind="parameter", dtype="uint32", shape=shape, pieces=PieceTable.of(pieces))


def at(*path: Any, value: Any) -> Callable[[dict[str, Any]], None]:
    """A change of one place in a JSON document."""

    def change(raw: dict[str, Any]) -> None:
        place: Any = raw
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value

    return change
