"""nn.Linear cut over the ranks of a mesh, with its communication hidden behind its matmuls.

A `ColumnParallelLinear` has some of the output's features, a `RowParallelLinear` some of the input's. Names and shapes
of parameters are those of nn.Linear, as DTensors, so checkpoints are the same as of the plain module. Inputs are
[..., K]; under `sequence_parallel` each rank has a part of dimension `sequence_dim` (0 or 1), the tokens.
"""

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import functional

from resilient.errors import UsageError
from resilient.kernels import dispatch
from resilient.kernels.layers.parameters import group_of, local, replicate, shard


class _ParallelLinear(nn.Linear):
    """What both have in common. `method`: None for what is quickest (see `resilient.kernels.dispatch`)."""

    mesh: DeviceMesh
    sequence_parallel: bool
    sequence_dim: int
    method: dispatch.Method | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        mesh: DeviceMesh,
        *,
        bias: bool = True,
        sequence_parallel: bool = False,
        sequence_dim: int = 1,
        method: dispatch.Method | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """All ranks of `mesh` call it. Weights are drawn on the mesh's first rank, which sends the others theirs.

        Raises UsageError where features cannot be cut into equal parts.
        """
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self._cut(mesh, sequence_parallel, sequence_dim, method, 0)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        mesh: DeviceMesh,
        *,
        sequence_parallel: bool = False,
        sequence_dim: int = 1,
        method: dispatch.Method | None = None,
        source: int | None = 0,
    ) -> Self:
        """Makes an nn.Linear, in place, one of this kind. `source`: whose weights count; None: each rank's own."""
        if type(linear) is not nn.Linear:
            raise UsageError(f"a {type(linear).__name__} cannot be cut; only an nn.Linear can")
        group_of(mesh)
        cls._check(linear, mesh, sequence_dim)
        linear.__class__ = cls
        assert isinstance(linear, cls)
        linear._cut(mesh, sequence_parallel, sequence_dim, method, source)
        return linear

    def extra_repr(self) -> str:
        cut = ", sequence parallel" if self.sequence_parallel else ""
        return f"{super().extra_repr()}, over {self.mesh.size()} ranks{cut}"

    @classmethod
    def _check(cls, linear: nn.Linear, mesh: DeviceMesh, sequence_dim: int) -> None:
        column = issubclass(cls, ColumnParallelLinear)
        features, name = (linear.out_features, "out") if column else (linear.in_features, "in")
        if features % mesh.size():
            raise UsageError(f"{features} {name}_features cannot be cut into {mesh.size()} equal parts")
        if sequence_dim not in (0, 1):
            raise UsageError(f"sequence_dim is {sequence_dim}; possible are 0 and 1")

    def _cut(
        self,
        mesh: DeviceMesh,
        sequence_parallel: bool,
        sequence_dim: int,
        method: dispatch.Method | None,
        source: int | None,
    ) -> None:
        group_of(mesh)
        self._check(self, mesh, sequence_dim)
        self.mesh, self.sequence_parallel, self.sequence_dim, self.method = (
            mesh,
            sequence_parallel,
            sequence_dim,
            method,
        )
        column = isinstance(self, ColumnParallelLinear)
        self.weight = shard(self.weight, mesh, 0 if column else 1, source)
        if self.bias is not None:
            self.bias = shard(self.bias, mesh, 0, source) if column else replicate(self.bias, mesh, source)


class ColumnParallelLinear(_ParallelLinear):
    """[..., K] to this rank's [..., N / world] of the output.

    With `sequence_parallel` the input is this rank's tokens, gathered on the way: [batch, time / world, K] to
    [batch, time, N / world]. Otherwise all ranks have the same input, and its gradient is summed in the backward.
    """

    def forward(self, input: Tensor) -> Tensor:
        return multiply_together([self], input)[0]


def multiply_together(layers: Sequence[ColumnParallelLinear], input: Tensor) -> list[Tensor]:
    """Each layer's output, with one communication of the input for all. They must agree in all but their features."""
    first = layers[0]
    if any(
        (one.mesh, one.sequence_parallel, one.sequence_dim, one.method, one.bias is None)
        != (first.mesh, first.sequence_parallel, first.sequence_dim, first.method, first.bias is None)
        for one in layers[1:]
    ):
        raise UsageError("layers that share a communication must have one mesh, one mode, and all or none a bias")
    weights = [local(layer.weight) for layer in layers]
    biases = [local(layer.bias) for layer in layers if layer.bias is not None]
    weight = weights[0] if len(weights) == 1 else torch.cat(weights)
    bias = None if not biases else biases[0] if len(biases) == 1 else torch.cat(biases)
    output = _columns(first, input, weight, bias)
    return list(output.split([len(one) for one in weights], dim=-1))


def _columns(layer: ColumnParallelLinear, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    group, world = group_of(layer.mesh), layer.mesh.size()
    if world == 1:
        return functional.linear(input, weight, bias)
    rows = input.reshape(-1, input.shape[-1]).contiguous()
    if not layer.sequence_parallel:
        product = dispatch.replicated_matmul(rows, weight.t(), group, bias=bias, method=layer.method)
        return product.view(*input.shape[:-1], -1)
    product = dispatch.all_gather_matmul(rows, weight.t(), group, bias=bias, method=layer.method)
    parts = product.view(world, *input.shape[:-1], -1)
    if layer.sequence_dim == 0 or input.dim() < 3:
        return parts.flatten(0, 1)
    return parts.transpose(0, 1).flatten(1, 2)


class RowParallelLinear(_ParallelLinear):
    """This rank's [..., K / world] of the input to [..., N], summed over the ranks; the bias is added once.

    With `sequence_parallel` each rank gets its tokens of the sum: [batch, time, K / world] to [batch, time / world, N].
    """

    def forward(self, input: Tensor) -> Tensor:
        weight, bias = local(self.weight), None if self.bias is None else local(self.bias)
        group, world = group_of(self.mesh), self.mesh.size()
        if world == 1:
            return functional.linear(input, weight, bias)
        if not self.sequence_parallel:
            rows = input.reshape(-1, input.shape[-1]).contiguous()
            product = dispatch.matmul_all_reduce(rows, weight.t(), group, bias=bias, method=self.method)
            return product.view(*input.shape[:-1], -1)
        dim = 0 if input.dim() < 3 else self.sequence_dim
        if input.shape[dim] % world:
            raise UsageError(
                f"{input.shape[dim]} tokens (dimension {dim} of {list(input.shape)}) cannot be dealt out to {world} "
                "ranks; pad them to a multiple"
            )
        parts = input.unflatten(dim, (world, -1)).movedim(dim, 0)
        rows = parts.reshape(-1, input.shape[-1]).contiguous()
        product = dispatch.matmul_reduce_scatter(rows, weight.t(), group, bias=bias, method=self.method)
        return product.view(*parts.shape[1:-1], -1)
