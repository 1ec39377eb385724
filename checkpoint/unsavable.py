"""Tensors and optimizers that cannot be saved, refused by name and with what to do instead.

Asked by the walk (`leaves.py`), so when the Checkpointer is made and whenever the structure changes. Objects that are
no tensors are refused in `stateful.py` and `objects.py`.
"""

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.optim import Optimizer

from resilient.checkpoint.dtypes import safetensors_dtype
from resilient.errors import StateError


def refuse_optimizer(optimizer: Optimizer, item: str) -> None:
    """Raises StateError for an optimizer whose state is not all there, or not what it says it is."""
    names = {kind.__name__ for kind in type(optimizer).__mro__ if kind.__module__.startswith("torch.distributed.")}
    problem = ""
    if "ZeroRedundancyOptimizer" in names:
        problem = "its state is spread over ranks in a way that only it knows: shard with fully_shard instead"
    elif not {"state", "param_groups"} <= optimizer.__dict__.keys():
        problem = "it wraps another optimizer: name that one in the state"
    if problem:
        raise StateError(f"state[{item!r}] cannot be saved: it is a {type(optimizer).__name__}; {problem}")


def refuse_tensor(key: str, tensor: Tensor) -> None:
    """Raises StateError, naming the tensor, for one whose bytes are not its value or are not here."""
    try:
        safetensors_dtype(tensor.dtype)
    except StateError as error:
        raise StateError(f"tensor {key!r}: {error}") from error
    problem = ""
    if isinstance(tensor, (UninitializedParameter, UninitializedBuffer)):
        problem = "is not initialised yet: run one forward pass before making the Checkpointer"
    elif tensor.is_meta:
        problem = "is on the meta device and has no bytes: materialise it first (to_empty)"
    elif tensor.is_nested or tensor.is_quantized:
        problem = "is nested or quantized: save its parts as plain tensors"
    elif tensor.layout is not torch.strided:
        problem = f"has layout {tensor.layout}, and only strided tensors can be saved: convert it to dense"
    elif tensor.is_conj() or tensor.is_neg():
        problem = "is a lazy conjugate or negation: call resolve_conj() and resolve_neg() on it first"
    elif isinstance(tensor, DTensor):
        problem = _problem_of_dtensor(tensor)
    elif type(tensor) not in (Tensor, nn.Parameter):
        problem = f"is a {type(tensor).__name__}, a tensor class that is not known here: save what is inside of it"
    if problem:
        raise StateError(f"tensor {key!r} {problem}")


def _problem_of_dtensor(tensor: DTensor) -> str:
    local = type(tensor._local_tensor)
    if any(placement.is_partial() for placement in tensor.placements):
        return "is a partial sum over the mesh: redistribute it to Shard or Replicate first"
    if tensor.device_mesh.get_coordinate() is None:
        return "lies on a device mesh that this rank has no part in: give each rank only the modules it works on"
    if local not in (Tensor, nn.Parameter):
        return f"consists of parts of class {local.__name__}, which is not known here: save what is inside of them"
    return ""
