"""Reed-Solomon over k data and m parity shards: encode, decode, update, verify. Zero-copy on host memory.

Shards are byte ranges of one length, as numpy arrays, torch tensors or anything with the buffer protocol. Every byte
position stands alone, so any part of the shards can be worked on by itself: give views of the same range of each.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from resilient.ec.buffers import Ranges, bytes_at, ranges_of
from resilient.ec.engine import Combine, Engine, default_engine
from resilient.ec.matrix import Recovery, parity_matrix, recovery
from resilient.errors import UsageError

_VERIFY_BYTES = 1 << 20
_KEPT_PLANS = 256  # of decoding: to invert a matrix takes as long as to decode a few MiB
_DELTA_BYTES = 256 << 10  # stays in the cache between the XOR and the products


class Codec:
    """Any m of the k + m shards may be lost. Any thread; k + m is at most 255. Raises UsageError for other sizes."""

    def __init__(self, k: int, m: int, engine: Engine | None = None) -> None:
        self.k, self.m = k, m
        self._parity = parity_matrix(k, m)
        self._engine = engine or default_engine()
        self._encode = self._engine.prepare(self._parity)
        self._plans = lru_cache(_KEPT_PLANS)(self._make_plan)

    def encode(self, data: Sequence[Any], parity: Sequence[Any]) -> None:
        """Fill the m parity shards from the k data shards."""
        targets = ranges_of(parity, self.m, "parity", writable=True)
        _combine(self._encode, ranges_of(data, self.k, "data"), targets)

    def decode(self, present: Mapping[int, Any], missing: Mapping[int, Any]) -> None:
        """Fill the missing shards, by number (data 0 to k - 1, parity k to k + m - 1), from at least k that are there.

        Raises RestoreError when fewer are there. Uses no more of them than it needs: `plan` says which.
        """
        if not missing:
            return
        plan, decode = self._planned(present, missing)
        sources = ranges_of([present[number] for number in plan.sources], len(plan.sources), "present")
        targets = ranges_of([missing[number] for number in plan.missing], len(missing), "missing", writable=True)
        _combine(decode, sources, targets)

    def plan(self, present: Iterable[int], missing: Sequence[int]) -> Recovery:
        """Which of the shards that are present give the missing ones. Raises RestoreError when too few are there."""
        return self._planned(present, missing)[0]

    def update(self, number: int, old: Any, new: Any, parity: Sequence[Any]) -> None:
        """Bring the parity up to date, in place, after data shard `number` changed from `old` to `new`.

        An update that is cut short leaves parity that belongs to neither: have a copy, or encode again.
        """
        if not 0 <= number < self.k:
            raise UsageError(f"data shard {number} of {self.k}")
        changed = ranges_of([old, new], 2, "old and new")
        targets = ranges_of(parity, self.m, "parity", writable=True)
        nbytes = _one_length(changed, targets)
        delta = np.empty(min(_DELTA_BYTES, nbytes), dtype=np.uint8)
        coefficients = self._parity[:, number].copy()
        for begin in range(0, nbytes, _DELTA_BYTES):
            count = min(_DELTA_BYTES, nbytes - begin)
            before, after = (bytes_at(address, count) for address in _from(changed, begin))
            np.bitwise_xor(before, after, out=delta[:count])
            self._engine.add(coefficients, int(delta.ctypes.data), _from(targets, begin), count)

    def verify(self, data: Sequence[Any], parity: Sequence[Any]) -> list[int]:
        """The numbers of the parity shards (k to k + m - 1) that are not what the data give; reads everything once.

        A damaged data shard makes all m inconsistent, a damaged parity shard only itself.
        """
        sources = ranges_of(data, self.k, "data")
        there = ranges_of(parity, self.m, "parity")
        nbytes = _one_length(sources, there)
        scratch = np.empty((self.m, min(_VERIFY_BYTES, nbytes)), dtype=np.uint8)
        rows = [int(row.ctypes.data) for row in scratch]
        bad: set[int] = set()
        for begin in range(0, nbytes, _VERIFY_BYTES):
            count = min(_VERIFY_BYTES, nbytes - begin)
            self._encode(_from(sources, begin), rows, count)
            for number, (row, address) in enumerate(zip(scratch, _from(there, begin), strict=True)):
                if not np.array_equal(row[:count], bytes_at(address, count)):
                    bad.add(self.k + number)
        return sorted(bad)

    def _planned(self, present: Iterable[int], missing: Iterable[int]) -> tuple[Recovery, Combine]:
        return self._plans(tuple(sorted(present)), tuple(missing))

    def _make_plan(self, present: tuple[int, ...], missing: tuple[int, ...]) -> tuple[Recovery, Combine]:
        plan = recovery(self._parity, present, missing)
        plan.coefficients.flags.writeable = False  # it is handed out again
        return plan, self._engine.prepare(plan.coefficients)


def _combine(combine: Combine, sources: Ranges, targets: Ranges) -> None:
    combine(sources.addresses, targets.addresses, _one_length(sources, targets))


def _from(ranges: Ranges, begin: int) -> list[int]:
    return [address + begin for address in ranges.addresses]


def _one_length(first: Ranges, second: Ranges) -> int:
    if first.nbytes != second.nbytes:
        raise UsageError(f"shards of {first.nbytes} and of {second.nbytes} bytes: all must have one length")
    return first.nbytes
