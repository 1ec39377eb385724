"""A checkpoint of a format that only tests have: raw files in which tensors lie in random pieces, and its catalog.

`made_source` writes one and says how to open it (`open_made` is what opens it, also in another process). What sinks and
conversions make of it can be compared with the tensors that went in. Pieces are boxes, flat ranges of boxes and
transposed boxes, with other bytes between them.
"""

import itertools
import math
import random
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from resilient.checkpoint.catalog.catalog import Catalog, File, Kind, Tensor, parse_catalog
from resilient.checkpoint.catalog.meet import Box
from resilient.checkpoint.catalog.table import PieceTable, StoredPiece, row_major
from resilient.checkpoint.dtypes import dtype_name
from resilient.checkpoint.formats.folder import Folder
from resilient.checkpoint.formats.source import Reference, Source
from resilient.checkpoint.pieces import Piece

FORMAT = "made"


class MadeSource(Source):
    """`read_bytes` counts what was read of the files."""

    read_bytes = 0

    def read(self, file: int, offset: int, into: memoryview) -> None:
        super().read(file, offset, into)
        self.read_bytes += into.nbytes

    def objects(self, rank: int = 0) -> dict[str, Any]:
        path = Path(self.folder.url, "objects.pt")
        return dict(torch.load(path, weights_only=True)) if path.exists() else {}


def open_made(reference: Reference) -> MadeSource:
    """What `made_source` wrote, as a source. Any process may do it again."""
    folder = Folder(reference.url)
    catalog = parse_catalog(folder.read_all("catalog.json", 1 << 30), reference.url)
    return MadeSource(reference, folder, catalog)


def made_source(
    folder: Path,
    tensors: Mapping[str, torch.Tensor],
    *,
    seed: int = 0,
    files: int = 3,
    cuts: int = 2,
    buffers: Collection[str] = (),
    transient: Collection[str] = (),
    states: Mapping[str, Mapping[str, torch.Tensor]] | None = None,
    groups: Mapping[str, list[dict[str, Any]]] | None = None,
    aliases: Mapping[str, str] | None = None,
    objects: Mapping[str, Any] | None = None,
    step: int | None = 7,
) -> Reference:
    """Write a checkpoint below `folder`; `open_made` opens what is returned.

    `tensors`: by full name (`model.layers.0.weight`), parameters where they are not named in `buffers` or `transient`.
    `states`: of the optimizer, by full name of the parameter and key. `cuts`: at most so many cuts along a dimension,
    and of a box into flat ranges; 0: every tensor lies in one piece.
    """
    folder.mkdir(parents=True, exist_ok=True)
    writer = _Writer(random.Random(seed), files, cuts)
    catalog = Catalog(
        format=FORMAT, aliases=dict(aliases or {}), groups=dict(groups or {}), step=step, world_size=files
    )
    for name, value in tensors.items():
        kind: Kind = "buffer" if name in buffers else "transient" if name in transient else "parameter"
        catalog.add(_tensor(writer, name, kind, value, item=name.split(".")[0]))
    for parameter, values in (states or {}).items():
        for state, value in values.items():
            name = f"optimizer.state.{parameter}.{state}"
            catalog.add(_tensor(writer, name, "optimizer", value, item="optimizer", parameter=parameter, state=state))
    for number, data in enumerate(writer.files):
        (folder / f"{number}.raw").write_bytes(data)
        catalog.files.append(File(f"{number}.raw", len(data)))
    if objects:
        torch.save(dict(objects), folder / "objects.pt")
    (folder / "catalog.json").write_text(catalog.text())
    return Reference(url=str(folder), format=FORMAT)


def raw_bytes(tensor: torch.Tensor) -> bytes:
    """The bytes of a tensor of any dtype, row-major."""
    flat = tensor.detach().reshape(-1).clone(memory_format=torch.contiguous_format)
    return bytes(flat.view(torch.uint8).numpy()) if flat.numel() else b""


def _tensor(
    writer: "_Writer", name: str, kind: Kind, value: torch.Tensor, item: str, parameter: str = "", state: str = ""
) -> Tensor:
    return Tensor(
        name=name,
        kind=kind,
        dtype=dtype_name(value.dtype),
        shape=tuple(value.shape),
        pieces=PieceTable.of(writer.pieces(value.detach())),
        item=item,
        parameter=parameter,
        state=state,
    )


class _Writer:
    """Cuts tensors and lays the pieces into files, at random."""

    def __init__(self, random: random.Random, files: int, cuts: int) -> None:
        self._random, self._cuts = random, cuts
        self.files = [bytearray() for _ in range(files)]

    def pieces(self, value: torch.Tensor) -> list[StoredPiece]:
        shape = tuple(value.shape)
        found = [one for box in self._boxes(shape) for one in self._box(value, shape, box)]
        self._random.shuffle(found)
        return found

    def _boxes(self, shape: Sequence[int]) -> Iterator[Box]:
        edges = [list(itertools.pairwise(self._edges(size))) or [(0, 0)] for size in shape]
        for spans in itertools.product(*edges):
            yield tuple(begin for begin, _ in spans), tuple(end - begin for begin, end in spans)

    def _edges(self, size: int) -> list[int]:
        """0, size and some places between them."""
        count = self._random.randint(0, self._cuts)
        return sorted({0, size, *(self._random.randint(0, size) for _ in range(count))})

    def _box(self, value: torch.Tensor, shape: tuple[int, ...], box: Box) -> Iterator[StoredPiece]:
        offsets, sizes = box
        inside = value[tuple(slice(at, at + size) for at, size in zip(offsets, sizes, strict=True))]
        whole = Piece.box(shape, offsets, sizes)
        if self._cuts and len(shape) > 1 and self._random.random() < 0.3:
            flipped = inside.permute(*reversed(range(len(shape))))
            strides = tuple(reversed(row_major(tuple(flipped.shape))))
            yield self._put(whole, raw_bytes(flipped), strides)
            return
        data, itemsize = raw_bytes(inside), value.element_size()
        edges = self._edges(math.prod(sizes)) if self._random.random() < 0.5 else [0, math.prod(sizes)]
        for start, stop in itertools.pairwise(edges if edges[-1] else [0, 0]):
            yield self._put(whole.part(start, stop), data[start * itemsize : stop * itemsize])

    def _put(self, piece: Piece, data: bytes, strides: tuple[int, ...] | None = None) -> StoredPiece:
        number = self._random.randrange(len(self.files))
        file = self.files[number]
        file += self._random.randbytes(self._random.randrange(9))  # so that nothing depends on alignment
        offset = len(file)
        file += data
        return StoredPiece(piece=piece, file=number, offset=offset, strides=strides)
