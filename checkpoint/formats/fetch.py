"""Boxes of a source's tensors, in memory, row-major: the bytes needed, and hardly any besides, are read."""

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from resilient.checkpoint.catalog.catalog import Tensor
from resilient.checkpoint.catalog.meet import Part, parts_of
from resilient.checkpoint.formats.source import Source

_WASTE = 0.04  # of what is read, at most, may lie between the bytes that are wanted
_SMALL_BYTES = 16 << 10  # a part that spans no more is read as it lies
_UNITS: dict[int, Any] = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64, 16: np.complex128}


def fetch(
    source: Source,
    tensor: Tensor,
    into: memoryview,
    offsets: Sequence[int] | None = None,
    sizes: Sequence[int] | None = None,
) -> None:
    """Fill `into` with a box of a tensor (all of it when not given), row-major, in the tensor's dtype.

    Raises ValueError for a buffer of another size and for a box outside, and what reading raises.
    """
    begin = tuple(offsets) if offsets is not None else (0,) * len(tensor.shape)
    extent = tuple(sizes) if sizes is not None else tensor.shape
    if into.nbytes != math.prod(extent) * tensor.itemsize:
        raise ValueError(f"{into.nbytes} bytes for a box of {extent} of {tensor.name!r} ({tensor.dtype})")
    box: Any = np.frombuffer(into.cast("B"), dtype=_UNITS[tensor.itemsize]).reshape(extent)
    for part in parts_of(tensor, begin, extent):
        at = tuple(slice(a - b, a - b + n) for a, b, n in zip(part.offsets, begin, part.sizes, strict=True))
        _fetch_part(source, part, box[(..., *at)], tensor.itemsize)  # with `...` it is a view, also of no dimensions


def boxes_of(
    shape: tuple[int, ...], itemsize: int, most_bytes: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """A tensor as boxes (offsets, sizes) of at most so many bytes, or one element, in the order of their bytes."""
    if math.prod(shape) * itemsize <= most_bytes or not shape:
        yield (0,) * len(shape), shape
        return
    row_bytes = math.prod(shape[1:]) * itemsize
    if row_bytes > most_bytes:
        for number in range(shape[0]):
            for at, size in boxes_of(shape[1:], itemsize, most_bytes):
                yield (number, *at), (1, *size)
        return
    rows = max(1, most_bytes // row_bytes)
    for begin, end in pairwise([*range(0, shape[0], rows), shape[0]]):
        yield (begin,) + (0,) * (len(shape) - 1), (end - begin, *shape[1:])


def _fetch_part(source: Source, part: Part, target: Any, itemsize: int) -> None:
    """Fill `target`, a view of the caller's box, with a part."""
    if part.strides_are_row_major(itemsize) and target.flags.c_contiguous:
        source.read(part.file, part.offset, memoryview(target.reshape(-1).view(np.uint8)))
        return
    nbytes, span = part.numel * itemsize, part.span_bytes(itemsize)
    if span <= max(_SMALL_BYTES, nbytes * (1 + _WASTE)) or min(part.strides, default=1) <= 0:
        flat = _read(source, part.file, part.offset, span)
        target[...] = _strided(flat, part.sizes, part.strides, itemsize)
        return
    _fetch_runs(source, part, target, itemsize)


def _fetch_runs(source: Source, part: Part, target: Any, itemsize: int) -> None:
    """Along the dimension with the widest stride, each slice by itself: what lies between is not wanted."""
    dim = max((d for d, size in enumerate(part.sizes) if size > 1), key=lambda d: part.strides[d])
    inner = _without(part, dim, 0)
    apart = part.strides[dim] - inner.span_bytes(itemsize)
    together = max(1, min(part.sizes[dim], 1 + source.folder.gap_bytes // max(1, part.strides[dim])))
    if apart <= 0 or together == 1:
        for number in range(part.sizes[dim]):
            _fetch_part(source, _without(part, dim, number), _slice(target, dim, number), itemsize)
        return
    for begin in range(0, part.sizes[dim], together):
        count = min(together, part.sizes[dim] - begin)
        some = Part(
            part.file,
            part.offset + begin * part.strides[dim],
            part.strides,
            part.offsets,
            tuple(count if d == dim else size for d, size in enumerate(part.sizes)),
        )
        flat = _read(source, some.file, some.offset, some.span_bytes(itemsize))
        at = tuple(slice(begin, begin + count) if d == dim else slice(None) for d in range(len(part.sizes)))
        target[at] = _strided(flat, some.sizes, some.strides, itemsize)


def _without(part: Part, dim: int, number: int) -> Part:
    return Part(
        part.file,
        part.offset + number * part.strides[dim],
        part.strides,
        part.offsets,
        tuple(1 if d == dim else size for d, size in enumerate(part.sizes)),
    )


def _slice(target: Any, dim: int, number: int) -> Any:
    return target[tuple(slice(number, number + 1) if d == dim else slice(None) for d in range(target.ndim))]


def _read(source: Source, file: int, offset: int, nbytes: int) -> Any:
    flat = np.empty(nbytes, dtype=np.uint8)
    source.read(file, offset, memoryview(flat.data))
    return flat


def _strided(flat: Any, sizes: tuple[int, ...], strides: tuple[int, ...], itemsize: int) -> Any:
    """Bytes as the array that lies in them."""
    whole = flat[: flat.nbytes // itemsize * itemsize].view(_UNITS[itemsize])
    return np.lib.stride_tricks.as_strided(whole, shape=sizes, strides=strides, writeable=False)
