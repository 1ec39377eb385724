"""What is refused before anything is launched, and what the fused kernels cannot do (`supported`)."""

import os
from collections.abc import Sequence
from importlib.util import find_spec

import torch
import torch.distributed as dist
from torch import Tensor

from resilient.errors import UsageError
from resilient.kernels.fused.shapes import (
    ACTIVATIONS,
    DTYPES,
    INTERPRETED,
    OPERATIONS,
    TILES,
    Activation,
    Call,
    Operation,
    Tile,
)

_LEAST_CAPABILITY = (8, 0)
_LARGEST = 1 << 31  # row, column and program numbers are 32-bit


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter: TRITON_INTERPRET=1 was set when they were imported."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def supported(
    operation: Operation,
    shape: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
    group: dist.ProcessGroup | None = None,
) -> str | None:
    """Why the fused kernels cannot do this, in words; None when they can.

    `shape` is (m, n, k): rows of the whole product, its columns, and what one rank sums over. Does not block, and says
    the same on all ranks that ask the same. Says nothing about whether it pays.
    """
    if operation not in OPERATIONS:
        return f"there is no fused {operation!r}; there are {', '.join(OPERATIONS)}"
    m, n, k = shape
    if min(m, n, k) < 1:
        return f"an empty product: {m} x {n}, summed over {k}"
    if max(m, n, k) >= _LARGEST:
        return f"a dimension of {max(m, n, k)} does not fit 32 bits"
    if dtype not in DTYPES:
        return f"{dtype} is not among {', '.join(map(str, DTYPES))}"
    chosen = group if group is not None else dist.group.WORLD
    if chosen is None:
        return "there is no process group"
    if operation != "matmul_all_reduce" and m % chosen.size():
        return f"{m} rows do not divide by {chosen.size()} ranks"
    if find_spec("triton") is None:
        return "Triton is not installed"
    return _device_reason(device)


def _device_reason(device: torch.device) -> str | None:
    if device.type == "cpu":
        return None if interpreted() else "on a CPU the kernels run in Triton's interpreter only (TRITON_INTERPRET=1)"
    if device.type != "cuda":
        return f"the kernels are for CUDA, not for {device}"
    if interpreted():
        return "TRITON_INTERPRET=1 is set, and the interpreter is for CPU tensors"
    if torch.version.hip is not None:
        return "torch has no symmetric memory that was tried on this device"
    if torch.cuda.get_device_capability(device) < _LEAST_CAPABILITY:
        return f"{torch.cuda.get_device_name(device)} is older than compute capability 8.0"
    if torch.cuda.is_current_stream_capturing():
        return "a CUDA graph would replay the signals of one call"
    return None


def call_of(
    operation: Operation,
    left: Tensor,
    weight: Tensor,
    group: dist.ProcessGroup,
    bias: Tensor | None,
    activation: Activation | None,
    tile: Tile | None = None,
) -> Call:
    """The call that these operands mean. Raises UsageError for operands that do not fit together, or are unsupported.

    Only what this rank can see: that all ranks mean the same call is compared in the kernel.
    """
    _check_operands(operation, left, weight, bias, activation)
    scattered = operation == "all_gather_matmul"
    m = left.shape[0] * group.size() if scattered else left.shape[0]
    shape = (m, weight.shape[1], weight.shape[0])
    reason = supported(operation, shape, left.dtype, left.device, group)
    if reason is not None:
        raise UsageError(f"{operation} cannot be fused here: {reason}")
    return Call(
        operation=operation,
        m=m,
        n=shape[1],
        k=shape[2],
        dtype=left.dtype,
        world=group.size(),
        biased=bias is not None,
        activation=activation,
        tile=tile or (INTERPRETED if interpreted() else TILES[left.dtype]),
    )


def _check_operands(operation: str, left: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> None:
    if left.dim() != 2 or weight.dim() != 2 or left.shape[1] != weight.shape[0]:
        raise UsageError(f"{operation} needs [rows, k] and [k, n]: it got {list(left.shape)} and {list(weight.shape)}")
    if not left.is_contiguous():
        raise UsageError(f"{operation} needs a contiguous first operand: it has strides {list(left.stride())}")
    if bias is not None and (list(bias.shape) != [weight.shape[1]] or not bias.is_contiguous()):
        raise UsageError(f"{operation} needs a contiguous bias of [{weight.shape[1]}]: it got {list(bias.shape)}")
    if activation not in ACTIVATIONS:
        raise UsageError(f"there is no activation {activation!r}; there are relu, gelu, silu and None")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and (tensor.dtype != left.dtype or tensor.device != left.device):
            raise UsageError(
                f"{operation} needs operands of one dtype on one device: the first is {left.dtype} on {left.device}, "
                f"the {name} {tensor.dtype} on {tensor.device}"
            )
