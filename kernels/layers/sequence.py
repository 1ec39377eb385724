"""Tensors whose rows are dealt out to the ranks, and norms between them (sequence parallelism).

Between a row-parallel layer and the next column-parallel one each rank has a part of the tokens, so norms, dropout and
residuals are computed, and kept for the backward, once and not on every rank. Megatron-LM calls it the same; see
Korthikanti et al., "Reducing activation recomputation in large transformer models" (2022).
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import functional

from resilient.errors import UsageError
from resilient.kernels.dispatch.ops import gather_rows, group_named
from resilient.kernels.layers.parameters import group_of, local, replicate


def scatter_sequence(input: Tensor, mesh: DeviceMesh, dim: int = 1) -> Tensor:
    """A tensor that all ranks have: this rank's part of `dim`. Backward: gathered, so all ranks have all gradients."""
    group = group_of(mesh)
    world = group.size()
    if input.shape[dim] % world:
        raise UsageError(f"{input.shape[dim]} tokens cannot be dealt out to {world} ranks; pad them to a multiple")
    if world == 1:
        return input
    part: Tensor = _own_rows(input.movedim(dim, 0).contiguous(), group.group_name)
    return part.movedim(0, dim)


def gather_sequence(input: Tensor, mesh: DeviceMesh, dim: int = 1) -> Tensor:
    """The parts of all ranks, put together; what follows is the same on all ranks. Backward: this rank's part."""
    group = group_of(mesh)
    if group.size() == 1:
        return input
    front = input.movedim(dim, 0).contiguous()
    whole: Tensor = gather_rows(front.flatten(1) if front.dim() > 1 else front.unsqueeze(1), group.group_name)
    return whole.view(-1, *front.shape[1:]).movedim(0, dim)


class SequenceParallelLayerNorm(nn.LayerNorm):
    """An nn.LayerNorm of a part of the tokens; its parameters' gradients are summed over the ranks."""

    mesh: DeviceMesh

    def forward(self, input: Tensor) -> Tensor:
        weight, bias = _shared(self.weight, self.mesh), _shared(self.bias, self.mesh)
        return functional.layer_norm(input, self.normalized_shape, weight, bias, self.eps)


class SequenceParallelRMSNorm(nn.RMSNorm):
    """The same for nn.RMSNorm."""

    mesh: DeviceMesh

    def forward(self, x: Tensor) -> Tensor:
        return functional.rms_norm(x, self.normalized_shape, _shared(self.weight, self.mesh), self.eps)


def parallel_norm(norm: nn.Module, mesh: DeviceMesh, *, source: int | None = 0) -> nn.Module:
    """Makes an nn.LayerNorm or nn.RMSNorm, in place, one of the above; its parameters become replicated DTensors.

    They are taken from the rank `source` of the mesh (a broadcast), or from each rank itself if None. Raises UsageError
    for other modules.
    """
    kinds: dict[type[nn.Module], type[nn.Module]] = {
        nn.LayerNorm: SequenceParallelLayerNorm,
        nn.RMSNorm: SequenceParallelRMSNorm,
    }
    kind = kinds.get(type(norm))
    if kind is None:
        raise UsageError(
            f"a {type(norm).__name__} cannot be made sequence parallel; possible are LayerNorm and RMSNorm"
        )
    group_of(mesh)
    for name, parameter in list(norm.named_parameters(recurse=False)):
        norm.register_parameter(name, replicate(parameter, mesh, source))
    norm.__class__ = kind
    norm.mesh = mesh  # type: ignore[assignment]
    return norm


def _shared(parameter: Tensor | None, mesh: DeviceMesh) -> Tensor | None:
    if parameter is None:
        return None
    group = group_of(mesh)
    held = local(parameter)
    return held if group.size() == 1 else _summed_gradient(held, group.group_name)


@torch.library.custom_op("resilient_kernels::summed_gradient", mutates_args=())
def _summed_gradient(parameter: Tensor, group: str) -> Tensor:
    """The same numbers; backward: the sum of all ranks' gradients."""
    return parameter.clone()


@_summed_gradient.register_fake
def _(parameter: Tensor, group: str) -> Tensor:
    return torch.empty_like(parameter)


@torch.library.custom_op("resilient_kernels::summed", mutates_args=())
def _summed(gradient: Tensor, group: str) -> Tensor:
    total = gradient.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group_named(group))
    return total


@_summed.register_fake
def _(gradient: Tensor, group: str) -> Tensor:
    return torch.empty_like(gradient, memory_format=torch.contiguous_format)


def _summed_saved(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.group = inputs[1]


def _summed_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
    return _summed(gradient, ctx.group), None


_summed_gradient.register_autograd(_summed_backward, setup_context=_summed_saved)


@torch.library.custom_op("resilient_kernels::own_rows", mutates_args=())
def _own_rows(whole: Tensor, group: str) -> Tensor:
    """This rank's share of the first dimension; backward: the gradients of all shares."""
    return whole.chunk(group_named(group).size())[group_named(group).rank()].clone()


@_own_rows.register_fake
def _(whole: Tensor, group: str) -> Tensor:
    return whole.new_empty(whole.shape[0] // group_named(group).size(), *whole.shape[1:])


def _own_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
    flat = gradient.contiguous().view(gradient.shape[0], -1)
    return gather_rows(flat, ctx.group).view(-1, *gradient.shape[1:]), None


_own_rows.register_autograd(_own_backward, setup_context=_summed_saved)
