"""Gradients of the fused operations. The backward of a gather is a scatter, and the other way round: fused, too.

Conventions, as in Megatron-LM: the weight is this rank's own; a bias that is replicated gets this rank's part of its
gradient; an all-reduced result is used alike on all ranks, so its gradient needs no collective.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from resilient.kernels.fused.checks import call_of
from resilient.kernels.fused.launch import gathered, launch
from resilient.kernels.fused.shapes import Call, Operation, Tile


def _run(
    operation: Operation, left: Tensor, weight: Tensor, bias: Tensor | None, group: dist.ProcessGroup, tile: Tile
) -> tuple[Call, Tensor]:
    call = call_of(operation, left, weight, group, bias, None, tile)
    return call, launch(call, left, weight, bias, group)


def _whole(call: Call, shard: Tensor, group: dist.ProcessGroup) -> Tensor:
    """All ranks' shards after an all_gather_matmul: the kernel leaves the own one out, which nobody had to send."""
    found = gathered(call, group, shard.device)
    found[group.rank() * call.rows : (group.rank() + 1) * call.rows].copy_(shard)
    return found


class AllGatherMatmul(torch.autograd.Function):
    """Saves the shard, not what was gathered: backward gathers again, as it has to hold less for that."""

    @staticmethod
    def forward(
        ctx: Any, shard: Tensor, weight: Tensor, bias: Tensor | None, group: dist.ProcessGroup, tile: Tile
    ) -> Tensor:
        ctx.save_for_backward(shard, weight)
        ctx.group, ctx.tile = group, tile
        return _run("all_gather_matmul", shard, weight, bias, group, tile)[1]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        gradient = gradients[0].contiguous()
        shard, weight = ctx.saved_tensors
        for_shard = for_weight = None
        if ctx.needs_input_grad[0]:
            for_shard = _run("matmul_reduce_scatter", gradient, weight.t(), None, ctx.group, ctx.tile)[1]
        if ctx.needs_input_grad[1]:
            # The product is thrown away: one column of it is computed so that the shards travel.
            call, _ = _run("all_gather_matmul", shard, weight[:, :1], None, ctx.group, ctx.tile)
            for_weight = _whole(call, shard, ctx.group).t() @ gradient
        return for_shard, for_weight, gradient.sum(0) if ctx.needs_input_grad[2] else None, None, None


class MatmulReduceScatter(torch.autograd.Function):
    """Backward gathers the gradient while it multiplies it, and uses what was gathered for the weight as well."""

    @staticmethod
    def forward(
        ctx: Any, left: Tensor, weight: Tensor, bias: Tensor | None, group: dist.ProcessGroup, tile: Tile
    ) -> Tensor:
        ctx.save_for_backward(left, weight)
        ctx.group, ctx.tile = group, tile
        return _run("matmul_reduce_scatter", left, weight, bias, group, tile)[1]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        gradient = gradients[0].contiguous()
        left, weight = ctx.saved_tensors
        for_left = for_weight = None
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
            call, for_left = _run("all_gather_matmul", gradient, weight.t(), None, ctx.group, ctx.tile)
            if ctx.needs_input_grad[1]:
                for_weight = left.t() @ _whole(call, gradient, ctx.group)
        return for_left, for_weight, gradient.sum(0) if ctx.needs_input_grad[2] else None, None, None


class MatmulAllReduce(torch.autograd.Function):
    """Backward is local: see the module."""

    @staticmethod
    def forward(
        ctx: Any, left: Tensor, weight: Tensor, bias: Tensor | None, group: dist.ProcessGroup, tile: Tile
    ) -> Tensor:
        ctx.save_for_backward(left, weight)
        return _run("matmul_all_reduce", left, weight, bias, group, tile)[1]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        gradient = gradients[0]
        left, weight = ctx.saved_tensors
        for_left = gradient @ weight.t() if ctx.needs_input_grad[0] else None
        for_weight = left.t() @ gradient if ctx.needs_input_grad[1] else None
        return for_left, for_weight, gradient.sum(0) if ctx.needs_input_grad[2] else None, None, None
