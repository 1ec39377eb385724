"""Launches the kernels: operands and a call -> result. No autograd here, and nothing is checked but the outcome."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from resilient.kernels.fused import kernel
from resilient.kernels.fused.checks import interpreted
from resilient.kernels.fused.shapes import ACTIVATIONS, Call
from resilient.kernels.fused.workspace import workspace


def launch(call: Call, left: Tensor, weight: Tensor, bias: Tensor | None, group: dist.ProcessGroup) -> Tensor:
    """The result of a call, on this rank. On CPU it blocks until it is there; on CUDA it is put on the current stream.

    Raises PeerGone, CollectiveTimeout, CollectiveMismatch, on all ranks; on CUDA the next call does, or `check`.
    """
    space = workspace(group, left.device)
    memory = space.begin(call)
    scatters = call.operation == "matmul_reduce_scatter"
    out = torch.empty(call.rows if scatters else call.m, call.n, dtype=call.dtype, device=left.device)
    common = {
        "bias": bias if bias is not None else out,
        "out": out,
        "buffers": memory.buffer_addresses,
        "signals": memory.signal_addresses,
        "rank": memory.rank,
        "epoch": space.epoch,
        "call": call.fingerprint,
        "tries": space.tries,
        "rows": call.rows,
        "columns": call.n,
        "depth": call.k,
        "depth_stride": weight.stride(0),
        "column_stride": weight.stride(1),
        **constants(call),
    }
    entry: Any
    with torch.cuda.device_of(left):
        if call.operation == "all_gather_matmul":
            entry = kernel.all_gather_matmul[(call.programs,)]
            entry(shard=left, weight=weight, aligned=left.data_ptr() % 16 == 0, **common)
        else:
            entry = kernel.matmul_reduce[(call.programs,)]
            entry(left=left, weight=weight, whole=call.m, **common)
    space.finish(call)
    return out


def constants(call: Call) -> dict[str, Any]:
    """What a kernel is compiled for, with the compiler's options."""
    tile = call.tile
    found: dict[str, Any] = {
        "world": call.world,
        "bm": tile.rows,
        "bn": tile.columns,
        "bk": tile.depth,
        "group": tile.group,
        "even": call.k % tile.depth == 0 and call.n % tile.columns == 0,
        "biased": call.biased,
        "activation": ACTIVATIONS[call.activation],
        "interpreted": interpreted(),
        "enable_fp_fusion": True,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }
    if call.operation == "all_gather_matmul":
        return {**found, "chunks": call.chunks, "copied": tile.copied}
    return {**found, "everywhere": call.operation == "matmul_all_reduce"}


def gathered(call: Call, group: dist.ProcessGroup, device: torch.device) -> Tensor:
    """The shards of others, in their places, after an all_gather_matmul and until the next launch."""
    memory = workspace(group, device).memory
    return memory.get_buffer(memory.rank, (call.m, call.k), call.dtype)
