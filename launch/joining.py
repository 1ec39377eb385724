"""Joining the process group under torchrun, for programs whose framework would do it in a way that a restart breaks.

torchrun keeps one store over all lives of a job, with the addresses of the dead still in it: a restarted gloo rank that
reads one is refused, and the restart with it. Here each life has keys of its own. Trainer, Accelerate and Lightning use
the group that is there already.
"""

import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

__all__ = ["join_group"]


def join_group(backend: str | None = None, timeout_s: float = 300.0) -> None:
    """Make the default process group under torchrun, apart from those of earlier lives; else do nothing. Collective.

    `backend`: NCCL where there is a GPU for each rank, else gloo. Call it first, before TrainingArguments or a
    Lightning Trainer is made. Raises what `init_process_group` does.
    """
    if dist.is_initialized() or not dist.is_torchelastic_launched():
        return
    own_gpu = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    if own_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    timeout = timedelta(seconds=timeout_s)
    store, rank, world_size = next(rendezvous("env://", timeout=timeout))
    life = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    dist.init_process_group(
        backend or ("nccl" if own_gpu else "gloo"),
        store=dist.PrefixStore(f"life_{life}", store),
        rank=rank,
        world_size=world_size,
        timeout=timeout,
    )
