"""Objects as `torch.load(weights_only=True)` takes them: plain Python values, tensors, and a few of torch's own.

Values are made anew, so that the same ones always make the same pickle. The table is closed; what is not in it is
refused with its path.
"""

import _codecs
import collections
import datetime
import pathlib
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from resilient.checkpoint.formats.output import TensorBytes
from resilient.errors import UsageError

__all__ = ["SortedSet", "plain"]

_MOST_DEPTH = 200
_MOST_VALUES = 20_000_000
_KEPT = (type(None), bool, int, float, complex, bytearray, TensorBytes, torch.dtype, torch.device, torch.Size)


class SortedSet:
    """A set that is pickled in one order, whatever the hash seed."""

    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def __reduce__(self) -> Any:
        return set, (self.items,)


class EmptyBytes:
    """Empty bytes, pickled as others are: protocol 2 calls `bytes` for them alone, which the reader refuses."""

    def __reduce__(self) -> Any:
        return _codecs.encode, ("", "latin1")


def plain(tree: Any) -> Any:
    """The tree without what torch's restricted reader refuses.

    numpy arrays become tensors, numpy numbers Python's; paths, dates and times text, namespaces and kinds of dict
    dicts, deques and ranges lists. Raises UsageError with the path of anything else.
    """
    return _Plain().of(tree, ())


class _Plain:
    def __init__(self) -> None:
        self.texts: dict[str, str] = {}
        self.tensors: dict[int, torch.Tensor] = {}
        self.left = _MOST_VALUES

    def of(self, value: Any, path: tuple[Any, ...]) -> Any:
        if len(path) > _MOST_DEPTH:
            raise UsageError(f"{_dotted(path[:9])}...: nested more than {_MOST_DEPTH} deep, or containing itself")
        self.left -= 1
        if self.left < 0:
            raise UsageError(f"more than {_MOST_VALUES} values; is it a tree whose branches are all the same one?")
        kind = type(value)
        if kind is str:
            return self.texts.setdefault(value, value)
        if kind in _KEPT:
            return value
        if isinstance(value, torch.Tensor):
            return self._tensor(value, path)
        for kinds, make in _TABLE:
            if isinstance(value, kinds):
                return make(self, value, path)
        raise UsageError(
            f"{_dotted(path)} is a {kind.__module__}.{kind.__qualname__}, which torch.load(weights_only=True) would "
            "refuse; leave it out (--select), or convert to a format that keeps it (--to native)"
        )

    def items(self, values: Any, path: tuple[Any, ...]) -> list[Any]:
        return [self.of(value, (*path, number)) for number, value in enumerate(values)]

    def pairs(self, value: Any, path: tuple[Any, ...]) -> dict[Any, Any]:
        return {self.of(key, (*path, "key")): self.of(item, (*path, key)) for key, item in dict.items(value)}

    def _tensor(self, value: torch.Tensor, path: tuple[Any, ...]) -> torch.Tensor:
        if value.layout is not torch.strided or value.is_quantized:
            raise UsageError(f"{_dotted(path)} is a tensor of layout {value.layout}, dtype {value.dtype}: not written")
        return self.tensors.setdefault(id(value), value.detach().cpu())


def _dotted(path: tuple[Any, ...]) -> str:
    return ".".join(map(str, path)) or "the tree"


def _numpy_number(plainer: _Plain, value: Any, path: tuple[Any, ...]) -> Any:
    return plainer.of(value.item(), path)


def _array(_: _Plain, value: Any, path: tuple[Any, ...]) -> Any:
    if value.dtype.kind not in "biufc":
        raise UsageError(f"{_dotted(path)} is a numpy array of {value.dtype}, which no tensor can hold")
    return torch.from_numpy(np.array(value, dtype=value.dtype.newbyteorder("="), order="C"))


def _ordered(plainer: _Plain, value: Any, path: tuple[Any, ...]) -> Any:
    made = collections.OrderedDict(plainer.pairs(value, path))
    metadata = getattr(value, "_metadata", None)
    if metadata is not None:  # of a module's state dict: the versions of its parts
        made._metadata = plainer.of(metadata, (*path, "_metadata"))  # type: ignore[attr-defined]
    return made


def _set(plainer: _Plain, value: Any, path: tuple[Any, ...]) -> SortedSet:
    return SortedSet(sorted(plainer.items(value, path), key=lambda item: (type(item).__name__, repr(item))))


_TABLE: tuple[tuple[Any, Callable[[_Plain, Any, tuple[Any, ...]], Any]], ...] = (
    (bytes, lambda plainer, value, path: bytes(value) or EmptyBytes()),
    (np.generic, _numpy_number),
    (np.ndarray, _array),
    (collections.OrderedDict, _ordered),
    (dict, _Plain.pairs),
    (tuple, lambda plainer, value, path: tuple(plainer.items(value, path))),
    ((list, collections.deque, range), _Plain.items),
    ((set, frozenset), _set),
    (types.SimpleNamespace, lambda plainer, value, path: plainer.pairs(vars(value), path)),
    ((pathlib.PurePath, datetime.date, datetime.time, datetime.timedelta), lambda plainer, value, path: str(value)),
    (str, lambda plainer, value, path: str(value)),
)
