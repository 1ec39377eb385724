"""Lanes for models whose process group is another: a DDP communication hook, and FSDP2's all-gather and reduce-scatter.

striped = stripe(group)                                     # on all its ranks
model.register_comm_hook(striped, all_reduce_hook)          # DDP
module.set_custom_all_gather(AllGather(striped))            # FSDP2, each module
module.set_custom_reduce_scatter(ReduceScatter(striped))
"""

import hashlib
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _get_default_store

from resilient.comms.backend.opening import open_group
from resilient.comms.backend.options import Options
from resilient.comms.backend.striped import Striped
from resilient.comms.collectives.fold import Reduction
from resilient.errors import UsageError


def stripe(group: dist.ProcessGroup | None = None, *, timeout: timedelta = timedelta(minutes=30)) -> Striped:
    """Lanes among the ranks of a group, of whatever backend; all its ranks call it, in the same order of calls.

    Blocks until all are there. Raises UsageError on all ranks alike where lanes would not pay: the message says why.
    """
    ranks = dist.get_process_group_ranks(group if group is not None else dist.group.WORLD)
    name = hashlib.sha256(str(ranks).encode()).hexdigest()[:16]
    job = _get_default_store()  # which also counts: a rank that was replaced has to meet those that were not
    count = job.add(f"resilient/stripe/{name}/calls/{dist.get_rank(group)}", 1)
    store: Any = dist.PrefixStore(f"resilient/stripe/{name}/{count}", job)
    seconds = timeout.total_seconds()
    opened = open_group(store, dist.get_rank(group), len(ranks), Options.from_environment(), seconds)
    if opened.striped is None:
        raise UsageError(f"these {len(ranks)} ranks get no lanes: {opened.decision.reason}")
    return opened.striped


def all_reduce_hook(striped: Striped, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """For `DistributedDataParallel.register_comm_hook(striped, all_reduce_hook)`: averages gradients over lanes."""
    future = striped.all_reduce(bucket.buffer(), "avg").get_future()
    return future.then(lambda done: done.value()[0])


class _Allocating:
    def __init__(self, striped: Striped) -> None:
        self.striped = striped

    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)


class AllGather(_Allocating):
    """For `FSDPModule.set_custom_all_gather`; the module's group must be the one that was striped."""

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> dist.Work | None:
        _same(self.striped, group)
        work = self.striped.all_gather(output_tensor, input_tensor)
        return _waited(work, async_op)


class ReduceScatter(_Allocating):
    """For `FSDPModule.set_custom_reduce_scatter`; the module's group must be the one that was striped."""

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: Any, async_op: bool = False
    ) -> dist.Work | None:
        _same(self.striped, group)
        kinds: dict[Any, Reduction] = {dist.ReduceOp.SUM: "sum", dist.ReduceOp.AVG: "avg"}
        reduction: Reduction | None = next((name for known, name in kinds.items() if op == known), None)
        if reduction is None:
            raise UsageError(f"FSDP asked for {op}; lanes add up or average: do not set a gradient divide factor")
        return _waited(self.striped.reduce_scatter(output_tensor, input_tensor, reduction), async_op)


def _same(striped: Striped, group: dist.ProcessGroup) -> None:
    if group.size() != striped.size or group.rank() != striped.rank:
        raise UsageError(
            f"the module shards over {group.size()} ranks, and lanes were made for {striped.size}: "
            "call stripe() with the module's own group"
        )


def _waited(work: dist.Work, async_op: bool) -> dist.Work | None:
    if async_op:
        return work
    work.wait()
    return None
