"""From the kill of a rank to the end of the first new step of a job under `resilient run`: from memory, from the disk.

Two ranks with one thread each train a GPT of 48 M parameters (570 MB with AdamW's moments). At a step that is safe
rank 1 is killed by SIGKILL, for "disk" together with the agent, so that no memory is left. Timed from there, once to
the end of the restore and once to the end of the first step: the launcher notices, Python and torch start, the ranks
join, the state is loaded. Beside them the same job with torch.save and torch.load. "restore alone" is what the
library says of its own part, so the rest is what any restart costs.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

from bench.processes import Failure, launch
from bench.report import Report, Rounds, Target, ratio
from bench.settings import Settings

MEMORY, DISK, TORCH = "resilient, from memory", "resilient, from the disk", "torch.save and torch.load"
METHODS = (MEMORY, DISK, TORCH)
_LAUNCHER = ("-m", "resilient.launch.cli", "run", "--max-restarts", "1", "--nproc-per-node", "2")
_KILLED_AT = 3


def measure(*, folder: str, method: str, shape: str) -> dict[str, Any]:
    """Train; in the first life until a rank is killed, in the second for one step. In one process a rank."""
    from bench.state import SHAPES, Training

    os.environ["RESILIENT_RUNTIME_DIR"] = folder  # so that the agent is found, and is no other's
    training = Training(SHAPES[shape])
    job = (_torch if method == TORCH else _resilient)(training, Path(folder))
    mark = Path(folder) / "killed"
    if not mark.exists():
        for step in range(1, _KILLED_AT + 1):
            training.step(nullcontext)
            job["save"](step)
        _be_killed(mark, Path(folder), with_agent=method == DISK)
    assert job["restored"] == _KILLED_AT, f"step {job['restored']} was restored"
    restored_at = time.time()
    training.step(nullcontext)
    stepped_at = time.time()
    killed_at = json.loads(mark.read_text())
    job["close"]()
    return {
        "restored": restored_at - killed_at,
        "stepped": stepped_at - killed_at,
        "alone": job["seconds"],
        "memory": float(job["level"] == "memory"),
    }


def _resilient(training: Any, folder: Path) -> dict[str, Any]:
    from resilient.checkpoint.checkpointer import Checkpointer
    from resilient.policy import Policy

    state = {"model": training.model, "optimizer": training.optimizer}
    checkpointer = Checkpointer(str(folder / "run"), state, Policy(durable_every=_KILLED_AT))
    step = checkpointer.restore()
    restored = checkpointer.last_restore

    def save(step: int) -> None:
        handle = checkpointer.save(step)
        checkpointer.fence()
        for level in handle.levels:
            handle.durable(level).result()

    return {
        "save": save,
        "restored": step,
        "seconds": restored.seconds if restored else 0.0,
        "level": restored.levels[0] if restored else None,
        "close": checkpointer.close,
    }


def _torch(training: Any, folder: Path) -> dict[str, Any]:
    import torch
    import torch.distributed as dist

    path, parts = folder / "state.pt", (training.model, training.optimizer)
    began = time.perf_counter()
    step = None
    if path.exists():
        step, *states = torch.load(path)
        for part, state in zip(parts, states, strict=True):
            part.load_state_dict(state)

    def save(step: int) -> None:
        if dist.get_rank() == 0 and step == _KILLED_AT:
            with path.open("wb") as file:
                torch.save((step, *(part.state_dict() for part in parts)), file)
                os.fsync(file.fileno())
        dist.barrier()

    close: Callable[[], object] = dist.barrier
    return {"save": save, "restored": step, "seconds": time.perf_counter() - began, "level": "disk", "close": close}


def _be_killed(mark: Path, runtime: Path, *, with_agent: bool) -> None:
    """Rank 1 dies, and with it the agent if the memory is to be lost; rank 0 waits until it is ended for that."""
    import torch.distributed as dist

    dist.barrier()
    if dist.get_rank() == 1:
        if with_agent:
            for pid in _agents(runtime):
                os.kill(pid, signal.SIGKILL)
        mark.write_text(json.dumps(time.time()))
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()  # fails as the other goes
    sys.exit("rank 1 lives")


def _agents(runtime: Path) -> list[int]:
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            words = entry.read_bytes()
            if b"resilient.checkpoint.agent" in words and str(runtime).encode() in words:
                found.append(int(entry.parent.name))
    return found


def run(settings: Settings) -> list[Report]:
    rounds = Rounds()
    arguments = {"shape": "tiny" if settings.smoke else "medium"}
    for number in range(settings.rounds):
        rounds.begin()
        for method in settings.turned(METHODS, number):
            settings.say(f"restart, round {number + 1} of {settings.rounds}: {method}")
            given = {**arguments, "method": method}
            measured = launch(settings.place, "bench.restart:measure", given, threads=1, launcher=_LAUNCHER)
            if isinstance(measured, Failure):
                rounds.failed(method, measured.reason)
            else:
                rounds.add(method, measured)
    return [report(rounds)]


def report(rounds: Rounds) -> Report:
    disk = {measure: rounds.series(DISK, measure) for measure in ("restored", "stepped", "alone")}
    rows = {
        method: [ratio(rounds.series(method, measure), disk[measure]) for measure in ("stepped", "restored", "alone")]
        for method in METHODS
    }
    memory = {measure: rounds.series(MEMORY, measure) for measure in disk}
    return Report(
        name="restart",
        title="From a killed rank to the first new step, under resilient run",
        columns=("first step / from disk", "restored / from disk", "restore alone / from disk"),
        rows=rows,
        targets=[
            Target(what=f"{words}, from memory / from disk", value=ratio(memory[measure], disk[measure]), bound=1.0)
            for words, measure in (("first step", "stepped"), ("restore alone", "alone"))
        ],
        plotted=("first step / from disk", "restore alone / from disk"),
        samples=rounds.samples,
        failures=rounds.failures,
        notes=("most of the time until the first step is the start of Python and torch, and the same for all",),
    )
