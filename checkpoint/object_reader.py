"""The reading half of the codec in `objects.py`: from JSON text and tensors to values.

Builds values of the types in `_TAGS` and nothing else: no import, no name looked up, no code run, so text from a
stranger can at worst be refused. Each tag's members are checked for their names and exact types before they are used.
Not here: verifying digests; damaged bytes are found before they reach this place.
"""

import base64
import collections
import datetime
import json
import math
import pathlib
import struct
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import torch

from resilient.checkpoint.dtypes import torch_dtype
from resilient.errors import DamagedImage, NewerFormat, RestoreError

__all__ = ["FACTORIES", "FLOATS", "PATHS", "TAG", "bytes_of", "decode", "dtype_from_json"]

TAG = "$type"
# The default factories that are known by name; all others are code.
FACTORIES: dict[str | None, type | None] = {
    None: None,
    "int": int,
    "float": float,
    "str": str,
    "list": list,
    "dict": dict,
    "set": set,
}
PATHS = {
    kind.__name__: kind
    for kind in (pathlib.PosixPath, pathlib.WindowsPath, pathlib.PurePosixPath, pathlib.PureWindowsPath)
}
# The floats that JSON cannot say, by the hexadecimal digits of their bits; another NaN is written as its digits.
FLOATS = {"7ff0000000000000": "inf", "fff0000000000000": "-inf", "7ff8000000000000": "nan"}


def decode(text: str, tensors: Mapping[str, torch.Tensor], where: str) -> object:
    """The value that `encode` was given. Tensors are the mapping's own objects; numpy arrays get memory of their own.

    Raises DamagedImage for text that `encode` did not write and for tensors that are not there, NewerFormat for a
    type of a later version, RestoreError for what this machine does not have (a dtype, a kind of path).
    """
    decoder = _Decoder(tensors, where)
    try:
        value: object = json.loads(text, object_pairs_hook=decoder.object, parse_constant=decoder.refuse)
    except (ValueError, RecursionError) as error:
        raise decoder.damaged(f"it is not JSON of ours ({error})") from error
    return value


def bytes_of(array: Any) -> Any:
    """The memory of a contiguous numpy array as flat uint8, without a copy."""
    return array.reshape(-1).view(np.uint8)


def dtype_from_json(descr: object) -> Any:
    """The numpy dtype of a description as in .npy files, with lists for tuples. Raises ValueError or TypeError."""

    def restored(part: Any) -> Any:
        if not isinstance(part, list):
            return part
        return [
            (tuple(name) if isinstance(name, list) else name, restored(inner), *map(tuple, shape))
            for name, inner, *shape in part
        ]

    dtype = np.lib.format.descr_to_dtype(restored(descr))
    if dtype.hasobject:
        raise ValueError("arrays of objects are never read")
    return dtype


@dataclass(frozen=True, slots=True)
class _Decoder:
    tensors: Mapping[str, torch.Tensor]
    where: str

    def damaged(self, why: str) -> DamagedImage:
        return DamagedImage(f"the saved text of {self.where!r} cannot be read: {why}; use another snapshot")

    def refuse(self, constant: str) -> NoReturn:
        raise self.damaged(f"it holds the bare constant {constant}")

    def object(self, pairs: list[tuple[str, Any]]) -> Any:
        """Called by `json` for each object, the innermost first."""
        members = dict(pairs)
        if len(members) != len(pairs):
            raise self.damaged("a member stands twice in one object")
        return self.tagged(members.pop(TAG), members) if TAG in members else members

    def tagged(self, tag: Any, members: dict[str, Any]) -> Any:
        if not isinstance(tag, str) or tag not in _TAGS:
            raise NewerFormat(f"the saved text of {self.where!r} has values of type {tag!r}: upgrade this library")
        expected, build = _TAGS[tag]
        fits = members.keys() == expected.keys() and all(
            _ANY in kinds or type(members[name]) in kinds for name, kinds in expected.items()
        )
        if not fits:
            raise self.damaged(f"a {tag} has other members than {', '.join(expected)}, or members of other types")
        try:
            return build(self, **members)
        except RestoreError:
            raise
        except (TypeError, ValueError, OverflowError, RuntimeError, KeyError, struct.error) as error:
            raise self.damaged(f"a {tag} is malformed ({error})") from error

    def tensor(self, path: str) -> torch.Tensor:
        found = self.tensors.get(path)
        if found is None:
            raise self.damaged(f"the tensor {path!r} that it refers to is not there")
        return found

    def ndarray(self, dtype: Any, shape: list[int], path: str) -> Any:
        kind = dtype_from_json(dtype)
        stored = self.tensor(path)
        if stored.nbytes != kind.itemsize * math.prod(shape):
            raise ValueError(f"{path!r} has {stored.nbytes} bytes, which is not {shape} of {kind}")
        array = np.empty(shape, kind)
        if array.nbytes:
            bytes_of(array)[:] = stored.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        return array

    def mapping(self, kind: Callable[[Any], Any], items: list[Any]) -> Any:
        if any(type(pair) is not list or len(pair) != 2 for pair in items):
            raise ValueError("an item is not a pair")
        return _unique(kind, items)


