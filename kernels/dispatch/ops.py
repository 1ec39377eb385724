"""The operations as torch knows them (`torch.ops.resilient_kernels`): with shapes for torch.compile, and derivatives.

A group goes by its name, since that is what a compiled graph can hold. Shapes are checked when an operation runs
(`eager.py`, which has what each one does). `functions.py` is what users call.
"""

from typing import Any

import torch
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group

from resilient.kernels.dispatch import eager
from resilient.kernels.dispatch.ways import turned
from resilient.kernels.overlap.exchange import Group, gather_all


def group_named(group: str) -> Group:
    """The group of that name. Raises torch's own error where there is none."""
    found: Any = _resolve_process_group(group)  # type: ignore[arg-type]  # a name is a type of its own in later versions
    return found  # type: ignore[no-any-return]


# -- [M/W, K] of each rank times [K, N]: [M, N] ------------------------------------------------------------------------


@torch.library.custom_op("resilient_kernels::all_gather_matmul", mutates_args=())
def all_gather_matmul(
    shard: Tensor, weight: Tensor, bias: Tensor | None, group: str, way: str, keep: bool
) -> tuple[Tensor, Tensor]:
    return eager.all_gather_matmul(shard, weight, bias, group_named(group), way, keep)


@all_gather_matmul.register_fake
def _(shard: Tensor, weight: Tensor, bias: Tensor | None, group: str, way: str, keep: bool) -> tuple[Tensor, Tensor]:
    rows = shard.shape[0] * group_named(group).size()
    gathered = shard.new_empty(rows, shard.shape[1]) if keep else shard.new_empty(0)
    return shard.new_empty(rows, weight.shape[1]), gathered


@torch.library.custom_op("resilient_kernels::all_gather_matmul_backward", mutates_args=())
def _all_gather_matmul_backward(
    grad: Tensor, gathered: Tensor, weight: Tensor, group: str, way: str, weight_too: bool
) -> tuple[Tensor, Tensor]:
    return eager.all_gather_matmul_backward(grad, gathered, weight, group_named(group), way, weight_too)


@_all_gather_matmul_backward.register_fake
def _(grad: Tensor, gathered: Tensor, weight: Tensor, group: str, way: str, weight_too: bool) -> tuple[Tensor, Tensor]:
    rows = grad.shape[0] // group_named(group).size()
    return grad.new_empty(rows, weight.shape[0]), _like(weight, weight_too)


def _gather_saved(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    shard, weight, _, ctx.group, ctx.way, ctx.keep = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(shard, weight, output[1])


def _gather_backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Any, ...]:
    shard, weight, gathered = ctx.saved_tensors
    for_shard, for_weight, for_bias = ctx.needs_input_grad[:3]
    grad = grad.contiguous()
    if for_weight and not ctx.keep:
        gathered = gather_rows(shard, ctx.group)
    if for_shard:
        to_shard, to_weight = _all_gather_matmul_backward(grad, gathered, weight, ctx.group, ctx.way, for_weight)
    else:
        to_shard, to_weight = None, _product(gathered, grad, weight) if for_weight else None
    return to_shard, to_weight if for_weight else None, grad.sum(0) if for_bias else None, None, None, None


all_gather_matmul.register_autograd(_gather_backward, setup_context=_gather_saved)


@torch.library.custom_op("resilient_kernels::gather_rows", mutates_args=())
def gather_rows(shard: Tensor, group: str) -> Tensor:
    """[rows, K] of each rank: [world * rows, K]."""
    members = group_named(group)
    whole = shard.new_empty(members.size() * len(shard), shard.shape[1])
    gather_all(whole, shard, members)
    return whole


@gather_rows.register_fake
def _(shard: Tensor, group: str) -> Tensor:
    return shard.new_empty(group_named(group).size() * shard.shape[0], shard.shape[1])


