"""What a file of `torch.save` consists of, as parts: `torch.load` opens it, with `weights_only` and with `mmap` too.

The layout is that of torch's own writer (`caffe2/serialize/inline_container.cc`), to the byte where it matters: members
are stored, each storage begins at a multiple of 64 bytes, and a member's CRC-32 follows it. So everything but the
checksums is known before a byte of a tensor is read. The same tree always makes the same bytes; that a list or dict is
shared within it is not kept, that a tensor is, is.
"""

import io
import math
import pickle
import struct
import zlib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._utils import _rebuild_tensor_v2, _rebuild_tensor_v3

from resilient.checkpoint.catalog.catalog import ITEMSIZES
from resilient.checkpoint.catalog.table import row_major
from resilient.checkpoint.dtypes import dtype_name, torch_dtype
from resilient.checkpoint.formats.output import Checksum, Part, TensorBytes
from resilient.checkpoint.formats.plain import plain

__all__ = ["torch_parts"]

_PREFIX = "archive"
_ALIGN = 64
_4G = 0xFFFFFFFF
_LOCAL = struct.Struct("<4s5H3I2H")
_CENTRAL_BEGIN, _CENTRAL_END = struct.Struct("<4s6H"), struct.Struct("<2I5H2I")
_DESCRIPTOR, _DESCRIPTOR64 = struct.Struct("<2I"), struct.Struct("<2Q")
_END = struct.Struct("<4s4H2IH")
_END64 = struct.Struct("<4sQ2H2I4Q")
_LOCATOR64 = struct.Struct("<4sIQI")
_UTF8, _SIZES_FOLLOW = 1 << 11, 1 << 3


def torch_parts(tree: Any) -> tuple[Part, ...]:
    """The parts of a file with this tree, in which a `TensorBytes` is a tensor of the shape `sizes`.

    Equal ones become one tensor under several names. Real tensors (small ones) are written from here. What
    `torch.load(weights_only=True)` would refuse is made plain first (`plain.py`): numpy's values, paths, dates.
    Raises UsageError with the path of what cannot be.
    """
    pickled, storages = _pickled(plain(tree))
    archive = _Archive()
    archive.add("data.pkl", pickled)
    archive.add(".format_version", b"1")
    archive.add(".storage_alignment", str(_ALIGN).encode())
    archive.add("byteorder", b"little")
    for number, storage in enumerate(storages):
        archive.add(f"data/{number}", storage)
    archive.add("version", b"3\n")
    return archive.finish()


# --- the pickle ---


@dataclass(frozen=True, slots=True, eq=False)
class _Storage:
    key: str
    dtype: str
    numel: int


class _Pickler(pickle.Pickler):
    def __init__(self, out: io.BytesIO) -> None:
        super().__init__(out, protocol=2)
        self.storages: list[bytes | TensorBytes] = []
        self.keys: dict[Any, _Storage] = {}

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, TensorBytes):
            return self._tensor(value, value.dtype, value.sizes, lambda: value)
        if isinstance(value, torch.Tensor):
            return self._tensor(id(value), dtype_name(value.dtype), tuple(value.shape), lambda: _bytes_of(value))
        if isinstance(value, torch.dtype):
            return dtype_name(value)
        return NotImplemented

    def persistent_id(self, value: Any) -> Any:
        if type(value) is not _Storage:
            return None
        kind = _storage_class(value.dtype)
        count = value.numel * (ITEMSIZES[value.dtype] if kind is torch.storage.UntypedStorage else 1)
        return ("storage", kind, value.key, "cpu", count)

    def _tensor(
        self, same: Any, dtype: str, shape: tuple[int, ...], bytes_of: Callable[[], bytes | TensorBytes]
    ) -> Any:
        storage = self.keys.get(same)
        if storage is None:
            storage = self.keys[same] = _Storage(str(len(self.storages)), dtype, math.prod(shape))
            self.storages.append(bytes_of())
        arguments: tuple[Any, ...] = (storage, 0, shape, row_major(shape), False, OrderedDict())
        if _storage_class(dtype) is torch.storage.UntypedStorage:
            return _rebuild_tensor_v3, (*arguments, torch_dtype(dtype))
        return _rebuild_tensor_v2, arguments


