"""What the forked processes of these tests run. Arguments and results are JSON."""

import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from resilient.checkpoint.checkpointer import Checkpointer
from resilient.policy import Policy
from tests.bad_days.training import Training


def tell(word: str) -> None:
    """Say something to the test: one line, appended at once."""
    with (Path(os.environ["BAD_DAY_FOLDER"]) / "told").open("a") as file:
        file.write(f"{word}\n")


def calm(steps: int, width: int, layers: int) -> str:
    """A training that nothing protects or disturbs."""
    training = Training(width, layers)
    training.run(1, steps)
    return training.digest()


def train(
    url: str, steps: int, width: int = 32, layers: int = 2, await_level: str | None = None, **policy: Any
) -> dict[str, Any]:
    """Restore if there is something, train up to `steps`, saving each; tells what becomes complete in memory.

    With `await_level` each step waits until its snapshot is complete there, and tells that too.
    """
    training = Training(width, layers)
    checkpointer = Checkpointer(url, training.state, Policy(**policy))
    start = checkpointer.restore() or 0
    restored = checkpointer.last_restore
    tell(f"restored {start} from {restored.levels[0] if restored else 'nothing'}")
    for step in range(start + 1, steps + 1):
        training.step()
        handle = checkpointer.save(step)
        handle.durable("memory").add_done_callback(
            lambda done, step=step: tell(f"complete {step}") if done.exception() is None else None
        )
        tell(f"saved {step}")
        if await_level is not None:
            handle.durable(await_level).result(60)
            tell(f"{await_level} {step}")
    problems = checkpointer.close()
    return {"digest": training.digest(), "start": start, "problems": problems}


def join(rank: int, world_size: int, meeting: str) -> None:
    """Become a rank of a gloo world."""
    dist.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=world_size, timeout=timedelta(seconds=60)
    )
    torch.manual_seed(0)


def replicas(
    rank: int, world_size: int, meeting: str, url: str, steps: int, keep: bool = False, **policy: Any
) -> dict[str, Any]:
    """A DDP training on several ranks; the replicas share what they save."""
    join(rank, world_size, meeting)
    training = Training(width=64)
    replicated = DistributedDataParallel(training.model)
    checkpointer = Checkpointer(url, {"model": replicated, "optimizer": training.optimizer}, Policy(**policy))
    start = checkpointer.restore() or 0
    restored = checkpointer.last_restore
    last = None
    for step in range(start + 1, steps + 1):
        training.step(replicated)
        last = checkpointer.save(step)
    if last is not None:
        for level in last.levels:
            last.durable(level).result(60)
    digest = training.digest()
    dist.barrier()
    checkpointer.close(keep_memory=keep)
    levels = [restored.levels[one] for one in range(world_size)] if restored else None
    return {"digest": digest, "start": start, "levels": levels}
