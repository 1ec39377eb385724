"""The fused kernels, where they are there and can do a call."""

import functools
import importlib
import importlib.util
from types import ModuleType

import torch
from torch import Tensor

from resilient.kernels.overlap.call import Call
from resilient.kernels.overlap.exchange import Group


def unsupported(call: Call, group: Group) -> str | None:
    """Why the fused kernels cannot do a call, in words; None: they can."""
    module = _fused()
    if module is None:
        return "the fused kernels need Triton, which is not installed"
    shape, dtype = (call.rows, call.columns, call.inner), getattr(torch, call.dtype)
    reason: str | None = module.supported(call.operation, shape, dtype, torch.device(call.device), group)
    return reason


def unwanted(call: Call, group: Group) -> str | None:
    """The same, for a choice that nobody asked for: on a CPU they are there for tests."""
    return "fused kernels are for GPUs" if call.device == "cpu" else unsupported(call, group)


def fused(call: Call, input: Tensor, weight: Tensor, group: Group) -> Tensor:
    """Its product, without bias. Only after `unsupported` has returned None."""
    module = _fused()
    assert module is not None
    with torch.no_grad():
        product: Tensor = getattr(module, call.operation)(input, weight, group)
    return product


def check(call: Call, group: Group) -> None:
    """Wait for the fused calls so far, and raise what went wrong in them."""
    module = _fused()
    if module is not None:
        module.check(group, torch.device(call.device))


def gathered(call: Call, shard: Tensor, weight: Tensor, group: Group) -> Tensor:
    """A copy of what `fused` gathered for an all_gather_matmul. Only directly after it: the next call overwrites it."""
    checks = importlib.import_module("resilient.kernels.fused.checks")
    launch = importlib.import_module("resilient.kernels.fused.launch")
    known = checks.call_of(call.operation, shard, weight, group, None, None)
    whole: Tensor = launch.gathered(known, group, shard.device).clone()
    whole.chunk(call.world)[group.rank()].copy_(shard)  # the kernel leaves it out: nobody had to send it
    return whole


@functools.cache
def _fused() -> ModuleType | None:
    if importlib.util.find_spec("resilient.kernels.fused") is None or importlib.util.find_spec("triton") is None:
        return None
    return importlib.import_module("resilient.kernels.fused")
