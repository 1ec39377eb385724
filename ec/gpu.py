"""Parity made where the state is: encode and decode of shards on a GPU, before their bytes leave it.

The same bytes as `codec.Codec`, which works on host memory. On CUDA by a Triton kernel (`gpu_kernel.py`) where Triton
is installed, as it is with torch for CUDA; else by plain torch operations, which also serve as the kernel's reference.
The only module here that imports torch; nothing that the agent loads may import it.
"""

import importlib
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from resilient.ec.field import Bytes
from resilient.ec.matrix import parity_matrix, recovery
from resilient.errors import UsageError

_HOST_CHUNK_BYTES = 256 << 10  # plain torch on a CPU: what is worked on stays in the cache


class DeviceCodec:
    """Reed-Solomon over contiguous tensors of one device and one length in bytes. Any thread.

    On CUDA the work is put on the current stream and nothing waits for it: the tensors must stay as they are until the
    stream is there. `plain` forbids the kernel.
    """

    def __init__(self, k: int, m: int, *, plain: bool = False) -> None:
        self.k, self.m = k, m
        self._plain = plain
        self._parity = parity_matrix(k, m)

    def encode(self, data: Sequence[Tensor], parity: Sequence[Tensor]) -> None:
        """Fill the m parity shards from the k data shards. Raises UsageError for tensors that are no shards."""
        if len(data) != self.k or len(parity) != self.m:
            raise UsageError(f"{len(data)} data and {len(parity)} parity shards: {self.k} and {self.m} are needed")
        self._combine(self._parity, data, parity)

    def decode(self, present: Mapping[int, Tensor], missing: Mapping[int, Tensor]) -> None:
        """Fill the missing shards, by number (data, then parity), from at least k that are there.

        Raises RestoreError when fewer are there.
        """
        if not missing:
            return
        plan = recovery(self._parity, present, list(missing))
        self._combine(plan.coefficients, [present[number] for number in plan.sources], list(missing.values()))

    def _combine(self, coefficients: Bytes, sources: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
        from_bytes, to_bytes = _shards([*sources], [*targets])
        kernel = None if self._plain else _kernel_for([*from_bytes, *to_bytes])
        if kernel is None:
            combine_plain(coefficients, from_bytes, to_bytes)
        else:
            combine_by(kernel, coefficients, from_bytes, to_bytes)


def combine_plain(coefficients: Bytes, sources: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
    """targets[i] = XOR over j of coefficients[i, j] * sources[j], on flat uint8 tensors of any device.

    Horner's scheme over the coefficients' bits, from the highest: seven doublings a target.
    """
    nbytes = len(targets[0])
    step = nbytes if targets[0].is_cuda else _HOST_CHUNK_BYTES
    for begin in range(0, nbytes, max(step, 1)):
        parts = [source[begin : begin + step] for source in sources]
        for row, target in zip(coefficients, targets, strict=True):
            _combine_row(row, parts, target[begin : begin + step])


def _combine_row(row: Bytes, parts: Sequence[Tensor], target: Tensor) -> None:
    target.zero_()
    for bit in reversed(range(int(row.max()).bit_length())):
        carry = (target >> 7).mul_(0x1D)
        target.bitwise_left_shift_(1).bitwise_xor_(carry)
        for coefficient, part in zip(row, parts, strict=True):
            if coefficient >> bit & 1:
                target.bitwise_xor_(part)


def combine_by(kernel: Any, coefficients: Bytes, sources: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
    """The same by `gpu_kernel`; bytes after the last whole word by plain torch. All addresses must be aligned."""
    rows, columns = coefficients.shape
    nbytes = len(targets[0])
    words, device = nbytes // kernel.WORD_BYTES, targets[0].device
    if words:
        padded = torch.zeros((-(-rows // kernel.TARGETS) * kernel.TARGETS, columns), dtype=torch.uint8)
        padded[:rows] = torch.from_numpy(coefficients.copy())
        addresses = torch.tensor([one.data_ptr() for one in chain(sources, targets)], dtype=torch.int64)
        kernel.launch(_on(device, addresses), _on(device, padded), rows, words)
    rest = slice(words * kernel.WORD_BYTES, nbytes)
    if rest.start < nbytes:
        combine_plain(coefficients, [one[rest] for one in sources], [one[rest] for one in targets])


def _on(device: torch.device, tensor: Tensor) -> Tensor:
    """On the device, in the order of the stream; the host does not wait."""
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def _shards(sources: Sequence[Tensor], targets: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    every = [*sources, *targets]
    lengths, devices = {one.nbytes for one in every}, {one.device for one in every}
    if len(lengths) > 1 or len(devices) > 1 or not all(one.is_contiguous() for one in every):
        raise UsageError(
            f"shards of {sorted(lengths)} bytes on {sorted(map(str, devices))}: "
            "contiguous tensors of one length on one device are needed"
        )
    return [_flat(one) for one in sources], [_flat(one) for one in targets]


def _flat(tensor: Tensor) -> Tensor:
    return tensor.detach().view(-1).view(torch.uint8)


def _kernel_for(shards: Sequence[Tensor]) -> Any:
    """The kernel's module where it can work on these shards, else None."""
    kernel = _kernel() if shards[0].is_cuda else None
    if kernel is not None and any(shard.data_ptr() % kernel.ALIGN_BYTES for shard in shards):
        return None
    return kernel


@cache
def _kernel() -> Any:
    return importlib.import_module("resilient.ec.gpu_kernel") if find_spec("triton") else None
