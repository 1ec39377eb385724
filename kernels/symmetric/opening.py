"""Opens symmetric memory for a process group: on the host for CPU tensors, else torch's."""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from resilient.errors import UsageError
from resilient.kernels.symmetric.cuda import open_cuda
from resilient.kernels.symmetric.host import open_host
from resilient.kernels.symmetric.memory import SymmetricMemory


def open_symmetric(
    group: dist.ProcessGroup | None,
    device: torch.device,
    *,
    name: str,
    buffer_bytes: int,
    signal_words: int,
    timeout_s: float = 30.0,
    waiting: Callable[[], None] = lambda: None,
) -> SymmetricMemory:
    """Memory of that size on every rank; collective: all ranks call it with the same sizes and name.

    `name` may be used once in a group. Blocks until all ranks are there; `waiting` is called now and then, and may
    raise. Raises CollectiveTimeout naming who is not, CollectiveMismatch on all ranks when sizes differ, UsageError
    where the device or the placement of the ranks does not allow it, OverBudget when there is no room; what one rank
    alone cannot do is a CollectiveFailed or PeerGone on the others.
    """
    chosen = group if group is not None else dist.group.WORLD
    if chosen is None:
        raise UsageError("there is no process group: call torch.distributed.init_process_group first")
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"symmetric memory is for CPU and CUDA tensors, not for {device}")
    store = distributed_c10d._get_process_group_store(chosen)
    if device.type == "cuda":
        return open_cuda(
            store,
            chosen,
            device,
            name=name,
            buffer_bytes=buffer_bytes,
            signal_words=signal_words,
            timeout_s=timeout_s,
            waiting=waiting,
        )
    return open_host(
        store,
        chosen.rank(),
        chosen.size(),
        name=name,
        buffer_bytes=buffer_bytes,
        signal_words=signal_words,
        timeout_s=timeout_s,
        waiting=waiting,
    )
