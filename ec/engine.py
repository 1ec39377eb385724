"""Engines: linear combinations of byte ranges over GF(2^8), at the speed of memory where a native library is there.

`default_engine` takes ISA-L (https://github.com/intel/isa-l) out of the pyeclib wheel, which needs no compiler, else
the system's, else numpy tables, some fifty times slower. A native library is trusted only after it has computed what
the tables say. pyeclib's own interface is not used: it copies, and holds the interpreter lock.
"""

import ctypes
import logging
from collections.abc import Callable, Iterator, Sequence
from functools import cache, lru_cache, partial
from importlib import metadata
from typing import Protocol

import numpy as np

from resilient.ec.buffers import bytes_at
from resilient.ec.field import MULTIPLY, Bytes

_log = logging.getLogger("resilient")
_LONGEST_BYTES = 1 << 30  # ISA-L counts in C ints: a call of 4 GiB + 4 KiB would silently write 4 KiB
_XOR_ALIGN_BYTES = 64  # of every address: its XOR stores past the cache, in the widest vectors
_TABLE_CHUNK = 128 << 10
_KEPT_TABLES = 256


Combine = Callable[[Sequence[int], Sequence[int], int], None]


class Engine(Protocol):
    """Sources and targets are addresses of host memory; they must not overlap. Any thread."""

    name: str

    def prepare(self, coefficients: Bytes) -> Combine:
        """combine(sources, targets, nbytes): targets[i] = XOR over j of coefficients[i, j] * sources[j].

        To be kept, since preparing takes longer than combining a few KiB.
        """
        ...

    def add(self, coefficients: Bytes, source: int, targets: Sequence[int], nbytes: int) -> None:
        """targets[i] ^= coefficients[i] * source."""


class Tables:
    """numpy and the multiplication table: the oracle of the others, and what is left where there is no library."""

    name = "tables"

    def prepare(self, coefficients: Bytes) -> Combine:
        return partial(_combine_by_tables, coefficients)

    def add(self, coefficients: Bytes, source: int, targets: Sequence[int], nbytes: int) -> None:
        for begin in range(0, nbytes, _TABLE_CHUNK):
            count = min(_TABLE_CHUNK, nbytes - begin)
            part = bytes_at(source + begin, count)
            for coefficient, target in zip(coefficients, targets, strict=True):
                bytes_at(target + begin, count)[:] ^= MULTIPLY[coefficient][part]


def _combine_by_tables(coefficients: Bytes, sources: Sequence[int], targets: Sequence[int], nbytes: int) -> None:
    for begin in range(0, nbytes, _TABLE_CHUNK):
        count = min(_TABLE_CHUNK, nbytes - begin)
        parts = [bytes_at(source + begin, count) for source in sources]
        for row, target in zip(coefficients, targets, strict=True):
            total = np.zeros(count, dtype=np.uint8)
            for coefficient, part in zip(row, parts, strict=True):
                total ^= MULTIPLY[coefficient][part]
            bytes_at(target + begin, count)[:] = total


class Isal:
    """ISA-L by its C interface. Raises OSError, AttributeError or RuntimeError for a library that is none, or lies.

    Where all coefficients are 1 (parity 0, and one loss that it gives back) and the addresses are aligned, its XOR is
    taken: 1.1 to 1.5 times as fast as its products on blocks of 4 MiB, since it does not read what it overwrites.
    A call goes to the library in pieces of at most `longest_bytes`.
    """

    def __init__(self, path: str, longest_bytes: int = _LONGEST_BYTES) -> None:
        self._longest_bytes = longest_bytes
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
        self._xor = library.xor_gen
        self._xor.argtypes, self._xor.restype = (integer, integer, pointer), integer
        self._tables = lru_cache(_KEPT_TABLES)(self._make_tables)
        _check(self)

    def prepare(self, coefficients: Bytes) -> Combine:
        """What a call touches is kept few and ready: after each block of data the caches have forgotten the rest."""
        rows, columns = coefficients.shape
        tables = self._make_tables(coefficients.tobytes(), rows, columns)
        encode, longest_bytes = self._encode, self._longest_bytes
        from_type, to_type = _pointers(columns), _pointers(rows)

        def products(sources: Sequence[int], targets: Sequence[int], nbytes: int) -> None:
            for begin in range(0, nbytes, longest_bytes):
                count = min(longest_bytes, nbytes - begin)
                from_here = from_type(*[source + begin for source in sources])
                encode(count, columns, rows, tables, from_here, to_type(*[target + begin for target in targets]))

        all_ones = rows == 1 and columns > 1 and bool((coefficients == 1).all())
        return self._prepare_xor(columns, products) if all_ones else products

    def _prepare_xor(self, columns: int, products: Combine) -> Combine:
        """For aligned addresses; for others it is `products`."""
        xor, longest_bytes, together_type = self._xor, self._longest_bytes, _pointers(columns + 1)

        def combine(sources: Sequence[int], targets: Sequence[int], nbytes: int) -> None:
            together = [*sources, *targets]
            bits = 0
            for address in together:
                bits |= address
            if bits % _XOR_ALIGN_BYTES:
                products(sources, targets, nbytes)
                return
            for begin in range(0, nbytes, longest_bytes):
                count = min(longest_bytes, nbytes - begin)
                if xor(columns + 1, count, together_type(*[address + begin for address in together])):
                    raise RuntimeError(f"the library refused to XOR {columns} ranges of {count} bytes")

        return combine

    def add(self, coefficients: Bytes, source: int, targets: Sequence[int], nbytes: int) -> None:
        rows = len(coefficients)
        tables, to_type = self._tables(coefficients.tobytes(), rows, 1), _pointers(rows)
        for begin in range(0, nbytes, self._longest_bytes):
            count = min(self._longest_bytes, nbytes - begin)
            self._update(count, 1, rows, 0, tables, source + begin, to_type(*[target + begin for target in targets]))

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
    nbytes = 2 * 256 + 5
    rows = _aligned_rows(9, nbytes)
    sources, ours, theirs = rows[:3], rows[3:6], rows[6:]
    for number, source in enumerate(sources):
        source[:] = np.roll(np.arange(nbytes, dtype=np.uint8), 3 * number)
    every = np.array([[1, 1, 1], [2, 29, 255], [141, 0, 7]], dtype=np.uint8)
    for what, coefficients in (("combine", every), ("combine", every[:1]), ("add", every)):
        for used, result in ((engine, ours), (Tables(), theirs)):
            result[:] = 90
            targets = _addresses(result[: len(coefficients)])
            if what == "combine":
                used.prepare(coefficients)(_addresses(sources), targets, nbytes)
            else:
                used.add(coefficients[:, 1].copy(), _addresses(sources)[0], targets, nbytes)
        if not np.array_equal(ours, theirs):
            raise RuntimeError(f"{engine.name} computes something else than the tables ({what})")


def _aligned_rows(count: int, nbytes: int) -> Bytes:
    stride = -(-nbytes // _XOR_ALIGN_BYTES) * _XOR_ALIGN_BYTES
    memory = np.zeros(count * stride + _XOR_ALIGN_BYTES, dtype=np.uint8)
    first = -int(memory.ctypes.data) % _XOR_ALIGN_BYTES
    return memory[first : first + count * stride].reshape(count, stride)[:, :nbytes]


def _addresses(rows: Bytes) -> list[int]:
    return [int(row.ctypes.data) for row in rows]


@cache  # ctypes forgets a type that nobody holds, and would make a new one in each call
def _pointers(count: int) -> type[ctypes.Array[ctypes.c_void_p]]:
    return ctypes.c_void_p * count
