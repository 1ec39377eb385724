"""Files of `torch.save`, whole and hostile, for the tests of what reads and writes them."""

import pickle
import struct
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from resilient.checkpoint.formats.output import Checksum, Part, TensorBytes

MAGIC = b"\x80\x02"
FLOATS = b"X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\x000X\3\0\0\0cpuK\x04tQ"  # a persistent id, behind a mark


def bytes_of(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())


def box_of(name: str, tensor: torch.Tensor) -> TensorBytes:
    """All of a tensor, as sinks have it."""
    shape = tuple(tensor.shape)
    return TensorBytes(name, (0,) * len(shape), shape, str(tensor.dtype).removeprefix("torch."))


def filled(parts: Sequence[Part], tensors: Mapping[str, torch.Tensor]) -> bytes:
    """The file that parts stand for."""
    done: list[bytes] = []
    for part in parts:
        if isinstance(part, bytes):
            done.append(part)
        elif isinstance(part, Checksum):
            done.append(struct.pack("<I", zlib.crc32(done[part.part])))
        else:
            box = tuple(slice(at, at + size) for at, size in zip(part.offsets, part.sizes, strict=True))
            done.append(bytes_of(tensors[part.name][box]))
    return b"".join(done)


def archive(path: Path, members: Mapping[str, bytes], *, compressed: Sequence[str] = ()) -> Path:
    """A zip archive with these members below `archive/`."""
    with zipfile.ZipFile(path, "w") as out:
        for name, data in members.items():
            kind = zipfile.ZIP_DEFLATED if name in compressed else zipfile.ZIP_STORED
            out.writestr(f"archive/{name}", data, kind)
    return path


def pickled(path: Path, data: bytes, storages: Sequence[bytes] = (bytes(16),)) -> Path:
    """A file of `torch.save` with this very pickle."""
    members = {f"data/{number}": storage for number, storage in enumerate(storages)}
    return archive(path, {"data.pkl": data, **members, "version": b"3\n"})


def reduced(function: str, *arguments: Any) -> bytes:
    """A pickle that calls a function of that name, "module.name"."""
    module, _, name = function.rpartition(".")
    inner = pickle.dumps(arguments, protocol=2)[2:-1]
    return MAGIC + b"c" + f"{module}\n{name}\n".encode() + inner + b"R."
