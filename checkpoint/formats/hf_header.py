"""The header of a safetensors file, and JSON of strangers: read with every number checked, and written.

What the format's own library refuses is refused here too: a header beyond 100 MB, ranges that overlap, leave a hole or
do not end with the file, a shape that does not fit its range, a name that is there twice. Written bytes are those of
its library: elements of wide dtypes first, then by name. Format: https://huggingface.co/docs/safetensors/index#format.
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from resilient.checkpoint.catalog.catalog import ITEMSIZES
from resilient.errors import DamagedImage, UsageError

MOST_HEADER_BYTES = 100_000_000  # as the format's library has it
MOST_DIMS = 64  # of a tensor; as torch has it

# Codes of dtypes in the order of the library's enumeration, in which it lays tensors out (from the last to the first).
DTYPES = {
    "BOOL": "bool",
    "F4": "float4_e2m1fn_x2",
    "U8": "uint8",
    "I8": "int8",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "I16": "int16",
    "U16": "uint16",
    "F16": "float16",
    "BF16": "bfloat16",
    "I32": "int32",
    "U32": "uint32",
    "F32": "float32",
    "C64": "complex64",
    "F64": "float64",
    "I64": "int64",
    "U64": "uint64",
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
_ORDER = {code: number for number, code in enumerate(DTYPES)}


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor of a file: its dtype (torch's name) and shape, and where its bytes begin, in the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEMSIZES[self.dtype]


@dataclass(frozen=True, slots=True)
class Header:
    """What a file says of itself: its tensors in the order of their bytes, and its metadata."""

    entries: tuple[Entry, ...]
    metadata: dict[str, str]


def strict_json(data: bytes, where: str) -> dict[str, Any]:
    """A JSON object of strangers. Raises DamagedImage for a key that is there twice, and for what is no object."""
    try:
        raw = json.loads(data, object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise DamagedImage(f"{where} is no JSON that could be taken for it: {error}") from error
    if not isinstance(raw, dict):
        raise DamagedImage(f"{where} is no JSON object")
    return raw


def header_bytes(head: bytes, file_bytes: int, where: str) -> int:
    """How long the header is, from the first 8 bytes of a file. Raises DamagedImage."""
    length = int.from_bytes(head, "little") if len(head) == 8 else -1
    if not 2 <= length <= file_bytes - 8:
        raise DamagedImage(f"{where} is no safetensors file: its header claims {length} of {file_bytes} bytes")
    if length > MOST_HEADER_BYTES:
        raise DamagedImage(f"{where}: a header of {length} bytes; at most {MOST_HEADER_BYTES} are read")
    return length


def parse_header(text: bytes, file_bytes: int, where: str) -> Header:
    """The header (its JSON) of a file. Raises DamagedImage for whatever the format does not allow."""
    raw = strict_json(text, f"the header of {where}")
    metadata = raw.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise DamagedImage(f"the metadata of {where} are not texts by name")
    begin = 8 + len(text)
    entries = [_entry(name, value, begin, where) for name, value in raw.items()]
    entries.sort(key=lambda entry: (entry.offset, entry.nbytes))
    for entry in entries:
        if entry.offset != begin:
            what = "overlaps another" if entry.offset < begin else f"leaves a hole of {entry.offset - begin} bytes"
            raise DamagedImage(f"{where}: tensor {entry.name!r} {what}")
        begin += entry.nbytes
    if begin != file_bytes:
        raise DamagedImage(f"{where} has {file_bytes} bytes; its tensors end at {begin}")
    return Header(tuple(entries), metadata)


def layout(tensors: Iterable[Entry]) -> list[Entry]:
    """Tensors in the order in which the format's library lays them out. Their offsets are left as they are.

    Raises UsageError for a dtype that the format does not know.
    """
    found = list(tensors)
    for one in found:
        if one.dtype not in CODES:
            raise UsageError(f"tensor {one.name!r} is {one.dtype}, which safetensors cannot hold: convert it (--dtype)")
    return sorted(found, key=lambda one: (-_ORDER[CODES[one.dtype]], one.name.encode()))


def make_header(tensors: Iterable[Entry], metadata: Mapping[str, str]) -> bytes:
    """The bytes before the data of a file that holds `tensors`, one after the other in this order."""
    raw: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for one in tensors:
        if one.name in raw or one.name == "__metadata__":
            raise UsageError(f"a safetensors file cannot hold a tensor called {one.name!r} (twice)")
        raw[one.name] = {
            "dtype": CODES[one.dtype],
            "shape": _coded_shape(one),
            "data_offsets": [at, at + one.nbytes],
        }
        at += one.nbytes
    text = json.dumps(raw, separators=(",", ":"), ensure_ascii=False).encode()
    if len(text) > MOST_HEADER_BYTES:
        raise UsageError(f"a header of {len(text)} bytes, which readers refuse: make the shards smaller")
    text = text.ljust(-(-len(text) // 8) * 8)
    return len(text).to_bytes(8, "little") + text


def _coded_shape(one: Entry) -> list[int]:
    """The code F4 counts values, torch pairs of them."""
    if one.dtype != "float4_e2m1fn_x2":
        return list(one.shape)
    if not one.shape:
        raise UsageError(f"tensor {one.name!r} of packed float4 has no dimension: safetensors cannot say what it is")
    return [*one.shape[:-1], 2 * one.shape[-1]]


def _entry(name: str, raw: Any, begin: int, where: str) -> Entry:
    try:
        dtype, shape, (start, stop) = raw["dtype"], raw["shape"], raw["data_offsets"]
        numbers = (*shape, start, stop)
        name.encode()  # half a surrogate pair is no text
    except (TypeError, KeyError, ValueError) as error:
        raise DamagedImage(f"{where}: what it says of {name!r} is not what the format has") from error
    if len(numbers) > MOST_DIMS + 2 or not all(type(one) is int and 0 <= one < 1 << 63 for one in numbers):
        raise DamagedImage(f"{where}: the shape or the range of {name!r} are no numbers that a tensor could have")
    if dtype not in DTYPES:
        raise DamagedImage(f"{where}: tensor {name!r} has the dtype {dtype!r}, which is not known")
    if dtype == "F4":
        if not shape or shape[-1] % 2:
            raise DamagedImage(f"{where}: tensor {name!r} ends within a byte")
        shape = [*shape[:-1], shape[-1] // 2]
    entry = Entry(name, DTYPES[dtype], tuple(shape), begin + start)
    if stop - start != entry.nbytes:
        raise DamagedImage(f"{where}: tensor {name!r} of {dtype}{shape} has {stop - start} bytes")
    return entry


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name!r} is there twice")
        found[name] = value
    return found


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is no number of JSON")
