"""A codec between any state_dict-like value and JSON text plus a flat dictionary of tensors. No pickle (law 6).

It is for the state that is not a parameter: schedulers, data loaders, generators, the user's own objects. What JSON can
say comes out as plain JSON; the rest as tagged objects, `{"$type": "tuple", "items": [1, 2]}`. A user's dictionary that
holds a "$type" is written as a tagged one, so the two cannot be mixed up.

The types are a closed set (`_WRITERS`); anything else, subclasses too, is refused by name when saving, since what comes
back would not be what was there. Shared references are not kept. Not here: reading (`object_reader.py`), what may stand
in `Checkpointer(state=...)` (`stateful.py`), where the text and the tensors lie in an image.
"""

import base64
import collections
import datetime
import json
import math
import re
import struct
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch

from resilient.checkpoint.dtypes import dtype_name, safetensors_dtype
from resilient.checkpoint.object_reader import FACTORIES, FLOATS, PATHS, TAG, bytes_of, decode, dtype_from_json
from resilient.checkpoint.refusals import advice, type_name
from resilient.errors import StateError

__all__ = ["Encoded", "decode", "encode"]

# Containers within containers. Well inside what `json` can parse from deep in a caller's stack: what can be saved
# must be readable later.
_MAX_DEPTH = 100
_INT64 = 1 << 63
# `json` would join a high and a low surrogate that a string holds side by side into one character.
_SURROGATE_PAIR = re.compile("[\ud800-\udbff][\udc00-\udfff]")
_DTYPES_OF_TORCH = {np.dtype(code) for code in "?bBhHiIlLqQefdFD"}


@dataclass(frozen=True)
class Encoded:
    """`tree` is for JSON; `tensors` are what it refers to, by path ("loader/sampler/generator"), in the walk's order.

    The tree shares nothing with the value that was encoded. The tensors are the caller's own objects, and those of
    numpy arrays mostly share the arrays' memory: whoever copies later must see to it that they do not change.
    """

    tree: Any
    tensors: dict[str, torch.Tensor]

    @cached_property
    def text(self) -> str:
        """The tree as ASCII JSON; made when it is first asked for, which need not be on the training thread."""
        return json.dumps(self.tree, separators=(",", ":"), allow_nan=False, check_circular=False)


def encode(value: object, where: str) -> Encoded:
    """The value as a tree and tensors; `where` names it in errors and is the first part of the tensors' paths.

    Pure and quick (about 1 µs for each leaf), for the training thread. A `torch.nn.Parameter` comes back as a plain
    tensor; a DTensor is passed on as it is, and whoever stores it plans its pieces.
    Raises StateError with the path and the type of what cannot be saved, and what to do about it.
    """
    encoder = _Encoder(where)
    return Encoded(encoder.encode(value, None), encoder.tensors)


# Where the walk is: (what is around, key), None at the root. Made into a path only when a path is needed.
_At = tuple[Any, object] | None


