"""DeepSpeed with a checkpoint at every step: ours through the hook, against its own checkpoint engines.

The GPT of 48 M parameters trains with ZeRO-1 on two ranks of one thread each. Blocked is what a step costs more than it
costs bare: the call of save_checkpoint and, with ours, the fence before the optimizer. The time from end to end runs
until the last checkpoint is safe: in memory, or on the disk; DeepSpeed's engines do not fsync and are left so, and
older checkpoints of theirs are deleted outside of the time. An engine that does not run here is named with its reason.
"""

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from bench.processes import Failure, launch
from bench.report import Report, Rounds, Target, least, ratio
from bench.settings import Settings

BARE, MEMCPY = "no checkpoint", "one memcpy"
MEMORY, DURABLE = "resilient, memory", "resilient, memory + durable"
TORCH = "DeepSpeed, torch"
PEERS = (TORCH, "DeepSpeed, writer python", "DeepSpeed, writer fast", "DeepSpeed, decoupled", "DeepSpeed, DataStates")
METHODS = (BARE, MEMCPY, MEMORY, DURABLE, *PEERS)
_WRITER = {"data_parallel": "replica", "io_buffer_size": 1 << 26}
_BLOCKS: dict[str, dict[str, Any]] = {
    "DeepSpeed, writer python": {"checkpoint": {"writer": {"type": "python", "decoupled": False, **_WRITER}}},
    "DeepSpeed, writer fast": {"checkpoint": {"writer": {"type": "fast", "decoupled": False, **_WRITER}}},
    "DeepSpeed, decoupled": {"checkpoint": {"writer": {"type": "python", "decoupled": True, **_WRITER}}},
    "DeepSpeed, DataStates": {"datastates_ckpt": {"host_cache_size": 2}},
}


def measure(*, folder: str, method: str, shape: str, steps: int) -> dict[str, Any]:
    """Train with a save after every step. Runs in a process a rank. An engine that fails does so on all: "failed"."""
    try:
        return _measure(folder, method, shape, steps)
    except Exception as error:
        if method not in PEERS:
            raise
        return {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"}


def _measure(folder: str, method: str, shape: str, steps: int) -> dict[str, Any]:
    job = _Job(Path(folder), method, shape)
    for _ in range(2):
        job.step()
    job.save(job.wait)  # plans, allocates, starts processes: not counted, for any method
    job.step()
    began, spare = time.perf_counter(), 0.0
    took, blocked = [], []
    for _ in range(steps):
        stepped = job.step()
        called = time.perf_counter()
        job.save()
        call = time.perf_counter() - called
        blocked.append(call + job.stalled())
        took.append(stepped + call)
        called = time.perf_counter()
        job.tidy()
        spare += time.perf_counter() - called
    job.wait()
    total = time.perf_counter() - began - spare
    job.finish()
    return {"total": total, "step": median(took), "blocked": median(blocked)}


class _Job:
    """An engine and one way to save it."""

    def __init__(self, folder: Path, method: str, shape: str) -> None:
        os.environ["DS_ACCELERATOR"] = "cpu"
        os.environ |= {"CROSS_SIZE": "1", "CROSS_RANK": "0", "LOCAL_SIZE": os.environ.get("WORLD_SIZE", "1")}
        import deepspeed
        import deepspeed.ops
        import torch

        from bench.state import SHAPES, Gpt

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else it compiles this for a minute
        deepspeed.init_distributed("gloo")
        torch.manual_seed(0)
        self._folder, self._method = folder, method
        chosen = SHAPES[shape]
        self._tokens = torch.randint(chosen.vocabulary, (chosen.batch, chosen.context))
        model = Gpt(chosen)
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": chosen.batch,
            "steps_per_print": 1 << 30,
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {"stage": 1},
            **_BLOCKS.get(method, {}),
        }
        if method in (MEMORY, DURABLE):
            policy = {"durable_every": int(method == DURABLE), "keep_last": 1, "agent_idle_s": 30.0}
            config["resilient"] = {"url": str(folder / "run"), "policy": policy}
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        self._engine: Any
        self._engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        self._hook: Any = None
        if "resilient" in config:
            from resilient.launch.deepspeed import attach

            self._hook = attach(self._engine)
        self._copies: list[Any] = []
        self._fenced = 0.0

    def step(self) -> float:
        """One step; the seconds that it took."""
        from torch.nn import functional as F

        began = time.perf_counter()
        logits = self._engine(self._tokens)
        self._engine.backward(F.cross_entropy(logits.flatten(0, 1), self._tokens.flatten()))
        self._engine.step()
        return time.perf_counter() - began

    def save(self, then: Callable[[], object] | None = None) -> None:
        if self._method == MEMCPY:
            self._copy()
        elif self._method != BARE:
            self._engine.save_checkpoint(str(self._folder / "out"))
        if then is not None:
            then()

    def stalled(self) -> float:
        """Seconds at the fence of the step before."""
        return float(self._hook.checkpointer.statistics.fence_seconds[-1]) if self._hook is not None else 0.0

    def wait(self) -> None:
        """Until what was saved last is safe."""
        if self._hook is not None:
            self._hook.checkpointer.fence()
            handle = self._hook._handle
            handle.durable("durable" if self._method == DURABLE else "memory").result(120)

    def tidy(self) -> None:
        """Delete all of DeepSpeed's own checkpoints but the newest."""
        import torch.distributed as dist

        if self._method in PEERS and dist.get_rank() == 0:
            kept = f"global_step{self._engine.global_steps}"
            for one in (self._folder / "out").iterdir():
                if one.is_dir() and one.name != kept:
                    shutil.rmtree(one)
        if self._method in PEERS:
            dist.barrier()

    def finish(self) -> None:
        if self._hook is not None:
            self._hook.close()

    def _copy(self) -> None:
        """All that this rank's image would have, into memory that is there already."""
        import torch

        optimizer = self._engine.optimizer
        held = list(optimizer.single_partition_of_fp32_groups)
        held += [one for state in optimizer.optimizer.state.values() for one in state.values() if one.dim()]
        if not self._copies:
            self._copies = [torch.empty_like(one) for one in held]
        with torch.no_grad():
            for copy, one in zip(self._copies, held, strict=True):
                copy.copy_(one)


