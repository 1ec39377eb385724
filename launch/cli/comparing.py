"""Two checkpoints of any formats, tensor by tensor, in chunks: what is only in one, and by how much the rest differs.

Tensors are matched by their names; optimizer state by parameter and key, for optimizers are called by many names
("optimizer", "optim"). Where ranks have tensors of their own in one checkpoint and in the other not, the first rank's
is compared. Values are compared as float64 (integers exactly), whatever their dtypes are.
"""

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from resilient.checkpoint.catalog.catalog import Catalog, Tensor
from resilient.checkpoint.dtypes import torch_dtype
from resilient.checkpoint.formats.fetch import boxes_of, fetch
from resilient.checkpoint.formats.source import Source

CHUNK_BYTES = 16 << 20
_TINY = 1e-38  # of two values that are both nearer to zero a relative difference says nothing


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """What differs of one tensor. `what`: "only in A", "only in B", "shape", "dtype" or "values".

    `elements`: how many differ. `most`: the largest |a - b|, `most_relative`: of |a - b| / max(|a|, |b|); infinite
    where one of them is no number. 0 where no values were compared.
    """

    name: str
    what: str
    detail: str = ""
    elements: int = 0
    most: float = 0.0
    most_relative: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Tolerance:
    """Values are the same within `absolute + relative * |b|`; a NaN is the same as a NaN, and -0 as 0."""

    absolute: float = 0.0
    relative: float = 0.0


@dataclass(frozen=True, slots=True)
class Pair:
    """What is compared under one name; None where a checkpoint has none such."""

    name: str
    a: Tensor | None
    b: Tensor | None


def pairs(a: Catalog, b: Catalog) -> list[Pair]:
    """The tensors of both, in the order of A, then what only B has. Pure."""
    both_own = {name for name in a.own.keys() & b.own.keys() if _differ(a, name) or _differ(b, name)}
    ones, others = _named(a, both_own), _named(b, both_own)
    found = [Pair(name, tensor, others.get(name)) for name, tensor in ones.items()]
    return found + [Pair(name, None, tensor) for name, tensor in others.items() if name not in ones]


def differences(
    a: Source, b: Source, compared: Sequence[Pair], tolerance: Tolerance, progress: Callable[[int], None]
) -> Iterator[Difference]:
    """Compare, reading both sources at once; `progress` is told the bytes of A. Raises what reading raises."""
    with ThreadPoolExecutor(2, thread_name_prefix="resilient-diff") as pool:
        for pair in compared:
            if pair.a is None or pair.b is None:
                yield Difference(name=pair.name, what="only in A" if pair.b is None else "only in B")
            elif pair.a.shape != pair.b.shape:
                detail = f"{list(pair.a.shape)} and {list(pair.b.shape)}"
                yield Difference(name=pair.name, what="shape", detail=detail)
            else:
                found = _values(a, b, pair.a, pair.b, tolerance, pool, progress)
                if found.elements or pair.a.dtype != pair.b.dtype:
                    yield _told(pair, found)


def _differ(catalog: Catalog, name: str) -> bool:
    """Whether ranks have different tensors of a name."""
    return len({id(tensor) for tensor in catalog.own[name].values()}) > 1


def _named(catalog: Catalog, own: Collection[str]) -> dict[str, Tensor]:
    """By the names that they are compared under; of those that ranks have for themselves each rank's."""
    optimizers = {tensor.item for tensor in catalog.of_kind("optimizer")}
    found: dict[str, Tensor] = {}
    for tensor in catalog.tensors.values():
        name = tensor.name
        if tensor.kind == "optimizer" and len(optimizers) == 1:
            name = f"state.{tensor.parameter}.{tensor.state}"
        if tensor.name in own:
            found |= {f"{name} of rank {rank}": one for rank, one in catalog.own[tensor.name].items()}
        else:
            found[name] = tensor
    return found


@dataclass(slots=True)
class _Sum:
    elements: int = 0
    most: float = 0.0
    most_relative: float = 0.0


