"""Where bytes lie: the address of a numpy array, a torch tensor, or anything with the buffer protocol; no copies.

Knows torch only by its methods: whoever has no tensors need not import it.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from resilient.ec.field import Bytes
from resilient.errors import UsageError


@dataclass(frozen=True, slots=True)
class Span:
    """Host memory. `keeper` keeps it there."""

    address: int
    nbytes: int
    keeper: object


def span_of(buffer: Any, *, writable: bool = False) -> Span:
    """The memory of a contiguous buffer. Raises UsageError for one on a device, with gaps, or read-only."""
    if hasattr(buffer, "data_ptr"):
        if buffer.device.type != "cpu" or not buffer.is_contiguous():
            raise UsageError(f"a shard must be contiguous and on the host: {tuple(buffer.shape)} on {buffer.device}")
        return Span(buffer.data_ptr(), buffer.nbytes, buffer)
    view = memoryview(buffer)
    if not view.c_contiguous or (writable and view.readonly):
        raise UsageError(f"a shard must be contiguous{' and writable' if writable else ''}: {type(buffer).__name__}")
    if not view.nbytes:
        return Span(0, 0, view)
    return Span(int(np.frombuffer(view, dtype=np.uint8).ctypes.data), view.nbytes, view)


def spans_of(buffers: Sequence[Any], count: int, what: str, *, writable: bool = False) -> list[Span]:
    """The memory of `count` buffers of one length. Raises UsageError."""
    spans = [span_of(buffer, writable=writable) for buffer in buffers]
    lengths = {span.nbytes for span in spans}
    if len(spans) != count or len(lengths) > 1:
        raise UsageError(f"{len(spans)} {what} shards of {sorted(lengths)} bytes: {count} of one length are needed")
    return spans


def bytes_at(address: int, count: int) -> Bytes:
    """Host memory as an array. The caller keeps the memory there."""
    return np.ctypeslib.as_array((ctypes.c_uint8 * count).from_address(address))