def _bytes_of(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())


def _pickled(tree: Any) -> tuple[bytes, list[bytes | TensorBytes]]:
    out = io.BytesIO()
    pickler = _Pickler(out)
    pickler.dump(tree)
    return out.getvalue(), pickler.storages


def _storage_class(dtype: str) -> Any:
    """torch's class for storages of a dtype; the untyped one where there is none."""
    found = torch.storage._dtype_to_storage_type_map().get(torch_dtype(dtype))
    return getattr(torch, found) if found else torch.storage.UntypedStorage


# --- the archive ---


@dataclass(frozen=True, slots=True)
class _Entry:
    name: bytes
    offset: int
    nbytes: int
    crc: Part


@dataclass(slots=True)
class _Archive:
    """`pending`: bytes that become one part when one of another kind follows."""

    parts: list[Part] = field(default_factory=list)
    pending: bytearray = field(default_factory=bytearray)
    entries: list[_Entry] = field(default_factory=list)
    at: int = 0

    def add(self, name: str, part: bytes | TensorBytes) -> None:
        full = f"{_PREFIX}/{name}".encode()
        nbytes = len(part) if isinstance(part, bytes) else part.nbytes
        begin = self.at
        zip64 = _zip64(nbytes, begin)
        flags = _UTF8 | (_SIZES_FOLLOW if nbytes else 0)
        padding = -(begin + _LOCAL.size + len(full) + len(zip64) + 4) % _ALIGN
        extra = zip64 + struct.pack("<2sH", b"FB", padding) + b"Z" * padding
        self._put(_LOCAL.pack(b"PK\3\4", 0, flags, 0, 0, 0, 0, 0, 0, len(full), len(extra)) + full + extra)
        self._put(part)
        crc = struct.pack("<I", zlib.crc32(part)) if isinstance(part, bytes) else Checksum(len(self.parts) - 1)
        self.entries.append(_Entry(full, begin, nbytes, crc))
        if nbytes:
            self._put(b"PK\7\x08")
            self._put(crc)
            self._put((_DESCRIPTOR64 if zip64 else _DESCRIPTOR).pack(nbytes, nbytes))

    def finish(self) -> tuple[Part, ...]:
        begin = self.at
        for entry in self.entries:
            self._central(entry)
        nbytes, count, end = self.at - begin, len(self.entries), self.at
        if begin >= _4G or count >= 0xFFFF:
            self._put(_END64.pack(b"PK\6\6", _END64.size - 12, 45, 45, 0, 0, count, count, nbytes, begin))
            self._put(_LOCATOR64.pack(b"PK\6\7", 0, end, 1))
        some = min(count, 0xFFFF)
        self._put(_END.pack(b"PK\5\6", 0, 0, some, some, min(nbytes, _4G), min(begin, _4G), 0))
        self._flush()
        return tuple(self.parts)

    def _central(self, entry: _Entry) -> None:
        zip64 = _zip64(entry.nbytes, entry.offset)
        size, at = min(entry.nbytes, _4G), min(entry.offset, _4G)
        flags = _UTF8 | (_SIZES_FOLLOW if entry.nbytes else 0)
        self._put(_CENTRAL_BEGIN.pack(b"PK\1\2", 0, 0, flags, 0, 0, 0))
        self._put(entry.crc)
        self._put(_CENTRAL_END.pack(size, size, len(entry.name), len(zip64), 0, 0, 0, 0, at) + entry.name + zip64)

    def _put(self, part: Part) -> None:
        if isinstance(part, bytes):
            self.pending += part
            self.at += len(part)
            return
        self._flush()
        self.parts.append(part)
        self.at += part.nbytes

    def _flush(self) -> None:
        if self.pending:
            self.parts.append(bytes(self.pending))
            self.pending.clear()


def _zip64(nbytes: int, offset: int) -> bytes:
    """The extra field for numbers of more than 32 bits."""
    wide = [*([nbytes, nbytes] if nbytes >= _4G else []), *([offset] if offset >= _4G else [])]
    return struct.pack(f"<2H{len(wide)}Q", 1, 8 * len(wide), *wide) if wide else b""
