"""Jobs of the installed DeepSpeed whose checkpoints are ours, for `test_deepspeed_hook*.py`."""

import hashlib
import os
import signal
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.multiprocess import deepspeed_jobs as jobs
from tests.multiprocess.deepspeed_jobs import SAVED_AT, Live, live, prepare, states_of, train, training

OFFLOAD: Mapping[str, Any] = {
    "zero_optimization": {"offload_optimizer": {"device": "cpu"}},
    "zero_force_ds_cpu_optimizer": False,  # torch's AdamW, which needs no compiler
}
OFFLOAD_ALL: Mapping[str, Any] = {
    **OFFLOAD,
    "zero_optimization": {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """One way to train. `blocks`: of the configuration, beside stage and precision."""

    stage: int
    dtype: str
    optimizer: str = "adamw"
    blocks: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        offload = "-offload" if self.blocks else ""
        return f"zero{self.stage}-{self.dtype}-{self.optimizer}{offload}"

    @property
    def overflows(self) -> tuple[int, ...]:
        """Steps that are skipped, one before and one after the last checkpoint: the second lowers the loss scale."""
        return (1, SAVED_AT + 1) if self.dtype == "float16" else ()


@dataclass(frozen=True, slots=True)
class Resumed:
    """What an engine held after a load, and what it did then."""

    held: Any
    losses: list[float]
    client: dict[str, Any]
    path: str
    levels: dict[int, str]
    facts: dict[str, Any]


def block(url: str, **more: Any) -> dict[str, Any]:
    """The block of a configuration. Each url is a run of its own on the node."""
    policy = {"run_id": url.strip("/").replace("/", "-")[-60:], "keep_last": 100, **more.pop("policy", {})}
    return {"resilient": {"url": url, "policy": policy, **more}}


def train_and_die(folder: str, ways: list[Way]) -> None:
    """Train each way, with a checkpoint at every step; then all processes are killed.

    Below `<folder>/<way>`: snapshots in `run`, names in `out`; by rank 0 what the engine held at each saved step
    (`live_<step>.pt`), and the losses of the steps that followed the last (`losses.pt`).
    """
    for way in ways:
        place = Path(folder) / way.name
        blocks = {**way.blocks, **block(f"{place}/run")}
        context = training(way.stage, way.dtype, way.optimizer, blocks=blocks)
        engine = context.__enter__()  # never left: nothing may be closed in good order
        _open.append(context)
        from resilient.launch.deepspeed import attach

        attach(engine)
        for step in range(SAVED_AT):
            train(engine, range(step, step + 1), way.overflows)
            engine.save_checkpoint(f"{place}/out", client_state={"note": way.name, "seen": step})
            held = live(engine, states_of(way.optimizer))  # before the next step, as the snapshot has to be
            if dist.get_rank() == 0:
                torch.save(held, place / f"live_{step + 1}.pt")
        facts = {"loaded": _facts(engine)}
        losses = train(engine, range(SAVED_AT, SAVED_AT + 3), way.overflows)
        facts["after"] = _facts(engine)
        if dist.get_rank() == 0:
            torch.save({"losses": losses, "facts": facts}, place / "after.pt")
    dist.barrier()
    os.kill(os.getpid(), signal.SIGKILL)


_open: list[Any] = []


def resume_all(folder: str, pairs: list[tuple[Way, Way]], keep_memory: bool) -> list[Resumed]:
    """Load what each first way has saved into an engine of the second one, which differs in everything, and go on."""
    from resilient.launch.deepspeed import attach

    found = []
    for saved, way in pairs:
        place = Path(folder) / saved.name
        with training(
            way.stage, way.dtype, way.optimizer, seed=2, blocks={**way.blocks, **block(f"{place}/run")}
        ) as engine:
            for group in engine.optimizer.param_groups:
                group["lr"], group["weight_decay"] = 0.5, 0.5
            hook = attach(engine)
            path, client = engine.load_checkpoint(f"{place}/out")
            done = hook.checkpointer.last_restore
            assert path is not None
            assert client is not None
            assert done is not None
            held = jobs._listed(live(engine, states_of(way.optimizer)))
            facts = {"loaded": _facts(engine)}
            losses = train(engine, range(SAVED_AT, SAVED_AT + 3), way.overflows)
            facts["after"] = _facts(engine)
            found.append(Resumed(held, losses, client, path, dict(done.levels), facts))
            hook.close(keep_memory=keep_memory)
    return found


def _facts(engine: Any) -> dict[str, Any]:
    """Hyperparameters and counters; the loss scale changes on the way."""
    optimizer = engine.optimizer
    return {
        "groups": [[group["lr"], group["weight_decay"]] for group in optimizer.param_groups],
        "steps": engine.global_steps,
        "samples": engine.global_samples,
        "epoch": engine.lr_scheduler.last_epoch,
        "scale": getattr(optimizer, "loss_scale", None),
        "skipped": engine.skipped_steps,
    }


# ---- a step that follows at once


class Wide(nn.Module):
    """Large enough that copies are under way for a while."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layers = nn.ModuleList(nn.Linear(640, 640) for _ in range(8))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return x


def step_at_once(folder: str, stages: list[int]) -> dict[int, tuple[list[str], list[str]]]:
    """With each stage, ZeRO-2 with offload: save when the gradients are ready, and step at once; so three times.

    By stage the digests of what the engine held before each step, and what failed.
    """
    deepspeed = prepare()
    from resilient.launch.deepspeed import attach

    found = {}
    for stage in stages:
        config = {
            "train_micro_batch_size_per_gpu": 2,
            "steps_per_print": 1000,
            "bf16": {"enabled": True},
            "zero_allow_untested_optimizer": True,
            **OFFLOAD,
            "zero_optimization": {"stage": stage, **(OFFLOAD["zero_optimization"] if stage == 2 else {})},
            **block(f"{folder}/{stage}"),
        }
        model = Wide()
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=torch.optim.AdamW(model.parameters(), lr=0.1), config=config
        )
        hook = attach(engine)
        digests, problems = [], []
        for step in range(3):
            x = torch.randn(2, 640, generator=torch.Generator().manual_seed(step)).bfloat16()
            engine.backward(engine(x).float().square().mean())
            states = states_of("adamw") if step else ()  # there are none before the first step
            digests.append(digest_of(live(engine, states)))
            dist.barrier()
            engine.save_checkpoint(f"{folder}/out_{stage}")
            engine.step()
            problems += hook.checkpointer._pending.take_failures()
        problems += hook.close()
        found[stage] = digests, problems
        engine.destroy()
    return found


def digest_of(held: Live) -> str:
    """Of all tensors, by state and name."""
    found = hashlib.sha256()
    for state in sorted(held):
        for name in sorted(held[state]):
            found.update(f"{state} {name}".encode())
            found.update(held[state][name].contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
