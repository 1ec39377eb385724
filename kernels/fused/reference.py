"""The same operations by plain torch collectives: what the kernels are compared with, and what to fall back to."""

from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as nnf
from torch import Tensor

from resilient.kernels.fused.shapes import Activation

APPLY: dict[str | None, Callable[[Tensor], Tensor]] = {
    None: lambda value: value,
    "relu": nnf.relu,
    "gelu": nnf.gelu,
    "silu": nnf.silu,
}


def all_gather_matmul(
    shard: Tensor,
    weight: Tensor,
    group: dist.ProcessGroup | None = None,
    *,
    bias: Tensor | None = None,
    activation: Activation | None = None,
) -> Tensor:
    """[M/W, K] of each rank, [K, N] -> [M, N]. Blocks on CPU. No autograd."""
    shards = [torch.empty_like(shard) for _ in range(dist.get_world_size(group))]
    dist.all_gather(shards, shard.contiguous(), group=group)
    return _finish(torch.cat(shards) @ weight, bias, activation)


def matmul_reduce_scatter(
    input: Tensor,
    weight: Tensor,
    group: dist.ProcessGroup | None = None,
    *,
    bias: Tensor | None = None,
    activation: Activation | None = None,
) -> Tensor:
    """[M, K_local], [K_local, N] -> this rank's [M/W, N] of the sum over ranks. Blocks on CPU. No autograd."""
    size = dist.get_world_size(group)
    product = input @ weight
    own = torch.empty(product.shape[0] // size, product.shape[1], dtype=product.dtype, device=product.device)
    dist.reduce_scatter(own, [part.contiguous() for part in product.chunk(size)], group=group)
    return _finish(own, bias, activation)


def matmul_all_reduce(
    input: Tensor,
    weight: Tensor,
    group: dist.ProcessGroup | None = None,
    *,
    bias: Tensor | None = None,
    activation: Activation | None = None,
) -> Tensor:
    """[M, K_local], [K_local, N] -> [M, N], the sum over ranks. Blocks on CPU. No autograd."""
    product = input @ weight
    dist.all_reduce(product, group=group)
    return _finish(product, bias, activation)


def _finish(product: Tensor, bias: Tensor | None, activation: Activation | None) -> Tensor:
    return APPLY[activation](product if bias is None else product + bias)
