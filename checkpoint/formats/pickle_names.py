"""The names that a foreign pickle may ask for, each with what it gets: exact pairs of module and name, nothing else.

What is handed out cannot be changed from within the pickle: a `Call` has no attributes to set, plain types are Python's
own. A `Call` looks at its arguments before it makes anything (`bytearray(10**12)` is a short pickle). numpy's arrays
and dtypes are stand-ins until the whole pickle has been read, then `finished` makes them real.
"""

import collections
import datetime
import math
import pathlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import torch

from resilient.checkpoint.catalog.catalog import ITEMSIZES
from resilient.checkpoint.formats.stored import Opaque, StoredTensor

_STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexDoubleStorage": "complex128",
    "ComplexFloatStorage": "complex64",
}
_NUMPY_KINDS = {"b1", *(f"{kind}{size}" for kind in "iu" for size in (1, 2, 4, 8)), "f2", "f4", "f8", "c8", "c16"}
_PLAIN = (list, dict, set, frozenset, tuple, int, float, str, bool, complex)
# Types of C, which nothing can set an attribute on.
_IMMUTABLE: tuple[Any, ...] = (
    *(collections.OrderedDict, collections.defaultdict, collections.deque),
    *(datetime.date, datetime.datetime, datetime.time, datetime.timedelta, datetime.timezone),
)
_MOST_DEPTH = 200
_MOST_VALUES = 100_000_000


@dataclass(frozen=True, slots=True)
class StorageType:
    """Stands for torch's storage classes. An untyped one counts bytes."""

    dtype: str

    def __setstate__(self, state: Any) -> NoReturn:
        raise TypeError("a storage has no state")


@dataclass(frozen=True, slots=True)
class Storage:
    """A storage, where it lies in the file: what the pickle's persistent ids become."""

    key: str
    dtype: str
    offset: int
    nbytes: int

    def __setstate__(self, state: Any) -> NoReturn:
        raise TypeError("a storage has no state")


class Call:
    """A function under a name that a pickle may call. BUILD finds no attribute to set on it."""

    __slots__ = ("_function", "_name")
    _function: Callable[..., Any]
    _name: str

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        object.__setattr__(self, "_name", name)
        object.__setattr__(self, "_function", function)

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)

    def __setattr__(self, name: str, value: Any) -> NoReturn:
        raise TypeError(f"{self._name} is not to be changed")

    def __setstate__(self, state: Any) -> NoReturn:
        raise TypeError(f"{self._name} has no state")

    def __repr__(self) -> str:
        return self._name


def allowed(full: str) -> Any:
    """What a pickle gets for "module.name"; None for what is not on the list."""
    return _NAMES.get(full)


def finished(tree: Any) -> Any:
    """The tree with real numpy values in place of the stand-ins. Containers are kept, and filled anew."""
    return _Finish().of(tree, 0)


# --- tensors ---


def _tensor(storage: Any, dtype: str, first: Any, shape: Any, strides: Any) -> StoredTensor:
    if type(storage) is not Storage:
        raise TypeError("a tensor without a storage")
    sizes, steps = _numbers(shape), _numbers(strides)
    if len(sizes) != len(steps) or type(first) is not int or first < 0:
        raise ValueError(f"a tensor of shape {sizes} with strides {steps} at {first}")
    itemsize = ITEMSIZES[dtype]
    reach = sum((size - 1) * step for size, step in zip(sizes, steps, strict=True)) if 0 not in sizes else -1
    if (first + reach + 1) * itemsize > storage.nbytes:
        raise ValueError(f"a tensor of shape {sizes} with strides {steps} at {first} reaches beyond its storage")
    return StoredTensor(
        dtype=dtype, shape=sizes, strides=steps, offset=storage.offset + first * itemsize, storage=storage.key
    )


def _numbers(values: Any) -> tuple[int, ...]:
    found = tuple(values)
    if len(found) > 64 or any(type(value) is not int or not 0 <= value < 1 << 62 for value in found):
        raise ValueError(f"{found[:9]} are no sizes of a tensor")
    return found


def _rebuild_v2(storage: Any, first: Any, shape: Any, strides: Any, *_: Any) -> StoredTensor:
    return _tensor(storage, getattr(storage, "dtype", ""), first, shape, strides)


