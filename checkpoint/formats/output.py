"""What a sink writes, as data: files, each a sequence of parts. `convert.py` fills them, in parallel, part by part.

A format's module says what files a catalog becomes (`plan`); the bytes come later. So no sink ever holds a tensor, and
any source goes to any sink.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from resilient.checkpoint.catalog.catalog import ITEMSIZES, Catalog, Tensor
from resilient.checkpoint.formats.folder import Folder
from resilient.checkpoint.formats.source import Source


@dataclass(frozen=True, slots=True)
class TensorBytes:
    """The bytes of a box of a tensor of the source, row-major, its values converted to `dtype`.

    `name` is that in the catalog. `rank`: whose, of a tensor of which ranks have their own (`Catalog.own`).
    """

    name: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    dtype: str
    rank: int | None = None

    def tensor_in(self, catalog: Catalog) -> Tensor:
        return catalog.tensors[self.name] if self.rank is None else catalog.own[self.name][self.rank]

    @property
    def nbytes(self) -> int:
        return math.prod(self.sizes) * ITEMSIZES[self.dtype]


@dataclass(frozen=True, slots=True)
class Checksum:
    """4 bytes, little endian: the CRC-32 of an earlier part of the same file, which zip archives need."""

    part: int

    @property
    def nbytes(self) -> int:
        return 4


Part = bytes | TensorBytes | Checksum

Derive = Callable[[Folder], bytes]
"""Makes a small file's contents from files of the target that are whole by then. Travels to workers: it pickles."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """A file to write. `last`: only when all others are there, for what makes them count (an index, a `latest`).

    `derive`: instead of parts, for what is known only from bytes that were written (digests). It is called after the
    outputs that come before it in the plan, or, of those that are `last`, after all others and the earlier `last` ones.
    """

    name: str
    parts: tuple[Part, ...] = ()
    last: bool = False
    derive: Derive | None = None

    @property
    def nbytes(self) -> int:
        return sum(len(part) if isinstance(part, bytes) else part.nbytes for part in self.parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class SinkOptions:
    """`dtype`: of floating-point parameters and buffers (None: as they are). `shard_bytes`: a file's size, about.

    `into`: the name of the file, where the target is one. `ranks`: how many ranks' files to write, where the format is
    of ranks.
    """

    dtype: str | None = None
    shard_bytes: int = 5 << 30
    into: str | None = None
    ranks: int = 1
    extra: dict[str, str] = field(default_factory=dict)


Plan = Callable[[Source, SinkOptions], list[Output]]
"""A sink: what files the source's catalog becomes. Raises UsageError for what the format cannot say."""
