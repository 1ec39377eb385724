"""Engines: linear combinations of byte ranges over GF(2^8), at the speed of memory where a native library is there.

`default_engine` takes ISA-L (https://github.com/intel/isa-l) out of the pyeclib wheel, which needs no compiler, else
the system's, else numpy tables, some fifty times slower. A native library is trusted only after it has computed what
the tables say. pyeclib's own interface is not used: it copies, and holds the interpreter lock.
"""

import ctypes
import logging
from collections.abc import Iterator, Sequence
from functools import cache, lru_cache
from importlib import metadata
from typing import Protocol

import numpy as np

from resilient.ec.buffers import bytes_at
from resilient.ec.field import MULTIPLY, Bytes

_log = logging.getLogger("resilient")
_LONGEST = 1 << 30  # ISA-L counts in C ints: a call of 4 GiB + 4 KiB would silently write 4 KiB
_TABLE_CHUNK = 128 << 10
_KEPT_TABLES = 256


class Engine(Protocol):
    """Sources and targets are addresses of host memory; they must not overlap. Any thread."""

    name: str

    def combine(self, coefficients: Bytes, sources: Sequence[int], targets: Sequence[int], nbytes: int) -> None:
        """targets[i] = XOR over j of coefficients[i, j] * sources[j]."""

    def add(self, coefficients: Bytes, source: int, targets: Sequence[int], nbytes: int) -> None:
        """targets[i] ^= coefficients[i] * source."""


class Tables:
    """numpy and the multiplication table: the oracle of the others, and what is left where there is no library."""

    name = "tables"

    def combine(self, coefficients: Bytes, sources: Sequence[int], targets: Sequence[int], nbytes: int) -> None:
        for begin in range(0, nbytes, _TABLE_CHUNK):
            count = min(_TABLE_CHUNK, nbytes - begin)
            parts = [bytes_at(source + begin, count) for source in sources]
            for row, target in zip(coefficients, targets, strict=True):
                total = np.zeros(count, dtype=np.uint8)
                for coefficient, part in zip(row, parts, strict=True):
                    total ^= MULTIPLY[coefficient][part]
                bytes_at(target + begin, count)[:] = total

    def add(self, coefficients: Bytes, source: int, targets: Sequence[int], nbytes: int) -> None:
        for begin in range(0, nbytes, _TABLE_CHUNK):
            count = min(_TABLE_CHUNK, nbytes - begin)
            part = bytes_at(source + begin, count)
            for coefficient, target in zip(coefficients, targets, strict=True):
                bytes_at(target + begin, count)[:] ^= MULTIPLY[coefficient][part]


class Isal:
    """ISA-L by its C interface. Raises OSError, AttributeError or RuntimeError for a library that is none, or lies."""

    def __init__(self, path: str) -> None:
        self.name = f"isa-l ({path})"
        library = ctypes.CDLL(path)  # releases the interpreter lock during calls
        pointer, integer = ctypes.c_void_p, ctypes.c_int
        self._init_tables = library.ec_init_tables
        self._init_tables.argtypes, self._init_tables.restype = (integer, integer, pointer, pointer), None
        self._encode = library.ec_encode_data
        self._encode.argtypes, self._encode.restype = (integer, integer, integer, pointer, pointer, pointer), None
        self._update = library.ec_encode_data_update
        self._update.argtypes = (integer, integer, integer, integer, pointer, pointer, pointer)
        self._update.restype = None
        self._tables = lru_cache(_KEPT_TABLES)(self._make_tables)
        _check(self)

    def combine(self, coefficients: Bytes, sources: Sequence[int], targets: Sequence[int], nbytes: int) -> None:
        rows, columns = coefficients.shape
        tables = self._tables(coefficients.tobytes(), rows, columns)
        for begin in range(0, nbytes, _LONGEST):
            count = min(_LONGEST, nbytes - begin)
            self._encode(count, columns, rows, tables, _pointers(sources, begin), _pointers(targets, begin))

    def add(self, coefficients: Bytes, source: int, targets: Sequence[int], nbytes: int) -> None:
        tables = self._tables(coefficients.tobytes(), len(coefficients), 1)
        for begin in range(0, nbytes, _LONGEST):
            count = min(_LONGEST, nbytes - begin)
            self._update(count, 1, len(coefficients), 0, tables, source + begin, _pointers(targets, begin))

    def _make_tables(self, coefficients: bytes, rows: int, columns: int) -> ctypes.Array[ctypes.c_char]:
        tables = ctypes.create_string_buffer(32 * rows * columns)
        self._init_tables(columns, rows, coefficients, tables)
        return tables


@cache
def default_engine() -> Engine:
    """The fastest engine that is there and right. Made once."""
    for path in _libraries():
        try:
            return Isal(path)
        except (OSError, AttributeError, RuntimeError) as error:
            _log.debug("no ISA-L at %s: %s", path, error)
    _log.warning("parity will be slow: there is no usable ISA-L; install pyeclib>=1.8,<2 or the system's libisal2")
    return Tables()


def _libraries() -> Iterator[str]:
    """Where ISA-L may be: listed by the wheel that brings it, then wherever the system looks."""
    try:
        files = metadata.files("pyeclib") or []
    except metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.name.startswith("libisal") and ".so" in file.name:
            yield str(file.locate())
    yield "libisal.so.2"


def _check(engine: Engine) -> None:
    """Compare with the tables, on all bytes, for some coefficients and a length that no vector divides."""
    sources = [np.roll(np.arange(2 * 256 + 5, dtype=np.uint8), 3 * number) for number in range(3)]
    coefficients = np.array([[1, 1, 1], [2, 29, 255], [141, 0, 7]], dtype=np.uint8)
    addresses = [int(source.ctypes.data) for source in sources]
    for act in ("combine", "add"):
        ours, theirs = (np.full((3, len(sources[0])), 90, dtype=np.uint8) for _ in range(2))
        for used, result in ((engine, ours), (Tables(), theirs)):
            targets = [int(row.ctypes.data) for row in result]
            if act == "combine":
                used.combine(coefficients, addresses, targets, len(sources[0]))
            else:
                used.add(coefficients[:, 1].copy(), addresses[0], targets, len(sources[0]))
        if not np.array_equal(ours, theirs):
            raise RuntimeError(f"{engine.name} computes something else than the tables ({act})")


def _pointers(addresses: Sequence[int], begin: int) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * len(addresses))(*(address + begin for address in addresses))