def _told(pair: Pair, found: _Sum) -> Difference:
    assert pair.a is not None
    assert pair.b is not None
    same_dtype = pair.a.dtype == pair.b.dtype
    return Difference(
        name=pair.name,
        what="values" if same_dtype else "dtype",
        detail="" if same_dtype else f"{pair.a.dtype} and {pair.b.dtype}",
        elements=found.elements,
        most=found.most,
        most_relative=found.most_relative,
    )


def _values(
    a: Source,
    b: Source,
    one: Tensor,
    other: Tensor,
    tolerance: Tolerance,
    pool: ThreadPoolExecutor,
    progress: Callable[[int], None],
) -> _Sum:
    found = _Sum()
    for offsets, sizes in boxes_of(one.shape, max(one.itemsize, other.itemsize), CHUNK_BYTES):
        reading = pool.submit(_read, a, one, offsets, sizes), pool.submit(_read, b, other, offsets, sizes)
        mine, theirs = (part.result() for part in reading)
        progress(mine.nbytes)
        if one.dtype == other.dtype and bytes_equal(mine, theirs):
            continue
        _add(found, mine, theirs, tolerance)
    return found


def _read(source: Source, tensor: Tensor, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> torch.Tensor:
    dtype = torch_dtype(tensor.dtype)
    box = torch.empty(sizes, dtype=dtype)
    if box.numel():
        fetch(source, tensor, memoryview(box.reshape(-1).view(torch.uint8).numpy().data), offsets, sizes)
    return box


def bytes_equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether all bits are the same; NaNs too."""
    return torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))


def _add(found: _Sum, one: torch.Tensor, other: torch.Tensor, tolerance: Tolerance) -> None:
    if not (one.is_floating_point() or one.is_complex() or other.is_floating_point() or other.is_complex()):
        _add_numbers(found, one.reshape(-1), other.reshape(-1), tolerance)
        return
    complexes = one.is_complex() or other.is_complex()
    wide = torch.complex128 if complexes else torch.float64
    _add_numbers(found, _widened(one, wide).reshape(-1), _widened(other, wide).reshape(-1), tolerance)


def _widened(tensor: torch.Tensor, wide: torch.dtype) -> torch.Tensor:
    """Packed dtypes, whose values torch cannot convert, by their bytes."""
    if tensor.dtype == getattr(torch, "float4_e2m1fn_x2", None):
        tensor = tensor.view(torch.uint8)
    return tensor.to(wide)


def _add_numbers(found: _Sum, one: torch.Tensor, other: torch.Tensor, tolerance: Tolerance) -> None:
    both_nan = torch.zeros_like(one, dtype=torch.bool)
    if one.is_floating_point() or one.is_complex():
        both_nan = torch.isnan(one) & torch.isnan(other)
    differ = (one != other) & ~both_nan
    if not differ.any():
        return
    x, y = one[differ].to(_wide(one)), other[differ].to(_wide(other))
    apart, size = (x - y).abs(), torch.maximum(x.abs(), y.abs())
    apart = torch.where(torch.isnan(apart), torch.inf, apart)
    beyond = apart > tolerance.absolute + tolerance.relative * y.abs().nan_to_num(0.0)
    if tolerance == Tolerance():
        beyond = torch.ones_like(beyond)  # integers that float64 does not tell apart, too
    if not beyond.any():
        return
    relative = torch.where(torch.isinf(apart), torch.inf, apart / size.clamp_min(_TINY))
    found.elements += int(beyond.sum())
    found.most = max(found.most, float(apart[beyond].max()))
    found.most_relative = max(found.most_relative, float(relative[beyond].max()))


def _wide(tensor: torch.Tensor) -> torch.dtype:
    return torch.complex128 if tensor.is_complex() else torch.float64


def as_json(found: Difference) -> Mapping[str, Any]:
    return {
        "name": found.name,
        "what": found.what,
        "detail": found.detail or None,
        "elements": found.elements,
        "max_difference": _in_json(found.most),
        "max_relative_difference": _in_json(found.most_relative),
    }


def _in_json(value: float) -> float | str:
    """JSON has no infinity."""
    return value if math.isfinite(value) else "infinity"
