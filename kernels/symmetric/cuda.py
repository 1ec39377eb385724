"""Symmetric memory on CUDA: torch's, whose allocations the ranks' GPUs map over NVLink.

Thin: buffers, signals and waits are torch's. The pad of our kernels lies in the allocation itself, before the buffer,
because torch's own barriers use its pad. Torch refuses two ranks on one GPU unless the environment has
TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES=1, which tests set and which is of no use otherwise.
"""

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as torch_symmetric
from torch import Tensor

from resilient.errors import CollectiveFailed, OverBudget, UsageError
from resilient.kernels.symmetric.peers import Store, await_outcomes, meet_on_devices, outcome_told

_WORD_BYTES = 4
_ALIGN_BYTES = 4096


def open_cuda(
    store: Store,
    group: dist.ProcessGroup,
    device: torch.device,
    *,
    name: str,
    buffer_bytes: int,
    signal_words: int,
    timeout_s: float,
    waiting: Callable[[], None],
) -> "CudaMemory":
    """As `open_symmetric`. Ranks meet in the group's store before anything is done on a device.

    Raises UsageError when torch cannot share memory among these ranks.
    """
    pad_bytes = -(-signal_words * _WORD_BYTES // _ALIGN_BYTES) * _ALIGN_BYTES
    rank, size = group.rank(), group.size()
    sizes = (buffer_bytes, signal_words)
    meet_on_devices(store, rank, size, name=name, sizes=sizes, timeout_s=timeout_s, waiting=waiting)
    with outcome_told(store, rank, name):  # in torch's rendezvous the others would wait for who has no room
        whole = _allocated(pad_bytes + buffer_bytes, device)
    await_outcomes(store, size, name=name, timeout_s=timeout_s, waiting=waiting)
    memory = CudaMemory(_met(whole, group, name), whole, pad_bytes, buffer_bytes, signal_words)
    memory.barrier(0, timeout_s)  # no rank writes before all pads are zero
    return memory


def _allocated(nbytes: int, device: torch.device) -> Tensor:
    try:
        whole: Tensor = torch_symmetric.empty(nbytes, dtype=torch.uint8, device=device)
    except torch.OutOfMemoryError as error:
        raise OverBudget(
            f"{device} has no room for {nbytes} bytes of symmetric memory; use smaller operands"
        ) from error
    except RuntimeError as error:
        raise UsageError(
            f"torch has no symmetric memory on {device} ({error}); use the operations without fusion"
        ) from error
    return whole.zero_()


def _met(whole: Tensor, group: dist.ProcessGroup, name: str) -> Any:
    try:
        return torch_symmetric.rendezvous(whole, group)
    except dist.DistError as error:  # the store's or a backend's: it says nothing about the GPUs
        raise CollectiveFailed(
            f"the ranks did not exchange their handles of symmetric memory {name!r}: {error}"
        ) from error
    except RuntimeError as error:
        raise UsageError(
            f"the GPUs of this group cannot share memory ({error}); use the operations without fusion"
        ) from error


class CudaMemory:
    """See SymmetricMemory. Waits are put on the current stream."""

    def __init__(self, handle: Any, whole: Tensor, pad_bytes: int, buffer_bytes: int, signal_words: int) -> None:
        self._handle: Any = handle
        self._whole, self._pad_bytes = whole, pad_bytes
        self.rank: int = handle.rank
        self.size: int = handle.world_size
        self.device = whole.device
        self.buffer_bytes, self.signal_words = buffer_bytes, signal_words
        addresses = [self._bytes(rank).data_ptr() for rank in range(self.size)]
        self.signal_addresses = torch.tensor(addresses, dtype=torch.int64, device=self.device)
        self.buffer_addresses = self.signal_addresses + pad_bytes

    def get_buffer(self, rank: int, shape: Sequence[int], dtype: torch.dtype, offset_bytes: int = 0) -> Tensor:
        nbytes = prod(shape) * dtype.itemsize
        if offset_bytes < 0 or offset_bytes + nbytes > self.buffer_bytes or offset_bytes % dtype.itemsize:
            raise UsageError(
                f"{nbytes} bytes at {offset_bytes} do not lie in a buffer of {self.buffer_bytes}, "
                f"aligned to {dtype.itemsize}"
            )
        begin = self._pad_bytes + offset_bytes
        return self._bytes(rank)[begin : begin + nbytes].view(dtype).view(*shape)

    def get_signals(self, rank: int) -> Tensor:
        return self._bytes(rank)[: self.signal_words * _WORD_BYTES].view(torch.int32)

    def put_signal(self, rank: int, channel: int = 0, timeout_s: float = 30.0) -> None:
        self._handle.put_signal(rank, channel, int(timeout_s * 1000))

    def wait_signal(self, rank: int, channel: int = 0, timeout_s: float = 30.0) -> None:
        self._handle.wait_signal(rank, channel, int(timeout_s * 1000))

    def barrier(self, channel: int = 0, timeout_s: float = 30.0) -> None:
        self._handle.barrier(channel, int(timeout_s * 1000))

    def begin_call(self, number: int) -> None:
        """Nothing: nobody notices an end here but by the timeout."""

    def end_call(self, number: int) -> None:
        """As `begin_call`."""

    def close(self) -> None:
        torch.cuda.synchronize(self.device)  # no kernel of this rank is on its way to the others any more

    def _bytes(self, rank: int) -> Tensor:
        if rank == self.rank:
            return self._whole
        found: Tensor = self._handle.get_buffer(rank, [len(self._whole)], torch.uint8)
        return found