def _rebuild_v3(
    storage: Any, first: Any, shape: Any, strides: Any, _grad: Any, _hooks: Any, dtype: Any, *_: Any
) -> Any:
    return _tensor(storage, str(dtype).removeprefix("torch."), first, shape, strides)


def _same(data: Any, *_: Any) -> Any:
    """A parameter, or a tensor of a device, is its data."""
    if type(data) is not StoredTensor:
        raise TypeError(f"a tensor made of {type(data).__name__}")
    return data


def _from_type(function: Any, _kind: Any, args: Any, _state: Any) -> Any:
    if type(function) is not Call:
        raise TypeError("a tensor that is rebuilt by a stranger")
    return function(*args)


# --- plain values ---


def _encode(text: Any, encoding: Any = "utf-8") -> bytes:
    """How protocol 2 writes bytes."""
    if type(text) is not str or encoding not in ("latin1", "latin-1", "utf-8", "ascii"):
        raise TypeError(f"text in {encoding!r}")
    return text.encode(encoding)


def _bytes(value: Any = b"", encoding: Any = "latin-1") -> bytes:
    if type(value) is str:
        return _encode(value, encoding)
    if type(value) is list:
        return bytes(value)
    if type(value) not in (bytes, bytearray):
        raise TypeError(f"bytes of {type(value).__name__}")
    return bytes(value)


def _bytearray(value: Any = b"", encoding: Any = "latin-1") -> bytearray:
    return bytearray(_bytes(value, encoding))


def _size(values: Any) -> torch.Size:
    return torch.Size(_numbers(values))


def _layout(name: Any) -> torch.layout:
    if name not in ("torch.strided", "torch.sparse_coo"):
        raise ValueError(f"layout {name!r}")
    return torch.strided if name == "torch.strided" else torch.sparse_coo


# --- numpy ---


class _Dtype:
    """A numpy dtype of a plain kind. numpy's own takes flags from a pickle that make it treat data as pointers."""

    __slots__ = ("name", "order")

    def __init__(self, name: Any, *_: Any) -> None:
        text = str(name)
        flexible = text[:1] in ("S", "U") and (not text[1:] or (text[1:].isdigit() and len(text) < 7))
        if type(name) is not str or not (text in _NUMPY_KINDS or flexible):
            raise ValueError(f"numpy dtype {name!r}")
        self.name, self.order = text, "|"

    def __setstate__(self, state: Any) -> None:
        """(version, byte order, subarray, names, fields, size, alignment, flags)"""
        if state[1] not in ("<", ">", "|", "=") or any(part is not None for part in state[2:5]):
            raise ValueError("a structured numpy dtype")
        if self.name in ("S0", "U0", "S", "U"):
            self.name = f"{self.name[0]}{min(max(0, int(state[5])), 1 << 20) // (4 if self.name[0] == 'U' else 1)}"
        self.order = state[1]

    def real(self) -> Any:
        return np.dtype(self.order + self.name if self.order in "<>" else self.name)


class _Array:
    """An array, until BUILD has brought (version, shape, dtype, in the order of Fortran, bytes)."""

    __slots__ = ("state",)

    def __init__(self, *_: Any) -> None:
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def real(self) -> Any:
        _, shape, dtype, fortran, data = self.state
        return _array(data, dtype, shape, "F" if fortran else "C")


def _array(data: Any, dtype: Any, shape: Any, order: Any = "C") -> Any:
    if type(dtype) is not _Dtype or type(data) not in (bytes, bytearray):
        raise TypeError("a numpy array of objects")
    sizes, kind = _numbers(shape), dtype.real()
    if math.prod(sizes) * kind.itemsize != len(data):
        raise ValueError(f"a numpy array of shape {sizes} of {kind} in {len(data)} bytes")
    return np.frombuffer(data, kind).reshape(sizes, order="F" if order == "F" else "C").copy()


def _scalar(dtype: Any, data: Any) -> Any:
    return _array(data, dtype, ())[()]


