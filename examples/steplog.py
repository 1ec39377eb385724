"""What the example job writes down about itself, and the digests by which two runs are compared.

One line of JSON a step, appended and flushed, so that the steps of a life that was killed are still there. The log is
for people and for `examples/demo.py`; nothing is restored from it. All times are seconds since the epoch, because they
are compared between processes of one machine.
"""

import hashlib
import json
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One finished step on rank 0. `call_s`: how long `save` kept the training thread."""

    step: int
    life: int
    loss: float
    began: float
    ended: float
    call_s: float


class StepLog:
    """The steps of one rank. Without a path, or on other ranks than 0, it only remembers the newest one."""

    def __init__(self, path: Path | None, *, rank: int) -> None:
        self._path = path
        self._writes = path is not None and rank == 0
        self.last: Step | None = None

    def append(self, step: Step) -> None:
        self.last = step
        if self._writes and self._path:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(step)) + "\n")

    def mark_kill(self, step: int) -> None:
        """Write down, from whichever rank, that it kills itself now."""
        if self._path:
            write_whole(kill_mark(self._path), {"step": step, "time": time.time()})

    def mark_loss(self, step: int) -> bool:
        """Ask, from whichever rank, for the loss of its node; whether nobody has done so before."""
        if self._path is None or loss_mark(self._path).exists():
            return False
        write_whole(loss_mark(self._path), {"step": step, "time": time.time()})
        return True

    def history(self) -> list[Step]:
        return read_steps(self._path) if self._path else []


def kill_mark(log: Path) -> Path:
    """Where the time of the kill is written, beside the log."""
    return log.with_name(log.name + ".kill")


def loss_mark(log: Path) -> Path:
    """Where a rank asks for the loss of its node, beside the log."""
    return log.with_name(log.name + ".loss")


def read_steps(path: Path) -> list[Step]:
    """The lines of a log in the order in which they were written; a half-written last line is left out."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [Step(**json.loads(line)) for line in lines if line.endswith("\n")]


def losses(steps: list[Step]) -> dict[str, float]:
    """The loss of every step; where a step was run twice, that of the later life."""
    return {str(step.step): step.loss for step in steps}


def write_whole(path: Path, value: dict[str, Any]) -> None:
    """Write JSON so that a reader sees all of it or none."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(value, indent=1), encoding="utf-8")
    os.replace(part, path)


def digest_of_tensors(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over names, dtypes, shapes and bytes, in the order of the names."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def digest_of_optimizer(optimizer: torch.optim.Optimizer) -> str:
    """sha256 over every tensor of the optimizer and over its param groups, learning rate included."""
    state = optimizer.state_dict()
    tensors = {
        f"{index}.{name}": torch.as_tensor(value)
        for index, moments in state["state"].items()
        for name, value in moments.items()
    }
    groups = json.dumps(state["param_groups"], sort_keys=True)
    return hashlib.sha256((digest_of_tensors(tensors) + groups).encode()).hexdigest()
