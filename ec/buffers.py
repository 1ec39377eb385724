"""Where bytes lie: the address of a numpy array, a torch tensor, or anything with the buffer protocol; no copies.

Knows torch only by its methods: whoever has no tensors need not import it. Short on purpose: it runs before each block,
when the caches are full of the last one.
"""

import ctypes
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from resilient.ec.field import Bytes
from resilient.errors import UsageError


class Ranges(NamedTuple):
    """Host memory: `nbytes` from each of the addresses. `keepers` keep it there."""

    addresses: list[int]
    nbytes: int
    keepers: list[Any]


def ranges_of(buffers: Sequence[Any], count: int, what: str, *, writable: bool = False) -> Ranges:
    """The memory of `count` (at least 1) contiguous buffers of one length.

    Raises UsageError for other counts and lengths, and for a buffer on a device, with gaps, or read-only.
    """
    addresses, keepers, lengths = [], [], set()
    for buffer in buffers:
        if hasattr(buffer, "data_ptr"):
            if not buffer.is_cpu or not buffer.is_contiguous():
                raise UsageError(f"a shard must be contiguous and on the host: {tuple(buffer.shape)} {buffer.device}")
            addresses.append(buffer.data_ptr())
            keepers.append(buffer)
            lengths.add(buffer.nbytes)
        else:
            view = memoryview(buffer)
            addresses.append(_address(view, writable))
            keepers.append(view)
            lengths.add(view.nbytes)
    if len(addresses) != count or len(lengths) > 1:
        raise UsageError(f"{len(addresses)} {what} shards of {sorted(lengths)} bytes: {count} of one length are needed")
    return Ranges(addresses, lengths.pop(), keepers)


def _address(view: memoryview, writable: bool) -> int:
    if not view.c_contiguous or (writable and view.readonly):
        raise UsageError(f"a shard must be contiguous{' and writable' if writable else ''}: {type(view.obj).__name__}")
    if not view.nbytes:
        return 0
    if view.readonly:
        return int(np.frombuffer(view, dtype=np.uint8).ctypes.data)
    return ctypes.addressof(ctypes.c_char.from_buffer(view))  # six times as fast


def bytes_at(address: int, count: int) -> Bytes:
    """Host memory as an array. The caller keeps the memory there."""
    return np.ctypeslib.as_array((ctypes.c_uint8 * count).from_address(address))