class _Finish:
    """One walk: lists and dicts are changed in place, tuples made anew where something in them changed.

    Counts what the tree would have if nothing in it were shared, since later walks are over that: forty lists, each
    holding the one before twice, are a small pickle.
    """

    def __init__(self) -> None:
        self.made: dict[
            int, tuple[Any, Any, int | None]
        ] = {}  # id -> (what had it, what became of that, how many values; None: not known yet)
        self.count = 0

    def of(self, value: Any, depth: int) -> Any:
        kind = type(value)
        self.count += 1
        if kind not in (_Array, _Dtype, tuple) and not issubclass(kind, (dict, list, Opaque)):
            return value
        if id(value) in self.made:
            _, made, count = self.made[id(value)]
            if count is None:
                raise ValueError("one of its values contains itself")
            self.count += count
            if self.count > _MOST_VALUES:
                raise ValueError(f"it stands for more than {_MOST_VALUES} values")
            return made
        if depth >= _MOST_DEPTH:
            raise ValueError(f"its values are nested more than {_MOST_DEPTH} deep")
        before = self.count
        self.made[id(value)] = value, value, None
        made = self._made(value, kind, depth + 1)
        self.made[id(value)] = value, made, self.count - before
        return made

    def _made(self, value: Any, kind: type, depth: int) -> Any:
        if kind in (_Array, _Dtype):
            return value.real()
        if kind is tuple:
            made = tuple(self.of(item, depth) for item in value)
            return value if all(a is b for a, b in zip(made, value, strict=True)) else made
        if issubclass(kind, dict):
            for key, item in dict.items(value):
                value[key] = self.of(item, depth)
            _keep_metadata(value)
        elif issubclass(kind, list):
            value[:] = [self.of(item, depth) for item in value]
        else:
            value.args, value.state, value.items = (self.of(x, depth) for x in (value.args, value.state, value.items))
        return value


def _keep_metadata(value: Any) -> None:
    """A state dict of a module has `_metadata`; any other attribute could stand in for a method of the dict."""
    for name in [name for name in getattr(value, "__dict__", {}) if name != "_metadata"]:
        delattr(value, name)


def _names() -> dict[str, Any]:
    calls: dict[str, Callable[..., Any]] = {
        "_codecs.encode": _encode,
        "collections.Counter": collections.Counter,
        "torch.Size": _size,
        "torch.device": torch.device,
        "torch.serialization._get_layout": _layout,
        **dict.fromkeys(("torch.Tensor", "torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer"), _same),
        **dict.fromkeys(("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state"), _same),
        "torch._utils._rebuild_device_tensor_from_cpu_tensor": _same,
        **dict.fromkeys(("torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2"), _rebuild_v2),
        "torch._utils._rebuild_tensor_v3": _rebuild_v3,
        "torch._tensor._rebuild_from_type_v2": _from_type,
        "numpy.dtype": _Dtype,
        "numpy.ndarray": _Array,
    }
    for module in ("numpy.core", "numpy._core"):  # before and since numpy 2
        calls |= {f"{module}.multiarray.scalar": _scalar, f"{module}.multiarray._reconstruct": _Array}
        calls[f"{module}.numeric._frombuffer"] = _array
    for module in ("pathlib", "pathlib._local"):
        calls |= {f"{module}.{kind.__name__}": kind for kind in (pathlib.PurePosixPath, pathlib.PureWindowsPath)}
        calls |= {f"{module}.PosixPath": pathlib.PurePosixPath, f"{module}.WindowsPath": pathlib.PureWindowsPath}
    plain: dict[str, Any] = {}
    for module in ("builtins", "__builtin__"):  # the second is how protocol 2 calls it
        plain |= {f"{module}.{kind.__name__}": kind for kind in _PLAIN}
        calls |= {f"{module}.bytes": _bytes, f"{module}.bytearray": _bytearray}
    return {
        **plain,
        **{f"{kind.__module__}.{kind.__qualname__}": kind for kind in _IMMUTABLE},
        **{str(found): found for found in vars(torch).values() if isinstance(found, torch.dtype)},
        **{f"torch.{name}": StorageType(dtype) for name, dtype in _STORAGES.items()},
        "torch.storage.UntypedStorage": StorageType("uint8"),
        **{name: Call(name, function) for name, function in calls.items()},
    }


_NAMES = _names()
