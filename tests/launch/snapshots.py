"""Real snapshots for the command line: of a job of two ranks, FSDP2, at four steps, on a local and a durable level."""

from collections.abc import Sequence
from pathlib import Path

import resilient
from resilient.checkpoint.checkpointer import Checkpointer
from tests.multiprocess import distributed_jobs as jobs

STEPS = (1, 2, 3, 4)
RANKS = 2


def save(url: str, local: str) -> None:
    """On every rank."""
    policy = resilient.Policy(durable_every=1, keep_last=9, local=local, local_keep_last=9, fence_timeout_s=60)
    job = jobs.made(jobs.fsdp, 1)
    checkpointer = Checkpointer(url, job.state, policy)
    for step in STEPS:
        job.step()
        checkpointer.save(step).durable("durable").result(60)
    assert checkpointer.close() == []


def image(run: Path, step: int, rank: int) -> Path:
    return run / f"step_{step:08d}" / f"rank_{rank:05d}-of-{RANKS:05d}.safetensors"


def record(run: Path, step: int, rank: int) -> Path:
    return image(run, step, rank).with_suffix(".json")


def flip(path: Path, offset: int = -100) -> None:
    """Turn over all bits of one byte."""
    data = bytearray(path.read_bytes())
    data[offset] ^= 255
    path.write_bytes(data)


def contents(*folders: Path) -> dict[str, bytes]:
    """Every file below, by path."""
    return {str(path): path.read_bytes() for folder in folders for path in sorted(folder.rglob("*")) if path.is_file()}


def names(lines: Sequence[str]) -> list[str]:
    return [line.split()[0] for line in lines if line.strip()]
