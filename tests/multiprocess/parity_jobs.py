"""What the ranks of `test_parity.py` do: functions for `ranks.run`."""

import json
import logging
import os
import re
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

import resilient
from resilient.checkpoint.checkpointer import Checkpointer
from resilient.errors import LevelFailed
from tests.checkpoint.jobs import Job, checkpointing
from tests.multiprocess import distributed_jobs as jobs
from tests.multiprocess.distributed_jobs import made


def policy(parity: str, **keys: Any) -> resilient.Policy:
    return resilient.Policy(parity=parity, durable_every=0, agent_idle_s=60, fence_timeout_s=40, **keys)


def train_and_die(make: Callable[[], Job], url: str, folder: str, parity: str) -> None:
    """As in `distributed_jobs`: each step until it is safe in parity."""
    jobs.train_and_die(make, url, folder, policy(parity), "parity", partial(note_agent, folder=folder))


def come_back(make: Callable[[], Job], url: str, folder: str, parity: str) -> list[str]:
    """As in `distributed_jobs`, protected again; the levels that the ranks' images came from, in order."""
    levels = jobs.come_back(make, url, folder, policy(parity), "parity", partial(note_agent, folder=folder))
    return [levels[rank] for rank in sorted(levels)]


def join_without_an_address(make: Callable[[], Job], url: str) -> str:
    """Rank 1 cannot tell which of its addresses others reach; the error that each rank gets."""
    if dist.get_rank() == 1:
        os.environ["MASTER_ADDR"] = "255.255.255.255"  # nothing may be sent there
    try:
        Checkpointer(url, made(make, 1).state, policy("1+1"))
    except LevelFailed as error:
        return str(error)
    raise AssertionError("it joined")


def start_anew(make: Callable[[], Job], url: str, parity: str) -> int | None:
    with checkpointing(Path(url), made(make, 2), policy(parity)) as checkpointer:
        return checkpointer.restore()


def save_within(make: Callable[[], Job], url: str, parity: str, steps: int) -> tuple[int, list[str]]:
    """Save with the least memory_budget that is not refused; that budget, and how the saves end at the parity level."""
    job = made(make, 1)
    job.step()  # the optimizer's state is there only now
    refused = Checkpointer(url, job.state, policy(parity, memory_budget=1))
    error = refused.save(1).durable("memory").exception(40)
    refused.close()
    found = re.search(r"set memory_budget to (\d+) or more", str(error))
    assert found is not None, f"two images in one byte: {error}"
    least = max(refused.world.gather(int(found[1])))
    outcomes = []
    with checkpointing(Path(url), job, policy(parity, memory_budget=least)) as checkpointer:
        for step in range(2, 2 + steps):
            job.step()
            error = checkpointer.save(step).durable("parity").exception(40)
            outcomes.append("safe" if error is None else str(error))
    return least, outcomes


def lose_an_agent_and_go_on(make: Callable[[], Job], url: str, in_mid_save: bool) -> list[str]:
    """The agent of rank 0's node is killed between two saves, or in one; how the saves end, at the parity level."""
    job = made(make, 1)
    outcomes = []
    with checkpointing(Path(url), job, policy("2+1")) as checkpointer:
        agent = checkpointer._link.client().status()["pid"]
        for step in (1, 2, 3, 4, 5):
            job.step()
            if step == 2 and dist.get_rank() == 0 and not in_mid_save:
                os.kill(agent, signal.SIGKILL)
            saved = checkpointer.save(step).durable("parity")
            if step == 2 and dist.get_rank() == 0 and in_mid_save:
                os.kill(agent, signal.SIGKILL)
            error = saved.exception(40)
            outcomes.append("safe" if error is None else type(error).__name__)
            dist.barrier()
    return outcomes


def damage_is_mended(make: Callable[[], Job], url: str) -> bool:
    """A byte of rank 0's image changes in memory; whether it is as it was before long, and the log says so."""
    job = made(make, 1)
    told: list[str] = []
    logging.getLogger("resilient").addHandler(_Listener(told))
    with checkpointing(Path(url), job, policy("2+1", scrub_bandwidth="1 GB")) as checkpointer:
        job.step()
        checkpointer.save(1).durable("parity").result(40)
        mended = True
        if dist.get_rank() == 0:
            client = checkpointer._link.client()
            number = next(slot["slot"] for slot in client.status()["slots"] if slot["state"] == "sealed")
            image = client._slots[number].view
            before, deadline = image[5000], time.monotonic() + 30
            image[5000] = before ^ 1
            while time.monotonic() < deadline and not (image[5000] == before and any("put right" in t for t in told)):
                time.sleep(0.01)
            mended = image[5000] == before and any("put right" in text for text in told)
            del image
        dist.barrier()
    return mended


class _Listener(logging.Handler):
    def __init__(self, told: list[str]) -> None:
        super().__init__()
        self._told = told

    def emit(self, record: logging.LogRecord) -> None:
        self._told.append(record.getMessage())


def note_agent(checkpointer: Checkpointer, folder: str) -> None:
    """Leave the pid of this node's agent where the test finds it."""
    status = checkpointer._link.client().status()
    Path(folder, f"agent-{checkpointer.world.node}.json").write_text(json.dumps(status["pid"]))
