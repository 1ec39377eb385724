"""Opened images: one rank's verified bytes and what they mean.

An image is opened from memory (mapped from the agent) or read from a store into a buffer; both end as a read-only
view whose every block matched its digest. What is done with several of them is the business of `load.py`.
"""

import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from resilient.checkpoint.copying import cpu_threads
from resilient.checkpoint.digest import BLOCK_BYTES, block_count, block_range, damaged_blocks, digest
from resilient.checkpoint.dtypes import torch_dtype
from resilient.checkpoint.image import OBJECTS_KEY, parse_header
from resilient.checkpoint.objects import decode
from resilient.checkpoint.pieces import Piece
from resilient.checkpoint.record import Record
from resilient.errors import DamagedImage

_READ_BLOCKS = 4  # blocks of one read: 16 MiB
_READERS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
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
    """A verified image: its record, its bytes, its pieces and its objects. `view` must outlive it."""

    def __init__(self, record: Record, view: memoryview) -> None:
        self.record = record
        self.view = view
        where = f"{record.image_name} (step {record.step}, rank {record.rank})"
        self._where = where
        self._entries, self.data_start = parse_header(view, where)

    def groups(self) -> dict[str, list[list[str]]]:
        """For each optimizer, the names of the parameters in each of its groups."""
        return {raw["optimizer"]: raw["groups"] for raw in json.loads(self.record.pieces_text) if "optimizer" in raw}

    def objects(self) -> Any:
        """The objects that were saved beside the tensors. Their tensors are copies."""
        raw = json.loads(bytes(self._bytes_of(OBJECTS_KEY)))
        tensors = {
            key: self._tensor(f"{OBJECTS_KEY}/{key}", torch_dtype(dtype), shape)
            for key, (dtype, shape) in raw["tensors"].items()
        }
        return decode(raw["value"], tensors, self._where)

    def _bytes_of(self, key: str) -> memoryview:
        entry = self._entries.get(key)
        if entry is None:
            raise DamagedImage(f"{self._where} has no entry {key!r}")
        begin = self.data_start + entry.offset
        return self.view[begin : begin + entry.nbytes]

    def _tensor(self, key: str, dtype: torch.dtype, shape: list[int]) -> torch.Tensor:
        data = bytearray(self._bytes_of(key))
        if not data:
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(data, dtype=torch.uint8).view(dtype).view(shape)


def stored_pieces(record: Record, data_start: int) -> list[Stored]:
    """The pieces that a record describes, at their places in an image whose data begins at `data_start`."""
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
            image_rank=record.rank,
            offset=data_start + raw["offset"],
            nbytes=raw["nbytes"],
            own=raw["own"],
            host=raw["host"],
            parameter=raw.get("parameter", ""),
            name=raw.get("name", ""),
            mesh=raw.get("mesh", False),
        )
        for raw in json.loads(record.pieces_text)
        if "nbytes" in raw
    ]


def verify(view: memoryview, record: Record, level: str) -> None:
    """Compare every block of an image with its digest. Raises DamagedImage, naming what lies in the damaged blocks."""
    bad = damaged_blocks(view, record.blocks, cpu_threads())
    if bad:
        raise DamagedImage(damage_message(record, view, bad, level))


def read_verified(read: Callable[[int, memoryview], None], record: Record, into: memoryview, level: str) -> None:
    """Fill `into` with a whole image, several ranges at a time, checking every block as it arrives.

    `read(offset, part)` fills one range. Raises DamagedImage, or what `read` raises.
    """
    bad: list[int] = []
    lock = threading.Lock()

    def fetch(first: int) -> None:
        last = min(first + _READ_BLOCKS, block_count(record.image_bytes))
        begin, end = first * BLOCK_BYTES, block_range(last - 1, record.image_bytes)[1]
        read(begin, into[begin:end])
        for index in range(first, last):
            start, stop = block_range(index, record.image_bytes)
            if digest(into[start:stop]) != record.blocks[index]:
                with lock:
                    bad.append(index)

    with ThreadPoolExecutor(_READERS) as pool:
        for _ in pool.map(fetch, range(0, block_count(record.image_bytes), _READ_BLOCKS)):
            pass
    if bad:
        raise DamagedImage(damage_message(record, into, sorted(bad), level))


def damage_message(record: Record, view: memoryview, blocks: list[int], level: str) -> str:
    """What is damaged, by tensor: from the record, which has a digest of its own, and the length of the header."""
    spans = [block_range(index, record.image_bytes) for index in blocks]
    begins = 8 + int.from_bytes(view[:8], "little")
    names = [
        raw["key"]
        for raw in json.loads(record.pieces_text)
        if "nbytes" in raw and _meets(begins + raw["offset"], raw["nbytes"], spans)
    ]
    what = ", ".join(repr(name) for name in names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return (
        f"{len(blocks)} of {len(record.blocks)} blocks of {record.image_name} at level {level} are damaged "
        f"(step {record.step}, rank {record.rank}; tensors: {what or 'none, but the header or the objects'})"
    )


def _meets(begin: int, nbytes: int, spans: list[tuple[int, int]]) -> bool:
    return any(begin < stop and begin + nbytes > start for start, stop in spans)