def run(settings: Settings) -> list[Report]:
    rounds = Rounds()
    steps = 2 if settings.smoke else 5 if settings.quick else 10
    for number in range(settings.rounds):
        rounds.begin()
        for method in settings.turned(METHODS, number):
            settings.say(f"deepspeed_hook, round {number + 1} of {settings.rounds}: {method}")
            arguments = {"method": method, "shape": "tiny" if settings.smoke else "medium", "steps": steps}
            how: dict[str, Any] = {"ranks": 2, "threads": 1, "timeout_s": 300}
            measured = launch(settings.place, "bench.deepspeed_hook:measure", arguments, **how)
            if isinstance(measured, Failure) or "failed" in measured:
                reason = measured.reason if isinstance(measured, Failure) else measured["failed"]
                rounds.failed(method, reason)
            else:
                rounds.add(method, measured)
    return [report(rounds, f"DeepSpeed, ZeRO-1, two ranks: a checkpoint at every one of {steps} steps")]


def report(rounds: Rounds, title: str) -> Report:
    bare, copied = rounds.series(BARE, "total"), rounds.series(MEMCPY, "total")
    built_in = rounds.series(TORCH, "blocked")
    rows: dict[str, list[float | None]] = {}
    for method in METHODS:
        total, blocked = rounds.series(method, "total"), rounds.series(method, "blocked")
        rows[method] = [
            ratio(blocked, rounds.series(BARE, "step")),
            ratio(blocked, built_in),
            ratio(total, bare),
            ratio(total, copied),
        ]
    quickest = least([rounds.series(peer, "total") for peer in PEERS])
    targets = [
        Target(what=f"blocked: {MEMORY} / {TORCH}", value=rows[MEMORY][1], bound=1 / 20),
        Target(what=f"blocked: {DURABLE} / {TORCH}", value=rows[DURABLE][1], bound=1 / 20),
        Target(what=f"end to end: {MEMORY} / (bare + memcpy)", value=rows[MEMORY][3], bound=1.10),
        Target(
            what=f"end to end: {DURABLE} / quickest engine of DeepSpeed",
            value=ratio(rounds.series(DURABLE, "total"), quickest),
            bound=1.0,
        ),
    ]
    return Report(
        name="deepspeed_hook",
        title=title,
        columns=("blocked / bare step", f"blocked / {TORCH}", "total / bare", "total / (bare + memcpy)"),
        rows=rows,
        targets=targets,
        plotted=("blocked / bare step", "total / bare"),
        samples=rounds.samples,
        failures=rounds.failures,
        notes=("Ours brings what is durable onto the medium; DeepSpeed leaves that to the system.",),
    )
