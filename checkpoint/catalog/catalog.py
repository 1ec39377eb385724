"""The universal description of a checkpoint: its tensors by name, and where the bytes of each piece are.

Whoever wrote it, the names are these: a parameter or buffer is `<item>.<FQN>`, such as `model.layers.0.weight`; the
state of an optimizer is `<item>.state.<parameter>.<state>`, such as `optimizer.state.model.layers.0.weight.exp_avg`;
master weights are the state `fp32`. What is no tensor (schedulers, counters) the source has (`formats/source.py`).
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import numpy as np

from resilient.checkpoint.catalog.table import PieceTable, within
from resilient.errors import DamagedImage, NewerFormat

VERSION = 1
MOST_ELEMENTS = 1 << 60
Kind = Literal["parameter", "buffer", "transient", "optimizer", "tensor"]
ITEMSIZES = {
    **dict.fromkeys(("complex128",), 16),
    **dict.fromkeys(("float64", "int64", "uint64", "complex64"), 8),
    **dict.fromkeys(("float32", "int32", "uint32", "complex32"), 4),
    **dict.fromkeys(("float16", "bfloat16", "int16", "uint16"), 2),
    **dict.fromkeys(("int8", "uint8", "bool", "float4_e2m1fn_x2"), 1),
    **dict.fromkeys(("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"), 1),
}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Tensor:
    """One global tensor. `dtype` is torch's name without the prefix ("bfloat16").

    The pieces are disjoint and cover it (`problem`): of replicas a reader takes one. For optimizer state `parameter` is
    the full name of the parameter and `state` the key in its state.
    """

    name: str
    kind: Kind
    dtype: str
    shape: tuple[int, ...]
    pieces: PieceTable
    item: str = "model"
    parameter: str = ""
    state: str = ""

    @property
    def fqn(self) -> str:
        """The name of a parameter or buffer in its module."""
        return self.name.removeprefix(f"{self.item}.")

    @property
    def itemsize(self) -> int:
        return ITEMSIZES[self.dtype]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.itemsize

    def problem(self, *, partly: bool = False) -> str | None:
        """Why it is no tensor, or the pieces are not it; None where all is well. `partly`: more pieces may come."""
        if not isinstance(self.name, str) or self.kind not in get_args(Kind) or self.dtype not in ITEMSIZES:
            return f"tensor {self.name!r} is of a kind or dtype that is not known: {self.kind!r}, {self.dtype!r}"
        if any(type(size) is not int for size in self.shape):
            return f"tensor {self.name!r} has the shape {self.shape}"
        table, where = self.pieces, f"tensor {self.name!r} of shape {self.shape}"
        if table.dims != len(self.shape):
            return f"{where}: its pieces have {table.dims} dimensions"
        if any(size < 0 for size in self.shape) or self.numel > MOST_ELEMENTS:
            return f"{where}: there is no such shape"
        if not partly and table.numel != self.numel:
            return f"{where}: its pieces have {table.numel} of {self.numel} elements"
        rows, shape = table.corners, np.array([self.shape], dtype=np.int64)
        return None if within(rows, shape, table.dims) else f"{where}: a piece of it lies outside, or is none"


@dataclass(frozen=True, slots=True)
class File:
    """One file of a checkpoint, relative to its folder, and how long it is.

    `begins`: where its data starts, if offsets of pieces are counted from there; its source adds it.
    """

    name: str
    nbytes: int
    begins: int = 0


@dataclass(slots=True, kw_only=True)
class Catalog:
    """All of a checkpoint but its bytes. Tensors are in the order of the source, which sinks keep.

    `aliases`: the second name of a tied tensor → its first. `own`: where ranks hold different tensors of one name
    (buffers of data-parallel replicas, modules of a rank alone), those of every rank; `tensors` has the first's.
    `groups`: of each optimizer (by item) its parameter groups, each a dict of hyperparameters whose "params" are full
    names. `step` None: unknown. `world_size` 0: not from ranks.
    """

    format: str
    files: list[File] = field(default_factory=list)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    own: dict[str, Mapping[int, Tensor]] = field(default_factory=dict)
    groups: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    step: int | None = None
    world_size: int = 0
    notes: list[str] = field(default_factory=list)

    def add(self, tensor: Tensor) -> None:
        """Raises DamagedImage for a second tensor of the name, and for pieces that are not the tensor."""
        if tensor.name in self.tensors:
            raise DamagedImage(f"two tensors of the checkpoint are called {tensor.name!r}")
        problem = tensor.problem()
        if problem is not None:
            raise DamagedImage(problem)
        self.tensors[tensor.name] = tensor

    def of_kind(self, *kinds: Kind) -> list[Tensor]:
        return [tensor for tensor in self.tensors.values() if tensor.kind in kinds]

    def states_of(self, parameter: str) -> dict[str, Tensor]:
        """The optimizer state of a parameter (its full name), by key."""
        return self.all_states().get(parameter, {})

    def all_states(self) -> dict[str, dict[str, Tensor]]:
        """The optimizer state of all parameters: what to use where more than a few are asked for."""
        found: dict[str, dict[str, Tensor]] = {}
        for tensor in self.of_kind("optimizer"):
            found.setdefault(tensor.parameter, {})[tensor.state] = tensor
        return found

    def only(self, names: Iterable[str]) -> "Catalog":
        """The same checkpoint with these tensors alone, and the aliases of them."""
        wanted = set(names)
        return replace(
            self,
            tensors={name: tensor for name, tensor in self.tensors.items() if name in wanted},
            aliases={name: first for name, first in self.aliases.items() if first in wanted},
            own={name: tensors for name, tensors in self.own.items() if name in wanted},
        )

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def text(self) -> str:
        """As JSON. Regular partitions are stored as lattices (`table.py`), so thousands of ranks cost no more."""
        raw = {
            "format": "resilient.tensors",
            "version": VERSION,
            "source": self.format,
            "step": self.step,
            "world_size": self.world_size,
            "files": [[file.name, file.nbytes] for file in self.files],
            "tensors": [_tensor_json(tensor) for tensor in self.tensors.values()],
            "aliases": self.aliases,
            "own": {
                name: {str(rank): _tensor_json(tensor) for rank, tensor in ranks.items()}
                for name, ranks in self.own.items()
            },
            "groups": self.groups,
            "notes": self.notes,
        }
        return json.dumps(raw, separators=(",", ":")) + "\n"


def parse_catalog(text: str | bytes, where: str) -> Catalog:
    """What `Catalog.text` gave. Raises DamagedImage, NewerFormat."""
    try:
        raw = json.loads(text, object_pairs_hook=_without_twice)
        if raw["format"] != "resilient.tensors":
            raise ValueError("it is no catalog")
        if raw["version"] != VERSION:
            raise NewerFormat(f"{where} has catalog version {raw['version']}; this library reads {VERSION}: upgrade it")
        catalog = Catalog(
            format=raw["source"],
            files=[_file_of(*file) for file in raw["files"]],
            aliases=raw["aliases"],
            groups=raw["groups"],
            step=raw["step"],
            world_size=raw["world_size"],
            notes=raw["notes"],
        )
        for one in raw["tensors"]:
            catalog.add(_tensor_of(one, len(catalog.files)))
        for name, ranks in raw["own"].items():
            own = {int(rank): _tensor_of(one, len(catalog.files)) for rank, one in ranks.items()}
            catalog.own[name] = own
            for problem in filter(None, (tensor.problem() for tensor in own.values())):
                raise DamagedImage(problem)
    except (ValueError, KeyError, TypeError, IndexError, OverflowError, RecursionError) as error:
        raise DamagedImage(f"{where} is no whole catalog ({type(error).__name__}: {error})") from error
    return catalog


def _without_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} twice")
    return found


def _file_of(name: Any, nbytes: Any) -> File:
    if not isinstance(name, str) or not name or name.startswith("/") or ".." in name.split("/") or "\0" in name:
        raise ValueError(f"{name!r} is no name of a file within the checkpoint")
    if type(nbytes) is not int or nbytes < 0:
        raise ValueError(f"file {name!r} has {nbytes!r} bytes")
    return File(name, nbytes)


def _tensor_json(tensor: Tensor) -> dict[str, Any]:
    raw: dict[str, Any] = {
        "name": tensor.name,
        "kind": tensor.kind,
        "dtype": tensor.dtype,
        "shape": list(tensor.shape),
        "item": tensor.item,
        "pieces": tensor.pieces.to_json(),
    }
    if tensor.kind == "optimizer":
        raw |= {"parameter": tensor.parameter, "state": tensor.state}
    return raw


def _tensor_of(raw: Mapping[str, Any], files: int) -> Tensor:
    """Raises ValueError and its like for what is no tensor, DamagedImage for files that are not there."""
    shape, name = tuple(raw["shape"]), raw["name"]
    texts = [name, raw["item"], raw.get("parameter", ""), raw.get("state", "")]
    if not name or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"a tensor is called {texts}")
    if raw["kind"] not in get_args(Kind) or raw["dtype"] not in ITEMSIZES:
        raise ValueError(f"{name!r} is a {raw['kind']!r} of {raw['dtype']!r}")
    if not all(type(size) is int for size in shape):
        raise ValueError(f"{name!r} has the shape {shape}")
    tensor = Tensor(
        name=name,
        kind=raw["kind"],
        dtype=raw["dtype"],
        shape=shape,
        item=raw["item"],
        pieces=PieceTable.from_json(len(shape), raw["pieces"]),
        parameter=raw.get("parameter", ""),
        state=raw.get("state", ""),
    )
    if tensor.pieces.last_file >= files:
        raise DamagedImage(f"a piece of {name!r} is in a file that the checkpoint has not")
    return tensor
