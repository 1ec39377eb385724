"""The files of torch.save that a checkpoint consists of: each tree read once, numbered for the catalog, and verified.

The classes of DeepSpeed's pickles are named here; none of them is imported. A tensor's bytes are checked against the
CRC-32 that the archive has of its storage.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from resilient.checkpoint.catalog.catalog import Catalog, File
from resilient.checkpoint.catalog.table import FILE, OFFSET
from resilient.checkpoint.formats.deepspeed_zero import RankFile
from resilient.checkpoint.formats.folder import Folder
from resilient.checkpoint.formats.source import Finding, Progress, Reference, Source
from resilient.checkpoint.formats.stored import StoredTensor
from resilient.checkpoint.formats.torch_zip import Archive, Member, crc_of, open_archive
from resilient.errors import DamagedImage, LevelFailed

OPAQUE = frozenset(
    (
        "argparse.Namespace",
        "deepspeed.checkpoint.universal_checkpoint.SubparamShape",
        "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
        "deepspeed.runtime.fp16.loss_scaler.LossScaler",
        "deepspeed.runtime.fp16.loss_scaler.LossScalerBase",
        "deepspeed.runtime.zero.config.ZeroStageEnum",
        "deepspeed.utils.tensor_fragment.fragment_address",
    )
)


class TorchFiles:
    """`listed`: the files that were read, in the order of their numbers. `config`: the first `ds_config` in them."""

    def __init__(self, folder: Folder, *, trust: bool) -> None:
        self._folder, self._trust = folder, trust
        self._read: dict[str, tuple[RankFile, Any]] = {}
        self._archives: dict[str, Archive] = {}
        self.listed: list[File] = []
        self.config: Any = None

    def read(self, name: str) -> RankFile:
        """The tree of a file. Raises as `read_torch_file`, and DamagedImage where it is no dict."""
        rank, tree = self.value(name)
        if not isinstance(tree, dict):
            raise DamagedImage(f"{rank.where} holds no dict but {type(tree).__name__}")
        return rank

    def value(self, name: str) -> tuple[RankFile, Any]:
        """The same of a file that need not hold a dict: beside it (with an empty tree, if it is none) what it holds."""
        found = self._read.get(name)
        if found is None:
            archive = open_archive(self._folder, name)
            value = archive.tree(opaque=OPAQUE, trust=self._trust)
            self._archives[name] = archive
            found = RankFile(len(self.listed), archive.where, value if isinstance(value, dict) else {}), value
            self._read[name] = found
            self.listed.append(File(name, archive.begin + archive.nbytes))
            if self.config is None:
                self.config = found[0].tree.get("ds_config")
        return found

    def load(self, stored: StoredTensor, file: int) -> torch.Tensor:
        """A small tensor."""
        flat = replace(stored, shape=(_span(stored),), strides=(1,))
        data = bytearray(flat.nbytes)
        self._folder.read(self.listed[file].name, stored.offset, memoryview(data))
        dtype = getattr(torch, stored.dtype)
        whole = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
        return whole.as_strided(stored.shape, stored.strides).clone()

    def number_of(self, where: str) -> int:
        """The number of a file that was read, by its place."""
        return next(rank.file for rank, _ in self._read.values() if rank.where == where)

    def number_at(self, file: int, offset: int, dtype: str) -> Any:
        return self.load(StoredTensor(dtype=dtype, shape=(), strides=(), offset=offset, storage=""), file).item()

    def verify(self, catalog: Catalog, progress: Progress) -> Iterator[Finding]:
        """Read all bytes, and compare the storages with their checksums."""
        tensors = _by_file(catalog)
        for number, file in enumerate(self.listed):
            done = 0
            for _, member in self._archives[file.name].storages():
                problem = self._problem(file.name, member)
                if problem is not None:
                    starts, names = tensors.get(number, (np.empty(0, np.int64), []))
                    low, high = np.searchsorted(starts, [member.offset, member.offset + member.nbytes])
                    yield Finding(file.name, tuple(dict.fromkeys(names[low:high])), problem)
                done += member.nbytes
                progress(member.nbytes)
            progress(file.nbytes - done)

    def _problem(self, name: str, member: Member) -> str | None:
        try:
            found = crc_of(self._folder, name, member, lambda _: None)
        except (DamagedImage, LevelFailed, FileNotFoundError) as error:
            return f"cannot be read: {error}"
        if member.crc and found != member.crc:
            return f"{member.nbytes} bytes at {member.offset} differ from their checksum"
        return None


@contextmanager
def malformed(folder: Folder) -> Iterator[None]:
    """Trees that are whole but not made as DeepSpeed makes them: DamagedImage instead of what their use raises."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
        raise DamagedImage(f"{folder.url} is not as DeepSpeed writes it ({type(error).__name__}: {error})") from error


def _by_file(catalog: Catalog) -> dict[int, tuple[Any, list[str]]]:
    """For each file the offsets at which pieces begin, sorted, and the names of their tensors."""
    found: dict[int, list[tuple[int, str]]] = {}
    for tensor in catalog.tensors.values():
        for row in tensor.pieces.rows[:, [FILE, OFFSET]].tolist():
            found.setdefault(row[0], []).append((row[1], tensor.name))
    return {
        file: (np.array([offset for offset, _ in sorted(rows)], np.int64), [name for _, name in sorted(rows)])
        for file, rows in found.items()
    }


def _span(stored: StoredTensor) -> int:
    if not stored.numel:
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(stored.shape, stored.strides, strict=True))


class FilesSource(Source):
    """A checkpoint in torch files: what DeepSpeed writes, and its universal form."""

    def __init__(
        self, reference: Reference, folder: Folder, catalog: Catalog, files: TorchFiles, objects: dict[str, Any]
    ) -> None:
        super().__init__(reference, folder, catalog)
        self._files = files
        self._objects = objects

    def objects(self, rank: int = 0) -> dict[str, Any]:
        """Those of rank 0; DeepSpeed keeps no other's. `deepspeed_objects.py` lists them."""
        return self._objects

    def verify(self, progress: Progress) -> Iterator[Finding]:
        """By the CRC-32 that torch.save leaves beside each tensor's bytes."""
        return self._files.verify(self.catalog, progress)
