"""What the forked processes of these tests run. Arguments and results are JSON."""

import os
import threading
from concurrent.futures import Future
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from resilient.checkpoint.checkpointer import Checkpointer
from resilient.errors import ResilientError
from resilient.policy import Policy
from tests.bad_days.training import Training


def tell(word: str) -> None:
    """Say something to the test: one line, appended at once."""
    with (Path(os.environ["BAD_DAY_FOLDER"]) / "told").open("a") as file:
        file.write(f"{word}\n")


def tell_complete(done: "Future[int]") -> None:
    if done.exception() is None:
        tell(f"complete {done.result()}")


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
        handle.durable("memory").add_done_callback(tell_complete)
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


def tear(rank: int, world_size: int, meeting: str, url: str, torn_rank: int) -> dict[str, Any]:
    """Each rank saves its own big model; one changes it while a capture is under way, at odd steps from 3."""
    join(rank, world_size, meeting)
    training = Training(width=768, layers=4, seed=rank)
    outcomes: dict[str, Any] = {}
    values = [parameter.data for parameter in training.model.parameters()]
    with Checkpointer(url, training.state, Policy(durable_every=0)) as checkpointer:
        for step in range(1, 11):
            training.step()
            handle = checkpointer.save(step)
            if rank == torn_rank and step >= 3 and step % 2:
                torch._foreach_add_(values, 1.0)  # a defect of the program: it did not pass the fence
            error = handle.durable("memory").exception(60)
            outcomes[str(step)] = None if error is None else [type(error).__name__, str(error)]
            checkpointer.fence()
            dist.barrier()
    return outcomes


def live(
    rank: int,
    world_size: int,
    meeting: str,
    url: str,
    until: int,
    last_of: int | None = None,
    level: str = "memory",
    twist: int = 0,
    **policy: Any,
) -> dict[str, Any]:
    """One life: restore, train up to `until`; only rank `last_of` saves that last step. Dies without a word.

    Returns where it began. `twist` makes this life's numbers differ from those of others.
    """
    join(rank, world_size, meeting)
    training = Training(seed=rank)
    checkpointer = Checkpointer(url, training.state, Policy(**policy))
    start = checkpointer.restore() or 0
    digest = training.digest()
    for step in range(start + 1, until + 1):
        if twist:
            torch.manual_seed(1000 * twist + rank)
        training.step()
        if step == until and last_of not in (None, rank):
            continue
        handle = checkpointer.save(step)
        if step < until:
            handle.durable(level).result(60)
        else:
            checkpointer.close(keep_memory=True)  # until what this rank has of it is written
    return {"start": start, "digest": digest, "done": training.digest()}


def refuse(
    rank: int, world_size: int, meeting: str, url: str, odd_rank: int | None = None, **policy: Any
) -> dict[str, Any]:
    """Try to begin; returns the error that this rank gets, and whether its state is as it was.

    The model of `odd_rank` is another one.
    """
    join(rank, world_size, meeting)
    training = Training(width=48 if rank == odd_rank else 32, seed=3)
    training.run(1, 1)
    before = training.digest()
    try:
        checkpointer = Checkpointer(url, training.state, Policy(**policy))
        checkpointer.restore()
    except ResilientError as error:
        return {"error": type(error).__name__, "message": str(error), "untouched": training.digest() == before}
    return {"error": None}


def leave_open(url: str) -> None:
    """End without close()."""
    training = Training(width=512, layers=4)
    checkpointer = Checkpointer(url, training.state, Policy(durable_every=0))
    training.run(1, 3, checkpointer)


def hold(url: str, **policy: Any) -> None:
    """Save one step and stay until killed."""
    training = Training()
    checkpointer = Checkpointer(url, training.state, Policy(**policy))
    training.run(1, 1, checkpointer)[-1].durable("durable").result(60)
    tell("holding")
    threading.Event().wait()


def late(rank: int, world_size: int, meeting: str, url: str) -> str:
    """Rank 1 has no memory for its image, and says so before rank 0 begins the step; the error that each rank gets."""
    join(rank, world_size, meeting)
    training = Training()
    budget = 50_000 if rank == 1 else None
    with Checkpointer(url, training.state, Policy(durable_every=0, memory_budget=budget)) as checkpointer:
        if rank == 0:
            dist.barrier()
        error = checkpointer.save(1).durable("memory").exception(20)
        if rank == 1:
            dist.barrier()
    return type(error).__name__
