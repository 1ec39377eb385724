"""What the ranks of `test_stopping.py` do: functions for `ranks.run`."""

import logging
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import resilient
from resilient.checkpoint.checkpointer import Checkpointer
from resilient.errors import Preempted
from tests.checkpoint.jobs import Job, differences, facts
from tests.multiprocess.distributed_jobs import made

_MANY = 3000


def policy(**keys: Any) -> resilient.Policy:
    return resilient.Policy(
        preempt_signals="SIGUSR1", regroup_signals="SIGUSR2", durable_every=0, agent_idle_s=60, **keys
    )


def stopped_by(make: Callable[[], Job], url: str, folder: str, number: int, rank: int) -> tuple[int, int]:
    """Step until stopped by a signal that one rank gets at step 7, and keeps getting; where it stopped, the code."""
    job = made(make, 1)
    checkpointer = Checkpointer(url, job.state, policy(grace_s=60.0))
    try:
        for step in range(1, _MANY):
            job.step()
            if step >= 7 and dist.get_rank() == rank:
                os.kill(os.getpid(), number)
            checkpointer.save(step)
    except Preempted as end:
        os.kill(os.getpid(), number)  # an impatient scheduler
        torch.save(facts(job.state), f"{folder}/{dist.get_rank()}")
        return end.step, int(str(end.code))
    raise AssertionError("it was never stopped")


def stopped_in_a_long_step(make: Callable[[], Job], url: str, folder: str) -> tuple[int, int]:
    """The machine goes before the step that is under way can end; the step before it is durable when it ends."""
    job = made(make, 1)
    checkpointer = Checkpointer(url, job.state, policy(grace_s=0.5))
    try:
        for step in range(1, _MANY):
            if step == 6:
                torch.save(facts(job.state), f"{folder}/{dist.get_rank()}")
                if dist.get_rank() == 0:
                    os.kill(os.getpid(), signal.SIGUSR1)
                wait_for(Path(url), 5)
            job.step()
            checkpointer.save(step)
            if step < 6:
                time.sleep(0.3)  # how long a step takes
    except Preempted as end:
        return end.step, int(str(end.code))
    raise AssertionError("it was never stopped")


def wait_for(url: Path, step: int) -> None:
    deadline = time.monotonic() + 40
    while len(list(url.glob(f"step_{step:08}/rank_*.json"))) < dist.get_world_size():
        assert time.monotonic() < deadline, f"step {step} is not durable"
        time.sleep(0.05)


def come_back(make: Callable[[], Job], url: str, folder: str) -> tuple[int | None, list[str], list[str]]:
    """Restore; the step, the levels that it came from, and what differs from the moment of the stop."""
    job = made(make, 2)
    with Checkpointer(url, job.state, policy()) as checkpointer:
        step = checkpointer.restore()
        assert checkpointer.last_restore is not None
        then = torch.load(f"{folder}/{dist.get_rank()}", weights_only=False)
        return step, sorted({*checkpointer.last_restore.levels.values()}), differences(then, facts(job.state))


def ask_for_it(make: Callable[[], Job], url: str, durable: bool) -> tuple[int, int]:
    """As a program that knows by itself that it has to stop; the last rank asks."""
    job = made(make, 1)
    checkpointer = Checkpointer(url, job.state, policy())
    if dist.get_rank() == dist.get_world_size() - 1:
        checkpointer.request_stop(durable=durable)
    try:
        for step in range(10, 10 * _MANY, 10):
            job.step()
            checkpointer.save(step)
    except Preempted as end:
        return end.step, int(str(end.code))
    raise AssertionError("it was never stopped")


def stop_into_a_url_that_fails(make: Callable[[], Job], url: str) -> tuple[int, str]:
    """The folder is gone for good when the step is to be made durable there."""
    job = made(make, 1)
    checkpointer = Checkpointer(url, job.state, policy(retries=1))
    told: list[str] = []
    job.step()
    checkpointer.save(1).durable("memory").result(40)
    dist.barrier()
    if dist.get_rank() == 0:
        Path(url).rename(f"{url}-away")
        Path(url).write_text("in the way")
    dist.barrier()
    checkpointer.request_stop()
    with _Listening(told):
        try:
            for step in range(2, _MANY):
                job.step()
                checkpointer.save(step)
        except Preempted as end:
            return end.step, " ".join(told)
    raise AssertionError("it was never stopped")


class _Listening(logging.Handler):
    def __init__(self, told: list[str]) -> None:
        super().__init__()
        self._told = told

    def emit(self, record: logging.LogRecord) -> None:
        self._told.append(record.getMessage())

    def __enter__(self) -> None:
        logging.getLogger("resilient").addHandler(self)

    def __exit__(self, *_: object) -> None:
        logging.getLogger("resilient").removeHandler(self)
