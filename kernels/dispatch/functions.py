"""Matmuls with collectives, as users call them: differentiable, compilable, each in the way that takes least time.

A weight is [K, N]; that of an nn.Linear is given as `linear.weight.t()`, which copies nothing. All ranks of the group
call the same function with the same shapes. Wrong calls are a UsageError, different ones a CollectiveMismatch, on all
ranks alike and before anything else is sent, when a shape comes for the first time; a peer that is gone is the group's
own error. `method`: None for the quickest (see `explain`), or "plain", "fused", or "chunked", with which `chunks` goes.
While a CUDA graph is captured None is the plain way, nothing is compared, and "fused" is a UsageError.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from resilient.errors import UsageError
from resilient.kernels.dispatch import eager, ops
from resilient.kernels.dispatch.decide import Method
from resilient.kernels.dispatch.dispatcher import Explanation, dispatcher_of
from resilient.kernels.overlap.call import ACTIVATIONS, OPERATIONS, Call, Operation
from resilient.kernels.overlap.exchange import Group

_PLAIN_TYPES = (Tensor, torch.nn.Parameter)
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": functional.relu,
    "gelu": functional.gelu,
    "silu": functional.silu,
}


def all_gather_matmul(
    shard: Tensor,
    weight: Tensor,
    group: Group | None = None,
    *,
    bias: Tensor | None = None,
    activation: str | None = None,
    method: Method | None = None,
    chunks: int = 4,
) -> Tensor:
    """The shards [M/W, K] of all ranks, one below the other, times [K, N]: [M, N], with bias [N] and activation.

    Backward: the shard's gradient is summed over the ranks (a matmul with a reduce-scatter).
    """
    group, shard, weight, bias = _ready(group, shard, weight, bias)
    way = _way(method, chunks, activation)
    if group.size() == 1:
        return _alone(shard, weight, bias, activation)
    if _bare(shard, weight, bias):
        return _activated(eager.all_gather_matmul(shard, weight, bias, group, way, False)[0], activation)
    keep = torch.is_grad_enabled() and weight.requires_grad
    product, _ = ops.all_gather_matmul(shard, weight, bias, group.group_name, way, keep)
    return _activated(product, activation)


def matmul_reduce_scatter(
    input: Tensor,
    weight: Tensor,
    group: Group | None = None,
    *,
    bias: Tensor | None = None,
    activation: str | None = None,
    method: Method | None = None,
    chunks: int = 4,
) -> Tensor:
    """[M, K of the rank] times [K of the rank, N], summed over the ranks; rank r gets its M/W rows: [M/W, N].

    Bias and activation come after the sum. Backward: a gather with a matmul; the bias's gradient is that of all rows.
    """
    group, input, weight, bias = _ready(group, input, weight, bias)
    way = _way(method, chunks, activation)
    if group.size() == 1:
        return _alone(input, weight, bias, activation)
    if _bare(input, weight, bias):
        return _activated(eager.matmul_reduce_scatter(input, weight, bias, group, way), activation)
    product: Tensor = ops.matmul_reduce_scatter(input, weight, bias, group.group_name, way)
    return _activated(product, activation)


def matmul_all_reduce(
    input: Tensor,
    weight: Tensor,
    group: Group | None = None,
    *,
    bias: Tensor | None = None,
    activation: str | None = None,
    method: Method | None = None,
    chunks: int = 4,
) -> Tensor:
    """[M, K of the rank] times [K of the rank, N], summed over the ranks: [M, N], the same on all of them.

    Bias and activation come after the sum. Backward: all ranks have the same gradient, and nothing is communicated.
    """
    group, input, weight, bias = _ready(group, input, weight, bias)
    way = _way(method, chunks, activation)
    if group.size() == 1:
        return _alone(input, weight, bias, activation)
    if _bare(input, weight, bias):
        return _activated(eager.matmul_all_reduce(input, weight, bias, group, way), activation)
    product: Tensor = ops.matmul_all_reduce(input, weight, bias, group.group_name, way)
    return _activated(product, activation)


def replicated_matmul(
    input: Tensor,
    weight: Tensor,
    group: Group | None = None,
    *,
    bias: Tensor | None = None,
    activation: str | None = None,
    method: Method | None = None,
    chunks: int = 4,
) -> Tensor:
    """[M, K], the same on all ranks, times [K, N of the rank]: its [M, N]. Forward communicates nothing.

    But a shape that is new is compared, so all ranks have to call it.

    Backward: the input's gradient is summed over the ranks (a matmul with an all-reduce).
    """
    group, input, weight, bias = _ready(group, input, weight, bias)
    way = _way(method, chunks, activation)
    if group.size() == 1:
        return _alone(input, weight, bias, activation)
    if _bare(input, weight, bias):
        return _activated(eager.replicated_matmul(input, weight, bias, group, way), activation)
    product: Tensor = ops.replicated_matmul(input, weight, bias, group.group_name, way)
    return _activated(product, activation)


def explain(
    operation: Operation,
    input: Tensor,
    weight: Tensor,
    group: Group | None = None,
    *,
    backward: bool = False,
) -> Explanation | None:
    """What the next call of this shape does, what was predicted and seen, and why; None before its first call.

    `backward`: of the operation as part of another's backward, where the weight's gradient is computed as well. Does
    not communicate. `str()` of it is for people.
    """
    if operation not in OPERATIONS:
        raise UsageError(f"operation {operation!r} is not known; there are {', '.join(OPERATIONS)}")
    group = _group(group)
    call = eager.described(operation, input, weight, None, group, backward=backward)
    if isinstance(call, str):
        raise UsageError(call)
    return dispatcher_of(group).explain(call)


def explanations(group: Group | None = None) -> dict[Call, Explanation]:
    """The same for all shapes that a group has seen so far."""
    return dispatcher_of(_group(group)).explanations()


def _group(group: Group | None) -> Group:
    if group is None:
        group = dist.group.WORLD
    if group is None:
        raise UsageError("there is no process group; call torch.distributed.init_process_group first")
    return group


def _ready(
    group: Group | None, input: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Group, Tensor, Tensor, Tensor | None]:
    """The group, and the tensors in the dtype that autocast asks for."""
    kind = input.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        input, weight, bias = input.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    return _group(group) if group is None else group, input, weight, bias


def _bare(*tensors: Tensor | None) -> bool:
    """Whether nobody follows what is done with the tensors: an operator would cost ten microseconds for nothing."""
    if torch.compiler.is_compiling():
        return False
    grad = torch.is_grad_enabled()
    for tensor in tensors:
        if tensor is not None and ((grad and tensor.requires_grad) or type(tensor) not in _PLAIN_TYPES):
            return False
    return True


def _way(method: Method | None, chunks: int, activation: str | None) -> str:
    """What the caller's own code says, so it is wrong on all ranks alike, or on none."""
    if activation is not None and activation not in ACTIVATIONS:
        raise UsageError(f"activation {activation!r} is not known; possible are {', '.join(ACTIVATIONS)} and None")
    if method not in (None, "plain", "chunked", "fused"):
        raise UsageError(f"method {method!r} is not known; possible are plain, chunked, fused and None")
    if chunks < 1:
        raise UsageError(f"{chunks} chunks are not possible; the least is 1")
    return "auto" if method is None else f"chunked:{chunks}" if method == "chunked" else method


def _alone(input: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    return _activated(functional.linear(input, weight.t(), bias), activation)


def _activated(product: Tensor, activation: str | None) -> Tensor:
    return product if activation is None else _ACTIVATIONS[activation](product)
