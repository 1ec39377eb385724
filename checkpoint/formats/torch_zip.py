"""Files of `torch.save`: the tree that is in one, without its tensors' bytes.

Such a file is a zip archive of stored members: `data.pkl` with the tree and `data/<key>` with each storage. Read is the
archive's directory, the pickle, and 30 bytes before each storage. The pickle is read by `torch_pickle.py`, which runs
no foreign code; files are written by `torch_write.py`.
"""

import io
import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from resilient.checkpoint.formats.folder import Folder
from resilient.checkpoint.formats.source import Progress
from resilient.checkpoint.formats.stored import Opaque, StoredTensor
from resilient.checkpoint.formats.torch_pickle import StorageBytes, load_pickle
from resilient.checkpoint.formats.torch_write import torch_parts
from resilient.errors import DamagedImage, NotACheckpoint

__all__ = ["Archive", "Opaque", "StoredTensor", "open_archive", "read_torch_file", "torch_parts"]

_CHUNK_BYTES = 4 << 20
_LOCAL_HEADER = struct.Struct("<4s22xHH")
_MOST_PICKLE = 2 << 30
_TAIL = {True: 2 << 10, False: 64 << 10}  # of a (local) archive, read at once: the directory is there, if it is short
_LEGACY = bytes.fromhex("80028a0a6cfc9c46f920")  # torch.save before 1.6


def read_torch_file(
    folder: Folder,
    name: str,
    *,
    begin: int = 0,
    nbytes: int | None = None,
    opaque: Iterable[str] = frozenset(),
    trust: bool = False,
) -> Any:
    """The tree in a file of `torch.save`, each tensor as a `StoredTensor` with its offset in the whole file.

    `begin` and `nbytes`: the archive lies inside of a larger file. Classes called in `opaque` ("argparse.Namespace")
    come out as `Opaque`. `trust`: import whatever else the pickle asks for, which runs the writer's code.
    Raises FileNotFoundError, LevelFailed, NotACheckpoint (`Refused`: of a pickle that asks for more), DamagedImage.
    """
    return open_archive(folder, name, begin=begin, nbytes=nbytes).tree(opaque=opaque, trust=trust)


@dataclass(frozen=True, slots=True)
class Member:
    """A member of an archive: where its bytes are in the whole file, and their CRC-32."""

    offset: int
    nbytes: int
    crc: int


@dataclass(slots=True)
class Archive:
    """The directory of a file of `torch.save`. `prefix`: the folder that all members lie in."""

    folder: Folder
    name: str
    begin: int
    nbytes: int
    where: str
    prefix: str
    entries: dict[str, zipfile.ZipInfo]
    members: dict[str, Member] = field(default_factory=dict)

    def tree(self, *, opaque: Iterable[str] = frozenset(), trust: bool = False) -> Any:
        """See `read_torch_file`."""
        if f"{self.prefix}/byteorder" in self.entries and self._bytes("byteorder", 16) != b"little":
            raise NotACheckpoint(
                f"{self.where} has big-endian tensors, which are not read; save it on a little-endian machine"
            )
        data = self._bytes("data.pkl", _MOST_PICKLE)
        return load_pickle(data, self.where, storages=self._storage, opaque=opaque, trust=trust)

    def member(self, short: str) -> Member:
        """Where a member is, by its name below the prefix. Raises DamagedImage."""
        found = self.members.get(short)
        if found is None:
            found = self.members[short] = self._locate(short)
        return found

    def storages(self) -> Iterator[tuple[str, Member]]:
        """All storages, by key."""
        start = f"{self.prefix}/data/"
        for full in self.entries:
            if full.startswith(start):
                yield full.removeprefix(start), self.member(full.removeprefix(f"{self.prefix}/"))

    def _storage(self, key: str) -> StorageBytes:
        found = self.member(f"data/{key}")
        return StorageBytes(found.offset, found.nbytes)

    def _bytes(self, short: str, most: int) -> bytes:
        """A small member, verified."""
        member = self.member(short)
        if member.nbytes > most:
            raise DamagedImage(f"{self.where}: its {short} has {member.nbytes} bytes; at most {most} are taken")
        data = bytearray(member.nbytes)
        self.folder.read(self.name, member.offset, memoryview(data))
        if zlib.crc32(data) != member.crc and member.crc:
            raise DamagedImage(f"{self.where}: its {short} differs from the checksum that was written with it")
        return bytes(data)

    def _locate(self, short: str) -> Member:
        entry = self.entries.get(f"{self.prefix}/{short}")
        if entry is None:
            raise DamagedImage(f"{self.where} has no {short}")
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1 or entry.compress_size != entry.file_size:
            raise DamagedImage(f"{self.where}: its {short} is compressed or encrypted, which torch.save never does")
        at, header = entry.header_offset, bytearray(_LOCAL_HEADER.size)
        if not 0 <= at <= self.nbytes - len(header):
            raise DamagedImage(f"{self.where}: its {short} lies at {at}, outside of the file")
        self.folder.read(self.name, self.begin + at, memoryview(header))
        signature, name_bytes, extra_bytes = _LOCAL_HEADER.unpack(header)
        begin = at + len(header) + name_bytes + extra_bytes
        if signature != b"PK\3\4" or begin + entry.file_size > self.nbytes:
            raise DamagedImage(f"{self.where}: its {short} lies at {at}, outside of the file, or is none")
        return Member(self.begin + begin, entry.file_size, entry.CRC)