def _rows_saved(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.group = inputs[1]


def _rows_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    """What follows is the same on all ranks, and so is the gradient."""
    members = group_named(ctx.group)
    return grad.chunk(members.size())[members.rank()], None


gather_rows.register_autograd(_rows_backward, setup_context=_rows_saved)


# -- [M, K of the rank] times [K of the rank, N], summed: the rank's [M/W, N] -----------------------------------------


@torch.library.custom_op("resilient_kernels::matmul_reduce_scatter", mutates_args=())
def matmul_reduce_scatter(input: Tensor, weight: Tensor, bias: Tensor | None, group: str, way: str) -> Tensor:
    return eager.matmul_reduce_scatter(input, weight, bias, group_named(group), way)


@matmul_reduce_scatter.register_fake
def _(input: Tensor, weight: Tensor, bias: Tensor | None, group: str, way: str) -> Tensor:
    return input.new_empty(input.shape[0] // group_named(group).size(), weight.shape[1])


@torch.library.custom_op("resilient_kernels::matmul_reduce_scatter_backward", mutates_args=())
def _matmul_reduce_scatter_backward(
    grad: Tensor, input: Tensor, weight: Tensor, group: str, way: str, weight_too: bool, bias_too: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return eager.matmul_reduce_scatter_backward(grad, input, weight, group_named(group), way, weight_too, bias_too)


@_matmul_reduce_scatter_backward.register_fake
def _(
    grad: Tensor, input: Tensor, weight: Tensor, group: str, way: str, weight_too: bool, bias_too: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(input), _like(weight, weight_too), grad.new_empty(grad.shape[1] if bias_too else 0)


def _scatter_saved(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, weight, _, ctx.group, ctx.way = inputs
    ctx.save_for_backward(input, weight)


def _scatter_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    input, weight = ctx.saved_tensors
    for_input, for_weight, for_bias = ctx.needs_input_grad[:3]
    to_input, to_weight, to_bias = _matmul_reduce_scatter_backward(
        grad.contiguous(), input, weight, ctx.group, ctx.way, for_weight, for_bias
    )
    return to_input if for_input else None, to_weight if for_weight else None, to_bias if for_bias else None, None, None


matmul_reduce_scatter.register_autograd(_scatter_backward, setup_context=_scatter_saved)


# -- the same, and all ranks get all of the sum ------------------------------------------------------------------------


@torch.library.custom_op("resilient_kernels::matmul_all_reduce", mutates_args=())
def matmul_all_reduce(input: Tensor, weight: Tensor, bias: Tensor | None, group: str, way: str) -> Tensor:
    return eager.matmul_all_reduce(input, weight, bias, group_named(group), way)


@matmul_all_reduce.register_fake
def _(input: Tensor, weight: Tensor, bias: Tensor | None, group: str, way: str) -> Tensor:
    return input.new_empty(input.shape[0], weight.shape[1])


def _reduce_saved(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])


def _reduce_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """All ranks have the same result, and so the same gradient of it: nothing is communicated."""
    input, weight = ctx.saved_tensors
    for_input, for_weight, for_bias = ctx.needs_input_grad[:3]
    return (
        grad @ weight.t() if for_input else None,
        _product(input, grad, weight) if for_weight else None,
        grad.sum(0) if for_bias else None,
        None,
        None,
    )


matmul_all_reduce.register_autograd(_reduce_backward, setup_context=_reduce_saved)


# -- [M, K], the same on all ranks, times [K, N of the rank]: its [M, N] ---------------------------------------------


@torch.library.custom_op("resilient_kernels::replicated_matmul", mutates_args=())
def replicated_matmul(input: Tensor, weight: Tensor, bias: Tensor | None, group: str, way: str) -> Tensor:
    return eager.replicated_matmul(input, weight, bias, group_named(group), way)


@replicated_matmul.register_fake
def _(input: Tensor, weight: Tensor, bias: Tensor | None, group: str, way: str) -> Tensor:
    return input.new_empty(input.shape[0], weight.shape[1])


@torch.library.custom_op("resilient_kernels::replicated_matmul_backward", mutates_args=())
def _replicated_matmul_backward(
    grad: Tensor, input: Tensor, weight: Tensor, group: str, way: str, weight_too: bool
) -> tuple[Tensor, Tensor]:
    return eager.replicated_matmul_backward(grad, input, weight, group_named(group), way, weight_too)


@_replicated_matmul_backward.register_fake
def _(grad: Tensor, input: Tensor, weight: Tensor, group: str, way: str, weight_too: bool) -> tuple[Tensor, Tensor]:
    return torch.empty_like(input), _like(weight, weight_too)


def _replicated_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    input, weight = ctx.saved_tensors
    for_input, for_weight, for_bias = ctx.needs_input_grad[:3]
    grad = grad.contiguous()
    if for_input:
        to_input, to_weight = _replicated_matmul_backward(grad, input, weight, ctx.group, ctx.way, for_weight)
    else:
        to_input, to_weight = None, _product(input, grad, weight) if for_weight else None
    return to_input, to_weight if for_weight else None, grad.sum(0) if for_bias else None, None, None


replicated_matmul.register_autograd(_replicated_backward, setup_context=_scatter_saved)


def _product(rows: Tensor, gradient: Tensor, weight: Tensor) -> Tensor:
    """A weight's gradient."""
    return (gradient.t() @ rows).t() if turned(weight) else rows.t() @ gradient


def _like(weight: Tensor, wanted: bool) -> Tensor:
    """As the value of `ways.WeightGradient`."""
    if not wanted:
        return weight.new_empty(0)
    return weight.new_empty(weight.shape[::-1]).t() if turned(weight) else weight.new_empty(weight.shape)