@dataclass(slots=True)
class _Encoder:
    """One walk over one value. Methods that take a value return what `json` is to write for it."""

    where: str
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    around: set[int] = field(default_factory=set)  # ids of the containers that the walk is inside of
    hashed: int = 0  # how many keys and set elements the walk is inside of

    def encode(self, value: object, at: _At) -> Any:
        return _WRITERS.get(type(value), _unlisted)(self, value, at)

    def refusal(self, value: object, at: _At, what: str = "", todo: str = "") -> StateError:
        return StateError(f"{self.path(at)!r} cannot be saved: {what or type_name(value)}; {todo or advice(value)}")

    def path(self, at: _At) -> str:
        parts = []
        while at is not None:
            at, key = at
            parts.append(_component(key))
        return "/".join([self.where, *reversed(parts)])

    def enter(self, value: object, at: _At) -> None:
        if id(value) in self.around:
            raise self.refusal(
                value, at, f"this {type(value).__name__} contains itself", "take the inner reference out"
            )
        if len(self.around) >= _MAX_DEPTH:
            raise self.refusal(value, at, f"it lies more than {_MAX_DEPTH} containers deep", "make the state flatter")
        self.around.add(id(value))

    def leave(self, value: object) -> None:
        self.around.remove(id(value))

    def items(self, value: Iterable[object], at: _At) -> list[Any]:
        """The elements of a container, in order. Lists of many numbers or names are not walked one by one."""
        self.enter(value, at)
        written = list(value)
        if not _is_plain(written):
            writer = _WRITERS.get  # as in `encode`, without a call for each leaf
            written = [writer(type(item), _unlisted)(self, item, (at, index)) for index, item in enumerate(written)]
        self.leave(value)
        return written

    def pairs(self, value: Mapping[Any, object], at: _At) -> list[Any]:
        self.enter(value, at)
        written = [[self.key(key, at), self.encode(item, (at, key))] for key, item in value.items()]
        self.leave(value)
        return written

    def key(self, key: object, at: _At) -> Any:
        self.hashed += 1
        written = self.encode(key, (at, "(key)"))
        self.hashed -= 1
        return written

    def mapping(self, value: Any, at: _At) -> Any:
        if not _has_plain_keys(value):
            return {TAG: "dict", "items": self.pairs(value, at)}
        self.enter(value, at)
        writer = _WRITERS.get  # as in `encode`, without a call for each leaf
        written = {key: writer(type(item), _unlisted)(self, item, (at, key)) for key, item in value.items()}
        self.leave(value)
        return written

    def default_dict(self, value: Any, at: _At) -> Any:
        for name, factory in FACTORIES.items():
            if value.default_factory is factory:
                return {TAG: "defaultdict", "factory": name, "items": self.pairs(value, at)}
        what = f"a defaultdict whose factory is {type_name(value.default_factory)}"
        raise self.refusal(value, at, what, "make it a dict, or use one of int, float, str, list, dict, set")

    def a_set(self, value: Any, at: _At) -> Any:
        self.hashed += 1
        items = self.items(value, at)
        self.hashed -= 1
        return {TAG: type(value).__name__, "items": items}

    def hold(self, tensor: torch.Tensor, at: _At) -> str:
        """Put a tensor among the tensors; returns its path, made unlike all others (1 and "1" may both be keys)."""
        path = plain = self.path(at)
        number = 1
        while path in self.tensors:
            number += 1
            path = f"{plain}~{number}"
        self.tensors[path] = tensor
        return path

    def tensor(self, value: Any, at: _At) -> Any:
        if self.hashed:
            raise self.refusal(
                value, at, "a tensor that is a key or in a set", "it would not be found again: use its name"
            )
        if value.layout != torch.strided or value.is_nested:
            raise self.refusal(
                value, at, f"a tensor of layout {value.layout}", "save `tensor.to_dense()`, or its parts"
            )
        if value.device.type == "meta":
            raise self.refusal(value, at, "a tensor on the meta device", "it has no values yet: materialise it first")
        try:
            safetensors_dtype(value.dtype)
        except StateError as error:
            raise StateError(f"{self.path(at)!r}: {error}") from error
        # A lazy conjugate or negative is made real: its memory alone is another value.
        return {TAG: "tensor", "path": self.hold(value.resolve_conj().resolve_neg(), at)}

    def ndarray(self, value: Any, at: _At) -> Any:
        descr = self.descr(value, at)
        # torch takes no read-only memory: it could not keep the promise.
        flat = value if value.flags.c_contiguous and value.flags.writeable else value.copy(order="C")
        if value.dtype not in _DTYPES_OF_TORCH:
            flat = bytes_of(flat)
        return {TAG: "ndarray", "dtype": descr, "shape": value.shape, "path": self.hold(torch.from_numpy(flat), at)}

    def descr(self, value: Any, at: _At) -> Any:
        descr = _dtype_to_json(value.dtype)
        if descr is None:
            raise self.refusal(
                value, at, f"a numpy value of dtype {value.dtype!r}", "save it as a list, or in another dtype"
            )
        return descr

    def date_time(self, value: Any, at: _At) -> Any:
        zone: list[object] = []  # the arguments of datetime.timezone
        if value.tzinfo is not None:
            if type(value.tzinfo) is not datetime.timezone:
                what = f"a datetime whose time zone is {type_name(value.tzinfo)}"
                raise self.refusal(value, at, what, "convert it with `value.astimezone(datetime.timezone.utc)`")
            zone = [value.utcoffset()]
            if value.tzname() != datetime.timezone(value.utcoffset()).tzname(None):
                zone.append(value.tzname())
        iso = value.replace(tzinfo=None).isoformat()
        return {TAG: "datetime", "iso": iso, "fold": value.fold, "zone": self.items(zone, at)}


def _component(key: object) -> str:
    """A key as one part of a path: without "/", and in characters that any file can hold."""
    if type(key) is str:
        text = key
    elif isinstance(key, (int, float, complex, bytes, tuple, type(None))):
        text = repr(key)[:60]
    else:
        text = type(key).__name__
    return text.replace("~", "~0").replace("/", "~1").encode("utf-8", "backslashreplace").decode()


def _is_plain(items: list[Any]) -> bool:
    """Whether all are of one type and stand for themselves in JSON. At the speed of C, for lists of millions."""
    kinds = set(map(type, items))
    if len(kinds) > 1:
        return False
    if kinds == {int}:
        return bool(min(items) >= -_INT64 and max(items) < _INT64)
    if kinds == {float}:
        return all(map(math.isfinite, items))
    return kinds == {str} and all(map(str.isascii, items))


def _has_plain_keys(value: dict[Any, object]) -> bool:
    if not value:
        return True
    if set(map(type, value)) != {str} or TAG in value:
        return False
    return all(map(str.isascii, value)) or not any(map(_SURROGATE_PAIR.search, value))


