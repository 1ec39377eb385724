"""Matrix products fused with the collective beside them: one kernel that computes and moves data between ranks.

For GPUs that share memory over NVLink, and for tests the same kernels in Triton's interpreter over shared memory of a
host. Whether fusing pays is for `resilient.kernels.dispatch` to decide. `reference.py` has the same by plain
collectives. Importing this needs no Triton; calling does.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from resilient.errors import UsageError
from resilient.kernels.fused.checks import call_of, supported
from resilient.kernels.fused.reference import APPLY
from resilient.kernels.fused.shapes import Activation, Operation, Tile
from resilient.kernels.fused.workspace import workspaces

__all__ = ["all_gather_matmul", "check", "close", "matmul_all_reduce", "matmul_reduce_scatter", "supported"]


def all_gather_matmul(
    shard: Tensor,
    weight: Tensor,
    group: dist.ProcessGroup | None = None,
    *,
    bias: Tensor | None = None,
    activation: Activation | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """activation(gathered @ weight + bias): [M/W, K] of each rank, [K, N] -> [M, N], rows in rank order.

    float16, bfloat16 or float32; sums are in float32. `weight` may have any strides. Collective: all ranks make the
    same calls in the same order, from one thread and, on CUDA, on one stream. On CPU it blocks. Has gradients.

    Raises UsageError, before anything is launched, for operands that do not fit or that `supported` refuses;
    CollectiveMismatch, CollectiveTimeout or PeerGone on all ranks when they do not meet, after which the group is
    of no use. On CUDA those come with `check`.
    """
    return _apply("all_gather_matmul", shard, weight, group, bias, activation, tile)


def matmul_reduce_scatter(
    input: Tensor,
    weight: Tensor,
    group: dist.ProcessGroup | None = None,
    *,
    bias: Tensor | None = None,
    activation: Activation | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """activation(sum over ranks of input @ weight, + bias): [M, K_local], [K_local, N] -> this rank's [M/W, N].

    Parts travel in the operands' dtype and are summed in float32 in rank order, so results are the same in every run.
    Otherwise as `all_gather_matmul`.
    """
    return _apply("matmul_reduce_scatter", input, weight, group, bias, activation, tile)


def matmul_all_reduce(
    input: Tensor,
    weight: Tensor,
    group: dist.ProcessGroup | None = None,
    *,
    bias: Tensor | None = None,
    activation: Activation | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """activation(sum over ranks of input @ weight, + bias): [M, K_local], [K_local, N] -> [M, N], alike on all ranks.

    M need not divide by W. Otherwise as `matmul_reduce_scatter`.
    """
    return _apply("matmul_all_reduce", input, weight, group, bias, activation, tile)


def check(group: dist.ProcessGroup | None = None, device: torch.device | None = None) -> None:
    """Wait for the calls made so far and raise what went wrong in them. For CUDA, where calls do not wait.

    Of one device, or without it of all that the group has made calls on.
    """
    for one in workspaces(group_of(group), device):
        one.check()


def close(group: dist.ProcessGroup | None = None, device: torch.device | None = None) -> None:
    """Give the group's symmetric memory back, of one device or of all. Later calls make it anew.

    All ranks close or none does. What a group still has when it is destroyed is given back then.
    """
    for one in workspaces(group_of(group), device):
        one.close()


def group_of(group: dist.ProcessGroup | None) -> dist.ProcessGroup:
    """The group, or the world's. Raises UsageError when there is none."""
    chosen = group if group is not None else dist.group.WORLD
    if chosen is None:
        raise UsageError("there is no process group: call torch.distributed.init_process_group first")
    return chosen


def _apply(
    operation: Operation,
    left: Tensor,
    weight: Tensor,
    group: dist.ProcessGroup | None,
    bias: Tensor | None,
    activation: Activation | None,
    tile: Tile | None,
) -> Tensor:
    chosen = group_of(group)
    call = call_of(operation, left, weight, chosen, bias, activation, tile)
    operands = [one for one in (left, weight, bias) if one is not None]
    if not (torch.is_grad_enabled() and any(one.requires_grad for one in operands)):
        from resilient.kernels.fused.launch import launch  # needs Triton

        return launch(call, left, weight, bias, chosen)
    from resilient.kernels.fused import autograd

    functions: dict[Operation, Any] = {
        "all_gather_matmul": autograd.AllGatherMatmul,
        "matmul_reduce_scatter": autograd.MatmulReduceScatter,
        "matmul_all_reduce": autograd.MatmulAllReduce,
    }
    # The activation's own gradient is torch's, so it is not part of the kernel here.
    result: Tensor = functions[operation].apply(left, weight, bias, chosen, call.tile)
    return APPLY[activation](result)