def _unique(kind: Callable[[Any], Any], items: list[Any]) -> Any:
    """A container that keeps each key once, of items that must all be different."""
    made = kind(items)
    if len(made) != len(items):
        raise ValueError("a key stands twice")
    return made


def _read_float(_: _Decoder, value: str) -> float:
    if value in FLOATS.values():
        return float(value)
    (number,) = struct.unpack(">d", bytes.fromhex(value))
    return float(number)


def _read_bytes(text: str) -> bytes:
    return base64.b64decode(text, validate=True)


def _read_numpy(_: _Decoder, dtype: Any, base64: str) -> Any:
    data, kind = _read_bytes(base64), dtype_from_json(dtype)
    if len(data) != kind.itemsize:
        raise ValueError(f"{len(data)} bytes for one {kind}")
    return np.frombuffer(data, kind).copy()[0]


def _read_datetime(_: _Decoder, iso: str, fold: int, zone: list[Any]) -> datetime.datetime:
    value = datetime.datetime.fromisoformat(iso).replace(fold=fold)
    return value.replace(tzinfo=datetime.timezone(*zone)) if zone else value


def _read_path(_: _Decoder, kind: str, path: str) -> pathlib.PurePath:
    try:
        return PATHS[kind](path)
    except NotImplementedError as error:  # a PosixPath on Windows, or the reverse
        raise RestoreError(f"the saved {kind} {path!r} is none on this system; save the Pure kind, or a str") from error


def _read_default_dict(decoder: _Decoder, factory: str | None, items: list[Any]) -> Any:
    return collections.defaultdict(FACTORIES[factory], decoder.mapping(dict, items))


def _read_namespace(_: _Decoder, members: dict[Any, Any]) -> types.SimpleNamespace:
    made = types.SimpleNamespace()
    vars(made).update(members)
    return made


class _ANY:
    """Stands for every type."""


_NONE = type(None)
_ITEMS: dict[str, tuple[type, ...]] = {"items": (list,)}
_INTS = (int,)
_TEXT = (str,)

# tag -> (the types that each member may have once it is read itself, what is built of them)
_TAGS: dict[str, tuple[dict[str, tuple[type, ...]], Callable[..., Any]]] = {
    "int": ({"hex": _TEXT}, lambda _, hex: int(hex, 16)),
    "float": ({"value": _TEXT}, _read_float),
    "str": ({"hex": _TEXT}, lambda _, hex: bytes.fromhex(hex).decode("utf-8", "surrogatepass")),
    "complex": ({"real": (float,), "imag": (float,)}, lambda _, real, imag: complex(real, imag)),
    "bytes": ({"base64": _TEXT}, lambda _, base64: _read_bytes(base64)),
    "bytearray": ({"base64": _TEXT}, lambda _, base64: bytearray(_read_bytes(base64))),
    "tuple": (_ITEMS, lambda _, items: tuple(items)),
    "deque": ({"maxlen": (int, _NONE), **_ITEMS}, lambda _, maxlen, items: collections.deque(items, maxlen)),
    "set": (_ITEMS, lambda _, items: _unique(set, items)),
    "frozenset": (_ITEMS, lambda _, items: _unique(frozenset, items)),
    "dict": (_ITEMS, lambda decoder, items: decoder.mapping(dict, items)),
    "OrderedDict": (_ITEMS, lambda decoder, items: decoder.mapping(collections.OrderedDict, items)),
    "Counter": (_ITEMS, lambda decoder, items: collections.Counter(decoder.mapping(dict, items))),
    "defaultdict": ({"factory": (str, _NONE), **_ITEMS}, _read_default_dict),
    "range": (dict.fromkeys(("start", "stop", "step"), _INTS), lambda _, start, stop, step: range(start, stop, step)),
    "slice": (dict.fromkeys(("start", "stop", "step"), (_ANY,)), lambda _, start, stop, step: slice(start, stop, step)),
    "SimpleNamespace": ({"members": (dict,)}, _read_namespace),
    "date": ({"iso": _TEXT}, lambda _, iso: datetime.date.fromisoformat(iso)),
    "datetime": ({"iso": _TEXT, "fold": _INTS, "zone": (list,)}, _read_datetime),
    "timedelta": (
        {"days": _INTS, "seconds": _INTS, "microseconds": _INTS},
        lambda _, days, seconds, microseconds: datetime.timedelta(days, seconds, microseconds),
    ),
    "path": ({"kind": _TEXT, "path": _TEXT}, _read_path),
    "tensor": ({"path": _TEXT}, lambda decoder, path: decoder.tensor(path)),
    "torch.Size": (_ITEMS, lambda _, items: torch.Size(items)),
    "torch.dtype": ({"name": _TEXT}, lambda _, name: torch_dtype(name)),
    "torch.device": ({"name": _TEXT}, lambda _, name: torch.device(name)),
    "ndarray": ({"dtype": (str, list), "shape": (list,), "path": _TEXT}, _Decoder.ndarray),
    "numpy": ({"dtype": (str, list), "base64": _TEXT}, _read_numpy),
    "numpy.str": ({"value": _TEXT}, lambda _, value: np.str_(value)),
    "numpy.bytes": ({"base64": _TEXT}, lambda _, base64: np.bytes_(_read_bytes(base64))),
}