def _is_dtensor(value: torch.Tensor) -> bool:
    # By name: importing torch.distributed.tensor costs a second that most programs never need.
    return type(value).__name__ == "DTensor" and type(value).__module__.startswith("torch.distributed.")


def _dtype_to_json(dtype: Any) -> Any:
    """numpy's own description of a dtype (as in .npy files); None if that does not give the same dtype back."""
    if dtype.hasobject or dtype.itemsize == 0 or dtype.isbuiltin == 2 or dtype.kind not in "?biufcSUVmM":
        return None
    if dtype.isbuiltin:
        return dtype.str
    descr = np.lib.format.dtype_to_descr(dtype)
    again = dtype_from_json(json.loads(json.dumps(descr)))
    return descr if again == dtype and again.type is dtype.type else None


def _base64(data: bytes | bytearray) -> str:
    return base64.b64encode(data).decode()


def _unlisted(encoder: _Encoder, value: Any, at: _At) -> Any:
    """What is recognised by more than its exact type; everything else is refused."""
    if isinstance(value, torch.Tensor) and _is_dtensor(value):
        return encoder.tensor(value, at)
    if isinstance(value, np.generic) and type(value) is value.dtype.type:
        return {TAG: "numpy", "dtype": encoder.descr(value, at), "base64": _base64(value.tobytes())}
    raise encoder.refusal(value, at)


def _itself(_: _Encoder, value: Any, at: _At) -> Any:
    return value


def _integer(_: _Encoder, value: Any, at: _At) -> Any:
    # Python refuses to read decimal integers of some thousands of digits; it has no such limit for hexadecimal.
    return value if -_INT64 <= value < _INT64 else {TAG: "int", "hex": hex(value)}


def _float(_: _Encoder, value: Any, at: _At) -> Any:
    if -math.inf < value < math.inf:
        return value
    bits = struct.pack(">d", value).hex()
    return {TAG: "float", "value": FLOATS.get(bits, bits)}


def _string(_: _Encoder, value: Any, at: _At) -> Any:
    if value.isascii() or not _SURROGATE_PAIR.search(value):
        return value
    return {TAG: "str", "hex": value.encode("utf-8", "surrogatepass").hex()}


def _members(name: str, /, **parts: Callable[[Any], object]) -> Callable[[_Encoder, Any, _At], Any]:
    """A writer of the tag `name`, whose members are got from the value by `parts` and encoded in their turn."""

    def write(encoder: _Encoder, value: Any, at: _At) -> Any:
        encoder.enter(value, at)
        members = {member: encoder.encode(get(value), (at, member)) for member, get in parts.items()}
        encoder.leave(value)
        return {TAG: name, **members}

    return write


_START_STOP_STEP: dict[str, Callable[[Any], object]] = {
    "start": lambda value: value.start,
    "stop": lambda value: value.stop,
    "step": lambda value: value.step,
}

_WRITERS: dict[type, Callable[[_Encoder, Any, _At], Any]] = {
    type(None): _itself,
    bool: _itself,
    int: _integer,
    float: _float,
    str: _string,
    complex: _members("complex", real=lambda value: value.real, imag=lambda value: value.imag),
    bytes: _members("bytes", base64=_base64),
    bytearray: _members("bytearray", base64=_base64),
    list: _Encoder.items,
    tuple: lambda encoder, value, at: {TAG: "tuple", "items": encoder.items(value, at)},
    torch.Size: lambda encoder, value, at: {TAG: "torch.Size", "items": encoder.items(value, at)},
    collections.deque: lambda encoder, value, at: {
        TAG: "deque",
        "maxlen": value.maxlen,
        "items": encoder.items(value, at),
    },
    set: _Encoder.a_set,
    frozenset: _Encoder.a_set,
    dict: _Encoder.mapping,
    collections.OrderedDict: lambda encoder, value, at: {TAG: "OrderedDict", "items": encoder.pairs(value, at)},
    collections.Counter: lambda encoder, value, at: {TAG: "Counter", "items": encoder.pairs(value, at)},
    collections.defaultdict: _Encoder.default_dict,
    range: _members("range", **_START_STOP_STEP),
    slice: _members("slice", **_START_STOP_STEP),
    types.SimpleNamespace: _members("SimpleNamespace", members=vars),
    datetime.date: _members("date", iso=lambda value: value.isoformat()),
    datetime.datetime: _Encoder.date_time,
    datetime.timedelta: _members(
        "timedelta",
        days=lambda value: value.days,
        seconds=lambda value: value.seconds,
        microseconds=lambda value: value.microseconds,
    ),
    **{kind: _members("path", kind=lambda value: type(value).__name__, path=str) for kind in PATHS.values()},
    torch.Tensor: _Encoder.tensor,
    torch.nn.Parameter: _Encoder.tensor,
    torch.dtype: _members("torch.dtype", name=dtype_name),
    torch.device: _members("torch.device", name=str),
    np.ndarray: _Encoder.ndarray,
    np.str_: _members("numpy.str", value=str),
    np.bytes_: _members("numpy.bytes", base64=_base64),
}
