"""Boxes of a source's tensors, in memory, row-major: the bytes needed, and hardly any besides, are read."""

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from resilient.checkpoint.catalog.catalog import Tensor
from resilient.checkpoint.catalog.meet import Part, parts_of
from resilient.checkpoint.catalog.table import UNITS
from resilient.checkpoint.formats.source import Source

_WASTE = 0.04  # of what is read, at most, may lie between the bytes that are wanted
_SMALL_BYTES = 16 << 10  # a part that spans no more is read as it lies
_TINY_BYTES = 512  # what is smaller, and ...
_NEAR_BYTES = 4096  # ... no further apart, is read with what lies between: so does every medium
_COPY_BYTES = 1 << 20
_MOST_BYTES = 8 << 20  # that are held besides the caller's box


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
    box: Any = np.frombuffer(into.cast("B"), dtype=UNITS[tensor.itemsize]).reshape(extent)
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
        if span > _MOST_BYTES:
            for some, where in _split(part):
                _fetch_part(source, some, target[where], itemsize)
            return
        flat = _read(source, part.file, part.offset, span)
        target[...] = _strided(flat, part.sizes, part.strides, itemsize)
        return
    _fetch_runs(source, part, target, itemsize)


def _split(part: Part) -> Iterator[tuple[Part, tuple[slice, ...]]]:
    """A large part as smaller ones, along its widest stride, and where each is in it."""
    dim = max((d for d, size in enumerate(part.sizes) if size > 1), key=lambda d: part.strides[d])
    rows = max(1, min(_MOST_BYTES // part.strides[dim], part.sizes[dim] // 2))
    for begin in range(0, part.sizes[dim], rows):
        count = min(rows, part.sizes[dim] - begin)
        some = Part(
            part.file,
            part.offset + begin * part.strides[dim],
            part.strides,
            part.offsets,
            tuple(count if d == dim else size for d, size in enumerate(part.sizes)),
        )
        yield some, tuple(slice(begin, begin + count) if d == dim else slice(None) for d in range(len(part.sizes)))


def _fetch_runs(source: Source, part: Part, target: Any, itemsize: int) -> None:
    """Piece by piece: the dimensions with the widest strides outside, and inside those whose elements lie together."""
    order = sorted((d for d, size in enumerate(part.sizes) if size > 1), key=lambda d: -part.strides[d])
    sizes, strides = [part.sizes[d] for d in order], [part.strides[d] for d in order]
    wide = [d for d, size in enumerate(part.sizes) if size > 1]
    view = target[tuple(slice(None) if size > 1 else 0 for size in part.sizes)]
    view = view.transpose([wide.index(d) for d in order])
    inner, span, nbytes = len(order), itemsize, itemsize
    while inner > 1:
        size, stride = sizes[inner - 1], strides[inner - 1]
        wider = span + (size - 1) * stride
        near = nbytes < _TINY_BYTES and stride <= _NEAR_BYTES and wider <= _COPY_BYTES
        if wider > nbytes * size * (1 + _WASTE) and not near:
            break
        inner, span, nbytes = inner - 1, wider, nbytes * size
    apart = strides[inner - 1]
    through = _COPY_BYTES if nbytes < _TINY_BYTES and apart <= _NEAR_BYTES else source.folder.gap_bytes
    together = 1 + through // apart
    for index in np.ndindex(*sizes[: inner - 1]):
        first = part.offset + sum(number * stride for number, stride in zip(index, strides, strict=False))
        blocks = view[index]
        if together > 1:
            _fetch_through(source, part.file, first, together, blocks, strides[inner - 1 :], span)
        else:
            _fetch_blocks(source, part.file, first, blocks, strides[inner - 1 :], span)


def _fetch_through(
    source: Source, file: int, first: int, together: int, blocks: Any, strides: list[int], span: int
) -> None:
    """So many blocks at once, and what lies between them: that is cheaper than to leave it out."""
    itemsize = blocks.itemsize
    for begin in range(0, len(blocks), together):
        some = blocks[begin : begin + together]
        flat = _read(source, file, first + begin * strides[0], (len(some) - 1) * strides[0] + span)
        some[...] = _strided(flat, some.shape, tuple(strides), itemsize)


def _fetch_blocks(source: Source, file: int, first: int, blocks: Any, strides: list[int], span: int) -> None:
    """Each block by itself, several of them to a copy."""
    at_once = max(1, _COPY_BYTES // span)
    for begin in range(0, len(blocks), at_once):
        some = blocks[begin : begin + at_once]
        direct = some.flags.c_contiguous and some.nbytes == len(some) * span
        flat: Any = some.reshape(-1).view(np.uint8) if direct else np.empty(len(some) * span, dtype=np.uint8)
        buffer = memoryview(flat)
        for number in range(len(some)):
            offset = first + (begin + number) * strides[0]
            source.read(file, offset, buffer[number * span : (number + 1) * span])
        if not direct:
            some[...] = _strided(flat, some.shape, (span, *strides[1:]), blocks.itemsize)


def _read(source: Source, file: int, offset: int, nbytes: int) -> Any:
    flat = np.empty(nbytes, dtype=np.uint8)
    source.read(file, offset, memoryview(flat.data))
    return flat


def _strided(flat: Any, sizes: tuple[int, ...], strides: tuple[int, ...], itemsize: int) -> Any:
    """Bytes as the array that lies in them."""
    whole = flat[: flat.nbytes // itemsize * itemsize].view(UNITS[itemsize])
    return np.lib.stride_tricks.as_strided(whole, shape=sizes, strides=strides, writeable=False)
