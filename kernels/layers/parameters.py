"""Parameters as DTensors, which say what part of a plain module's parameter a rank has: checkpoints go by it."""

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from resilient.errors import UsageError
from resilient.kernels.overlap.exchange import Group


def group_of(mesh: DeviceMesh) -> Group:
    """The group of a mesh with one dimension. Raises UsageError for one with more."""
    if mesh.ndim != 1:
        raise UsageError(f"a mesh of {mesh.ndim} dimensions is not one of tensor parallelism; take one: mesh['tp']")
    return mesh.get_group()


def shard(parameter: Tensor, mesh: DeviceMesh, dim: int, source: int | None) -> nn.Parameter:
    """Cut along `dim`. `source`: the rank of the mesh whose numbers count; None: each rank's own."""
    if parameter.shape[dim] % mesh.size():
        raise UsageError(
            f"dimension {dim} of a parameter {list(parameter.shape)} cannot be cut into {mesh.size()} equal parts"
        )
    return _placed(parameter, mesh, Shard(dim), source)


def replicate(parameter: Tensor, mesh: DeviceMesh, source: int | None) -> nn.Parameter:
    """All of it on each rank."""
    return _placed(parameter, mesh, Replicate(), source)


def local(parameter: Tensor) -> Tensor:
    """What this rank has of it. A plain tensor (as DDP makes of DTensors) is that already."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def _placed(parameter: Tensor, mesh: DeviceMesh, placement: Shard | Replicate, source: int | None) -> nn.Parameter:
    if isinstance(parameter, DTensor):
        raise UsageError("a parameter is a DTensor already; cut a module once, and before FSDP2 does")
    with torch.no_grad():
        placed = distribute_tensor(parameter.detach(), mesh, [placement], src_data_rank=source)
    return nn.Parameter(placed, requires_grad=parameter.requires_grad)
