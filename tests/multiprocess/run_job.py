"""A training of a few parameters that goes on until it is told to end: what `resilient run` starts in its tests.

    run_job.py FOLDER

In FOLDER: `run`, the checkpoint; `progress`, a line for each step of rank 0; `end`, which the test makes.
"""

import os
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from resilient import Checkpointer, Policy

STEP_S = 0.05


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    torch.manual_seed(0)
    model = DistributedDataParallel(torch.nn.Linear(8, 8))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    checkpointer = Checkpointer(
        str(folder / "run"), {"model": model, "optimizer": optimizer}, Policy(durable_every=1, keep_last=3)
    )
    step = checkpointer.restore() or 0
    while not _told_to_end(folder):
        step += 1
        time.sleep(STEP_S)  # the work of a step
        model(torch.ones(2, 8)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if dist.get_rank() == 0:
            with (folder / "progress").open("a") as file:
                file.write(f"{os.environ['TORCHELASTIC_RESTART_COUNT']} {dist.get_world_size()} {step}\n")
        checkpointer.save(step)  # ends the program when the ranks have agreed to stop
    checkpointer.close()
    dist.destroy_process_group()


def _told_to_end(folder: Path) -> bool:
    """The same on all ranks at the same step."""
    told = torch.tensor([float((folder / "end").exists())])
    dist.all_reduce(told, op=dist.ReduceOp.MAX)
    return bool(told.item())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
