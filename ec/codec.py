"""Reed-Solomon over k data and m parity shards: encode, decode, update, verify. Zero-copy on host memory.

Shards are byte ranges of one length, as numpy arrays, torch tensors or anything with the buffer protocol. Every byte
position stands alone, so any part of the shards can be worked on by itself: give views of the same range of each.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from resilient.ec.buffers import Span, bytes_at, spans_of
from resilient.ec.engine import Engine, default_engine
from resilient.ec.field import Bytes
from resilient.ec.matrix import Recovery, parity_matrix, recovery
from resilient.errors import UsageError

_VERIFY_BYTES = 1 << 20
_DELTA_BYTES = 256 << 10  # stays in the cache between the XOR and the products


class Codec:
    """Any m of the k + m shards may be lost. Any thread; k + m is at most 255. Raises UsageError for other sizes."""

    def __init__(self, k: int, m: int, engine: Engine | None = None) -> None:
        self.k, self.m = k, m
        self._parity = parity_matrix(k, m)
        self._engine = engine or default_engine()

    def encode(self, data: Sequence[Any], parity: Sequence[Any]) -> None:
        """Fill the m parity shards from the k data shards."""
        targets = spans_of(parity, self.m, "parity", writable=True)
        self._combine(self._parity, spans_of(data, self.k, "data"), targets)

    def decode(self, present: Mapping[int, Any], missing: Mapping[int, Any]) -> None:
        """Fill the missing shards, by number (data 0 to k - 1, parity k to k + m - 1), from at least k that are there.

        Raises RestoreError when fewer are there. Uses no more of them than it needs: `plan` says which.
        """
        if not missing:
            return
        plan = self.plan(present, list(missing))
        sources = spans_of([present[number] for number in plan.sources], len(plan.sources), "present")
        targets = spans_of([missing[number] for number in plan.missing], len(missing), "missing", writable=True)
        self._combine(plan.coefficients, sources, targets)

    def plan(self, present: Any, missing: Sequence[int]) -> Recovery:
        """Which of the shards that are present give the missing ones. Raises RestoreError when too few are there."""
        return recovery(self._parity, present, missing)

    def update(self, number: int, old: Any, new: Any, parity: Sequence[Any]) -> None:
        """Bring the parity up to date, in place, after data shard `number` changed from `old` to `new`.

        An update that is cut short leaves parity that belongs to neither: have a copy, or encode again.
        """
        if not 0 <= number < self.k:
            raise UsageError(f"data shard {number} of {self.k}")
        before, after = spans_of([old, new], 2, "old and new")
        targets = spans_of(parity, self.m, "parity", writable=True)
        nbytes = _one_length(before.nbytes, targets[0].nbytes)
        delta = np.empty(min(_DELTA_BYTES, nbytes), dtype=np.uint8)
        both = np.array([[1, 1]], dtype=np.uint8)
        coefficients = self._parity[:, number].copy()
        for begin in range(0, nbytes, _DELTA_BYTES):
            count = min(_DELTA_BYTES, nbytes - begin)
            address = int(delta.ctypes.data)
            self._engine.combine(both, [before.address + begin, after.address + begin], [address], count)
            self._engine.add(coefficients, address, [one.address + begin for one in targets], count)

    def verify(self, data: Sequence[Any], parity: Sequence[Any]) -> list[int]:
        """The numbers of the parity shards (k to k + m - 1) that are not what the data give; reads everything once.

        A damaged data shard makes all m inconsistent, a damaged parity shard only itself.
        """
        sources = spans_of(data, self.k, "data")
        there = spans_of(parity, self.m, "parity")
        nbytes = _one_length(sources[0].nbytes, there[0].nbytes)
        scratch = np.empty((self.m, min(_VERIFY_BYTES, nbytes)), dtype=np.uint8)
        rows = [int(row.ctypes.data) for row in scratch]
        bad: set[int] = set()
        for begin in range(0, nbytes, _VERIFY_BYTES):
            count = min(_VERIFY_BYTES, nbytes - begin)
            self._engine.combine(self._parity, [one.address + begin for one in sources], rows, count)
            for number, (row, shard) in enumerate(zip(scratch, there, strict=True)):
                if not np.array_equal(row[:count], bytes_at(shard.address + begin, count)):
                    bad.add(self.k + number)
        return sorted(bad)

    def _combine(self, coefficients: Bytes, sources: Sequence[Span], targets: Sequence[Span]) -> None:
        nbytes = _one_length(sources[0].nbytes, targets[0].nbytes)
        self._engine.combine(coefficients, [one.address for one in sources], [one.address for one in targets], nbytes)


def _one_length(first: int, second: int) -> int:
    if first != second:
        raise UsageError(f"shards of {first} and of {second} bytes: all must have one length")
    return first