def open_archive(folder: Folder, name: str, *, begin: int = 0, nbytes: int | None = None) -> Archive:
    """Read the directory of an archive. Raises as `read_torch_file`."""
    where = folder.where(name) + (f" at {begin}" if begin else "")
    size = folder.size(name)
    length = size - begin if nbytes is None else nbytes
    if begin < 0 or length < 0 or begin + length > size:
        raise DamagedImage(f"{where} should have {length} bytes; the file ends at {size}")
    _no_other_kind(folder, name, begin, length, where)
    try:
        with zipfile.ZipFile(_View(folder, name, begin, length)) as archive:
            found = archive.infolist()
    except (zipfile.BadZipFile, struct.error, ValueError, NotImplementedError, UnicodeDecodeError) as error:
        raise DamagedImage(f"{where} is no whole file of torch.save ({error}); it may be cut short") from error
    entries = {entry.filename: entry for entry in found}
    if len(entries) != len(found):
        raise DamagedImage(f"{where} has two members of one name")
    prefixes = [full.partition("/")[0] for full in entries if full.partition("/")[2] == "data.pkl"]
    if len(prefixes) != 1:
        raise NotACheckpoint(f"{where} is a zip archive, but not one of torch.save")
    if f"{prefixes[0]}/constants.pkl" in entries:
        raise NotACheckpoint(
            f"{where} is a TorchScript program, not a checkpoint; save its state_dict() with torch.save"
        )
    return Archive(folder, name, begin, length, where, prefixes[0], entries)


def _no_other_kind(folder: Folder, name: str, begin: int, nbytes: int, where: str) -> None:
    start = bytearray(min(nbytes, len(_LEGACY)))
    folder.read(name, begin, memoryview(start))
    if start == _LEGACY:
        raise NotACheckpoint(
            f"{where} was written by torch.save before 1.6, or without its zip format; save it anew with "
            "torch.save(torch.load(path, weights_only=True), path)"
        )
    if start[:2] != b"PK":
        raise NotACheckpoint(f"{where} is no file of torch.save: it does not begin like a zip archive")


class _View(io.RawIOBase):
    """A range of a file, for `zipfile` to find its way in."""

    def __init__(self, folder: Folder, name: str, begin: int, nbytes: int) -> None:
        self._folder, self._name, self._begin, self._nbytes = folder, name, begin, nbytes
        self._at = 0
        tail = min(nbytes, _TAIL[folder.is_local])
        self._tail = bytes(self._read(nbytes - tail, tail))

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = 0) -> int:
        at = offset + (0, self._at, self._nbytes)[whence]
        if at < 0:
            raise ValueError(f"a position of {at}")
        self._at = at
        return at

    def readinto(self, into: Any) -> int:
        count = max(0, min(len(into), self._nbytes - self._at))
        tail = self._nbytes - len(self._tail)
        if self._at >= tail:
            into[:count] = self._tail[self._at - tail : self._at - tail + count]
        else:
            into[:count] = self._read(self._at, count)
        self._at += count
        return count

    def _read(self, at: int, count: int) -> bytearray:
        data = bytearray(count)
        self._folder.read(self._name, self._begin + at, memoryview(data))
        return data


def crc_of(folder: Folder, name: str, member: Member, progress: Progress) -> int:
    """The CRC-32 of a member's bytes, all of which are read."""
    crc = 0
    buffer = memoryview(bytearray(min(member.nbytes, _CHUNK_BYTES)))
    for begin in range(0, member.nbytes, _CHUNK_BYTES):
        part = buffer[: min(_CHUNK_BYTES, member.nbytes - begin)]
        folder.read(name, member.offset + begin, part)
        crc = zlib.crc32(part, crc)
        progress(part.nbytes)
    return crc
