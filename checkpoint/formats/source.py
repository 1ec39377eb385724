"""A checkpoint that is open for reading, whatever its format: a catalog, and the bytes behind it.

A format's module opens its own (`registry.py` lists them). Worker processes open the same source again by its
`Reference`: a source itself never travels.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from resilient.checkpoint.catalog.catalog import Catalog
from resilient.checkpoint.formats.folder import Folder
from resilient.errors import ResilientError

Progress = Callable[[int], None]
"""Told how many more bytes are done."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """How to open a source. `url`: a local path or an fsspec URL, of a folder or of one file.

    `format` None: whatever it is recognised as. `step` None: the newest complete one. `spec`: the text of a
    specification (`catalog/spec.py`) that says how the ranks' tensors make up the global ones. `trust_pickle`: let
    foreign pickles build any object, which runs their code.
    """

    url: str
    format: str | None = None
    step: int | None = None
    spec: str | None = None
    trust_pickle: bool = False


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that `verify` found wrong: in which file, which tensors, and what."""

    file: str
    tensors: tuple[str, ...]
    problem: str


class Source(ABC):
    """See the module. One thread at a time may use one; close it in the end.

    Reading raises FileNotFoundError, DamagedImage (bytes that differ from their digest, or end early) and LevelFailed.
    """

    def __init__(self, reference: Reference, folder: Folder, catalog: Catalog) -> None:
        self.reference = reference
        self.folder = folder
        self.catalog = catalog

    def read(self, file: int, offset: int, into: memoryview) -> None:
        """Fill `into` with bytes of file number `file` of the catalog. Verified where the format has digests."""
        self.folder.read(self.catalog.files[file].name, offset, into)

    @abstractmethod
    def objects(self, rank: int = 0) -> dict[str, Any]:
        """What is no tensor of the catalog, by item: trees of plain Python values and small torch tensors.

        For an optimizer's item whatever its groups and its state need beyond the catalog. `rank`: whose, where ranks
        have their own (random generators); of a rank that is not there, those of rank 0.
        """

    def verify(self, progress: Progress) -> Iterator[Finding]:
        """Read all bytes of the checkpoint and yield what is wrong with them. Without digests: what cannot be read."""
        for number, file in enumerate(self.catalog.files):
            yield from self._verify_file(number, file.nbytes, progress)

    def close(self) -> None:
        """Safe to repeat."""
        self.folder.close()

    def __enter__(self) -> "Source":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _verify_file(self, number: int, nbytes: int, progress: Progress) -> Iterator[Finding]:
        name = self.catalog.files[number].name
        buffer = memoryview(bytearray(min(nbytes, 4 << 20)))
        try:
            for begin in range(0, nbytes, 4 << 20):
                part = buffer[: min(4 << 20, nbytes - begin)]
                self.folder.read(name, begin, part)
                progress(part.nbytes)
        except (OSError, ResilientError) as error:
            yield Finding(name, (), f"cannot be read: {error}")
