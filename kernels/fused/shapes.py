"""What a fused call looks like, decided from shapes alone: tiles, chunks, how much memory and how many signals.

Pure. All ranks of a group come to the same numbers, because the call's fingerprint, which they compare in the kernel,
is made of all that these depend on.
"""

import zlib
from dataclasses import dataclass
from typing import Literal

import torch

from resilient.kernels.symmetric.memory import FREE_WORD

Operation = Literal["all_gather_matmul", "matmul_reduce_scatter", "matmul_all_reduce"]
Activation = Literal["relu", "gelu", "silu"]

OPERATIONS: tuple[Operation, ...] = ("all_gather_matmul", "matmul_reduce_scatter", "matmul_all_reduce")
ACTIVATIONS: dict[str | None, int] = {None: 0, "relu": 1, "gelu": 2, "silu": 3}
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """A program's part of the result, and how the compiler is to make it. `group`: rows of tiles that share columns.

    A chunk of an all-gather is `group` rows of tiles: the unit that is sent and signalled.
    """

    rows: int
    columns: int
    depth: int
    group: int = 4
    copied: int = 4096  # numbers that a pushing program moves at a time
    warps: int = 8
    stages: int = 3


TILES = {
    torch.float16: Tile(rows=128, columns=128, depth=64),
    torch.bfloat16: Tile(rows=128, columns=128, depth=64),
    torch.float32: Tile(rows=64, columns=64, depth=32, warps=4),  # no tensor cores: float32 stays float32
}
INTERPRETED = Tile(rows=32, columns=32, depth=64, group=2, copied=1 << 16)  # a program costs, its size hardly does


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """A fused call: `m` rows of the whole product, `n` columns, `k` summed over on each rank."""

    operation: Operation
    m: int
    n: int
    k: int
    dtype: torch.dtype
    world: int
    biased: bool
    activation: Activation | None
    tile: Tile

    def __str__(self) -> str:
        return (
            f"{self.operation} of [{self.m}, {self.k}] x [{self.k}, {self.n}] in {self.dtype} over {self.world} ranks"
        )

    @property
    def rows(self) -> int:
        """Rows of one rank; the last may have fewer in an all-reduce."""
        return -(-self.m // self.world)

    @property
    def tiles(self) -> int:
        """Of the rows of one rank."""
        return _parts(self.rows, self.tile.rows) * _parts(self.n, self.tile.columns)

    @property
    def chunks(self) -> int:
        """Of a rank's shard."""
        return _parts(self.rows, self.tile.rows * self.tile.group)

    @property
    def programs(self) -> int:
        if self.operation == "all_gather_matmul":
            return (self.world - 1) * self.chunks + self.world * self.tiles
        return self.world * self.tiles + ((self.world - 1) * self.tiles if self.operation == "matmul_all_reduce" else 0)

    @property
    def buffer_bytes(self) -> int:
        """All shards; or everybody's part of the own rows; or these and all reduced rows."""
        columns = self.k if self.operation == "all_gather_matmul" else self.n
        times = 2 if self.operation == "matmul_all_reduce" else 1
        return times * self.world * self.rows * columns * self.dtype.itemsize

    @property
    def signal_words(self) -> int:
        flags = self.chunks if self.operation == "all_gather_matmul" else 2 * self.tiles
        return FREE_WORD + 2 * self.world + self.world * flags

    @property
    def fingerprint(self) -> int:
        """31 bits of all that ranks must agree on; never 0."""
        return zlib.crc32(repr(self).encode()) & 0x7FFFFFFF or 1


def _parts(whole: int, part: int) -> int:
    return -(-whole // part)
