"""Opened images: one rank's bytes and what they mean. What several of them say together is for `load.py`."""

import json
from dataclasses import dataclass
from typing import Any

import torch

from resilient.checkpoint.digest import BLOCK_BYTES
from resilient.checkpoint.dtypes import torch_dtype
from resilient.checkpoint.image import OBJECTS_KEY, data_start_of, parse_header
from resilient.checkpoint.objects import decode
from resilient.checkpoint.pieces import Piece
from resilient.checkpoint.restore.source import Source
from resilient.errors import DamagedImage


@dataclass(slots=True, kw_only=True, eq=False)
class Stored:
    """One piece in an image: `offset` is where its bytes begin in the image, header included."""

    key: str
    kind: str
    dtype: torch.dtype
    piece: Piece
    image_rank: int
    offset: int
    nbytes: int
    own: bool
    host: bool
    parameter: str = ""
    name: str = ""
    mesh: bool = False


class Image:
    """One rank's image: its record, where its bytes come from, and its objects, whose tensors are copies.

    Reads and verifies the header and the objects. Raises DamagedImage, NewerFormat, and what the source raises.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        self.record = record = source.record
        where = f"{record.image_name} (step {record.step}, rank {record.rank})"
        self._where = where
        head = source.span(0, min(BLOCK_BYTES, record.image_bytes))
        header_bytes = data_start_of(head)
        if len(head) < header_bytes <= record.image_bytes:
            head = source.span(0, header_bytes)
        self._entries, self.data_start = parse_header(head, record.image_bytes, where)
        self.objects = self._read_objects()
        self.raw_pieces = record.pieces()  # not to be changed

    def pieces(self) -> list[Stored]:
        return stored_pieces(self.raw_pieces, self.record.rank, self.data_start)

    def groups(self) -> dict[str, list[list[str]]]:
        """For each optimizer, the names of the parameters in each of its groups."""
        return {raw["optimizer"]: raw["groups"] for raw in self.raw_pieces if "optimizer" in raw}

    def _read_objects(self) -> Any:
        stored = {key: entry for key, entry in self._entries.items() if key.split("/")[0] == OBJECTS_KEY}
        if OBJECTS_KEY not in stored:
            raise DamagedImage(f"{self._where} has no entry {OBJECTS_KEY!r}")
        begin = self.data_start + min(entry.offset for entry in stored.values())
        tail = self.source.span(begin, self.data_start + max(entry.offset + entry.nbytes for entry in stored.values()))

        def bytes_of(key: str) -> bytes:
            start = self.data_start + stored[key].offset - begin
            return bytes(tail[start : start + stored[key].nbytes])

        raw = json.loads(bytes_of(OBJECTS_KEY))
        tensors = {
            key: _tensor(bytes_of(f"{OBJECTS_KEY}/{key}"), torch_dtype(dtype), shape)
            for key, (dtype, shape) in raw["tensors"].items()
        }
        return decode(raw["value"], tensors, self._where)


def _tensor(data: bytes, dtype: torch.dtype, shape: list[int]) -> torch.Tensor:
    if not data:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).view(dtype).view(shape)


def stored_pieces(raw_pieces: list[dict[str, Any]], rank: int, data_start: int) -> list[Stored]:
    """The pieces that a record of `rank` lists, at their places in its image, whose data begins at `data_start`."""
    return [
        Stored(
            key=raw["key"],
            kind=raw["kind"],
            dtype=torch_dtype(raw["dtype"]),
            piece=Piece(
                shape=tuple(raw["shape"]),
                offsets=tuple(raw["offsets"]),
                sizes=tuple(raw["sizes"]),
                start=raw["start"],
                stop=raw["stop"],
            ),
            image_rank=rank,
            offset=data_start + raw["offset"],
            nbytes=raw["nbytes"],
            own=raw["own"],
            host=raw["host"],
            parameter=raw.get("parameter", ""),
            name=raw.get("name", ""),
            mesh=raw.get("mesh", False),
        )
        for raw in raw_pieces
        if "nbytes" in raw
    ]
