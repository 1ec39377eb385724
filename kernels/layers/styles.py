"""For `torch.distributed.tensor.parallel.parallelize_module`: a model's own layers, cut and overlapped in place.

    parallelize_module(model, mesh["tp"], {
        "blocks.*.feed.0": OverlappedColwise(sequence_parallel=True),
        "blocks.*.feed.2": OverlappedRowwise(sequence_parallel=True),
        "blocks.*.norm": OverlappedNorm(),
    })

They take and give plain tensors, as the layers do. Attributes of modules stay; their class changes.
"""

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import ParallelStyle

from resilient.errors import UsageError
from resilient.kernels import dispatch
from resilient.kernels.layers.linear import ColumnParallelLinear, RowParallelLinear
from resilient.kernels.layers.sequence import parallel_norm


class _Linear(ParallelStyle):
    def __init__(
        self, *, sequence_parallel: bool = False, sequence_dim: int = 1, method: dispatch.Method | None = None
    ) -> None:
        self._sequence_parallel, self._sequence_dim = sequence_parallel, sequence_dim
        self._method: dispatch.Method | None = method

    def _cut(
        self, module: nn.Module, kind: type[ColumnParallelLinear | RowParallelLinear], mesh: DeviceMesh
    ) -> nn.Module:
        if not isinstance(module, nn.Linear):
            raise UsageError(f"a {type(module).__name__} cannot be cut; only an nn.Linear can")
        return kind.from_linear(
            module,
            mesh,
            sequence_parallel=self._sequence_parallel,
            sequence_dim=self._sequence_dim,
            method=self._method,
            source=self.src_data_rank,
        )


class OverlappedColwise(_Linear):
    """An nn.Linear becomes a ColumnParallelLinear."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        return self._cut(module, ColumnParallelLinear, device_mesh)


class OverlappedRowwise(_Linear):
    """An nn.Linear becomes a RowParallelLinear."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        return self._cut(module, RowParallelLinear, device_mesh)


class OverlappedNorm(ParallelStyle):
    """An nn.LayerNorm or nn.RMSNorm is computed for this rank's tokens."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        return parallel_norm(module, device_mesh, source=self.src_data_rank)
