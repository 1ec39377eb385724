"""The two halves of a transformer's layer: feed-forward, and the projections around attention.

Each communicates once on the way in and once on the way out, however many projections there are. What is between, heads
and hidden units, is whole on one rank. Their parameters are those of plain nn.Linear modules of the same names.
"""

from collections.abc import Callable

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import functional

from resilient.errors import UsageError
from resilient.kernels.layers.linear import ColumnParallelLinear, RowParallelLinear, multiply_together

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": functional.relu,
    "gelu": functional.gelu,
    "silu": functional.silu,
}


class ParallelMLP(nn.Module):
    """[..., width] to [..., width]: `up`, an activation, `down`; `gated`: activation(`gate`) * `up`, as in Llama."""

    def __init__(
        self,
        width: int,
        hidden: int,
        mesh: DeviceMesh,
        *,
        activation: str = "gelu",
        gated: bool = False,
        bias: bool = True,
        sequence_parallel: bool = False,
        sequence_dim: int = 1,
    ) -> None:
        """Raises UsageError for an activation that is not known, or `hidden` units that cannot be dealt out."""
        super().__init__()
        if activation not in _ACTIVATIONS:
            raise UsageError(f"activation {activation!r} is not known; possible are {', '.join(_ACTIVATIONS)}")

        def column() -> ColumnParallelLinear:
            return ColumnParallelLinear(
                width, hidden, mesh, bias=bias, sequence_parallel=sequence_parallel, sequence_dim=sequence_dim
            )

        self.activation = activation
        self.gate = column() if gated else None
        self.up = column()
        self.down = RowParallelLinear(
            hidden, width, mesh, bias=bias, sequence_parallel=sequence_parallel, sequence_dim=sequence_dim
        )

    def forward(self, input: Tensor) -> Tensor:
        activate = _ACTIVATIONS[self.activation]
        if self.gate is None:
            hidden = activate(self.up(input))
        else:
            gate, up = multiply_together([self.gate, self.up], input)
            hidden = activate(gate) * up
        output: Tensor = self.down(hidden)
        return output


class AttentionProjections(nn.Module):
    """`q_proj`, `k_proj`, `v_proj` with one communication, and `o_proj`. What happens between is the model's own.

    `project([batch, time, width])` gives query, key and value [batch, time, this rank's heads, head_width], `merge`
    takes attention's result of that shape to [batch, time, width]; under `sequence_parallel` what has the width is this
    rank's part of the time.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        mesh: DeviceMesh,
        *,
        key_value_heads: int | None = None,
        head_width: int | None = None,
        bias: bool = True,
        sequence_parallel: bool = False,
        sequence_dim: int = 1,
    ) -> None:
        """Raises UsageError where heads cannot be dealt out to the ranks."""
        super().__init__()
        shared = heads if key_value_heads is None else key_value_heads
        for count, what in ((heads, "heads"), (shared, "key_value_heads")):
            if count % mesh.size():
                raise UsageError(f"{count} {what} cannot be dealt out to {mesh.size()} ranks")
        if head_width is None and width % heads:
            raise UsageError(f"width {width} is not a multiple of {heads} heads; give head_width")
        self.head_width = head_width or width // heads

        def column(count: int) -> ColumnParallelLinear:
            return ColumnParallelLinear(
                width, count * self.head_width, mesh, bias=bias,
                sequence_parallel=sequence_parallel, sequence_dim=sequence_dim,
            )  # fmt: skip

        self.q_proj, self.k_proj, self.v_proj = column(heads), column(shared), column(shared)
        self.o_proj = RowParallelLinear(
            heads * self.head_width, width, mesh, bias=bias,
            sequence_parallel=sequence_parallel, sequence_dim=sequence_dim,
        )  # fmt: skip

    def project(self, input: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        parts = multiply_together([self.q_proj, self.k_proj, self.v_proj], input)
        query, key, value = (part.unflatten(-1, (-1, self.head_width)) for part in parts)
        return query, key, value

    def merge(self, mixed: Tensor) -> Tensor:
        output: Tensor = self.o_proj(mixed.flatten(-2))
        return output
