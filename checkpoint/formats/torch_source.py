"""An open file of `torch.save`, or several that are the shards of one.

What is in it is told by the shape of its tree (`state_tree.py`). Its bytes are read in place, whatever their strides,
and verified by the archive's checksums only where all of it is (`verify`). docs/formats/torch.md is for users.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from resilient.checkpoint.catalog.catalog import Catalog, File
from resilient.checkpoint.catalog.table import FILE, OFFSET
from resilient.checkpoint.formats.folder import Folder
from resilient.checkpoint.formats.source import Finding, Progress, Reference, Source
from resilient.checkpoint.formats.state_catalog import Leaves, fill, loaded
from resilient.checkpoint.formats.state_tree import classify
from resilient.checkpoint.formats.torch_values import is_stored, read_tree, stored_leaves
from resilient.checkpoint.formats.torch_zip import Archive, Member, crc_of
from resilient.errors import DamagedImage, ResilientError

__all__ = ["TorchSource", "checked"]

FORMAT = "torch"


class TorchSource(Source):
    """See the module. Several files are the shards of one model's state dict."""

    def __init__(self, reference: Reference, folder: Folder, archives: Sequence[Archive]) -> None:
        files = [File(archive.name, folder.size(archive.name)) for archive in archives]
        super().__init__(reference, folder, Catalog(format=FORMAT, files=files))
        self.archives = archives
        self._objects: list[tuple[dict[str, Any], Leaves]] = []
        for number, archive in enumerate(archives):
            leaves = stored_leaves(self, number)
            tree = read_tree(archive, trust=reference.trust_pickle)
            try:
                self._objects.append((fill(self.catalog, classify(tree, is_stored), leaves), leaves))
            except ValueError as error:
                raise DamagedImage(f"{archive.where}: {error}") from error

    def objects(self, rank: int = 0) -> dict[str, Any]:
        """What belongs to no model or optimizer, by the keys that it has in the file; namespaces as dicts."""
        return {key: value for held, leaves in self._objects for key, value in loaded(held, leaves).items()}

    def verify(self, progress: Progress) -> Iterator[Finding]:
        """Compares every storage with the checksum that torch.save wrote, where it wrote one."""
        for number, archive in enumerate(self.archives):
            for key, member in archive.storages():
                problem = checked(self.folder, archive.name, member, progress)
                if problem is not None:
                    yield Finding(archive.name, self._tensors_in(number, member), f"storage {key}: {problem}")

    def _tensors_in(self, file: int, member: Member) -> tuple[str, ...]:
        """The tensors that begin within a member of a file."""
        begins = {
            name: tensor.pieces.rows[0, [FILE, OFFSET]].tolist()
            for name, tensor in self.catalog.tensors.items()
            if tensor.numel
        }
        return tuple(
            name for name, (number, at) in begins.items() if number == file and 0 <= at - member.offset < member.nbytes
        )


def checked(folder: Folder, name: str, member: Member, progress: Progress) -> str | None:
    """What is wrong with the bytes of a member, all of which are read. A checksum of 0 is one that was not written."""
    try:
        crc = crc_of(folder, name, member, progress)
    except (OSError, ResilientError) as error:
        return f"cannot be read: {error}"
    return "its bytes differ from the checksum that was written with them" if crc != member.crc != 0 else None
