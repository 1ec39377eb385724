"""What the ranks of the tests of DCP's reader and writer do. Results travel as lists: a tensor would share memory."""

import os
import signal
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from resilient.checkpoint.checkpointer import Checkpointer
from resilient.launch.dcp import ResilientReader, ResilientWriter
from resilient.policy import Policy

Values = dict[str, Any]
POLICY = Policy(durable_every=1, keep_last=9, agent_idle_s=60)


class Job:
    """A model and its optimizer, sharded as `kind` says: "fsdp", "hsdp", "ddp" or "plain"."""

    def __init__(self, kind: str, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.model: nn.Module = nn.Sequential(nn.Linear(8, 37), nn.BatchNorm1d(37), nn.Linear(37, 5))
        world = dist.get_world_size()
        if kind == "fsdp":
            fully_shard(self.model, mesh=init_device_mesh("cpu", (world,)))
        elif kind == "hsdp":
            mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("replicate", "shard"))
            fully_shard(self.model, mesh=mesh)
        elif kind == "ddp":
            self.model = DistributedDataParallel(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)

    def step(self, number: int) -> None:
        torch.manual_seed(number)
        self.model(torch.randn(4, 8)).sum().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def state(self, step: int) -> dict[str, Any]:
        """As a program written for DCP has it."""
        model, optimizer = get_state_dict(self.model, self.optimizer)
        more = {"name": "run", "shape": (1, 2), f"loader_{dist.get_rank()}": {"position": [step, dist.get_rank()]}}
        return {"model": model, "optimizer": optimizer, "train": {"step": step}, "more": more}


def values(state: Any, prefix: str = "") -> Values:
    """All that is in a state dict, by name: tensors whole, as lists. Collective."""
    found: Values = {}
    for name, value in state.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict):
            found |= values(value, f"{key}.")
        elif isinstance(value, DTensor):
            found[key] = value.full_tensor().tolist()
        else:
            found[key] = value.tolist() if isinstance(value, Tensor) else value
    return found


def save(url: str, kind: str) -> list[Values]:
    """Steps 1 to 4: two saved at once, one behind the training, one lazily. What each had in it; the memory is kept."""
    job, writer = Job(kind), ResilientWriter(url, POLICY)
    group: Any = dist.new_group(backend="gloo")  # DCP talks on it while the training does on the default one
    seen = []
    for step in (1, 2):
        job.step(step)
        state = job.state(step)
        seen.append(values(state))
        dcp.save(state, storage_writer=writer, checkpoint_id=f"outputs/step-{step}")
    job.step(3)
    state = job.state(3)
    seen.append(values(state))
    behind: Any = dcp.async_save(state, storage_writer=writer, checkpoint_id="3", process_group=group)
    job.step(4)  # changes the tensors while that is written
    behind.result(60)
    state = job.state(4)
    seen.append(values(state))
    lazily: Any = dcp.async_save(
        state, storage_writer=writer, checkpoint_id="4", process_group=group, async_stager=writer.at(4)
    )
    lazily.staging_completion.result(60)
    job.step(5)
    lazily.upload_completion.result(60)
    writer.checkpointer().close(keep_memory=True)
    return seen


def load(url: str, kind: str, steps: list[int | None]) -> list[Values]:
    job, reader = Job(kind, seed=7), ResilientReader(url, POLICY)
    found = []
    for step in steps:
        state = job.state(0)
        # A reader remembers the step it was last asked for.
        dcp.load(
            state,
            storage_reader=reader if step else ResilientReader(url, POLICY),
            checkpoint_id=None if step is None else str(step),
        )
        found.append(values(state))
    return found


def load_model_only(url: str, kind: str) -> Values:
    state = {"model": Job(kind, seed=7).state(0)["model"]}
    dcp.load(state, storage_reader=ResilientReader(url, POLICY))
    return values(state)


def fail_to_load(url: str) -> list[str]:
    """What a rank is told when an image is damaged, and when the step is not there."""
    job, writer = Job("fsdp"), ResilientWriter(url, POLICY)
    job.step(1)
    dcp.save(job.state(1), storage_writer=writer, checkpoint_id="1")
    writer.close()
    if dist.get_rank() == 0:
        image = Path(url) / "step_00000001" / "rank_00001-of-00002.safetensors"
        with image.open("r+b") as file:
            file.seek(image.stat().st_size // 2)
            file.write(b"damaged!")
    dist.barrier()
    return [_error_of_load(url, job, step) for step in (1, 7)]


def _error_of_load(url: str, job: Job, step: int) -> str:
    try:
        dcp.load(
            job.state(0), storage_reader=ResilientReader(url, POLICY), checkpoint_id=None if step is None else str(step)
        )
    except BaseException as error:  # CheckpointException is none of Exception's
        return str(error)
    return "loaded"


def checkpoint_and_load(url: str, kind: str, loading: str) -> tuple[Values, Values]:
    """A snapshot that a Checkpointer made, by DCP's reader."""
    job = Job(kind)
    with Checkpointer(url, {"model": job.model, "optimizer": job.optimizer}, POLICY) as checkpointer:
        job.step(1)
        checkpointer.save(1).durable("durable").result(60)
        saved = values({key: value for key, value in job.state(1).items() if key in ("model", "optimizer")})
    other = Job(loading, seed=7).state(0)
    state = {"model": other["model"], "optimizer": other["optimizer"]}
    dcp.load(state, storage_reader=ResilientReader(url, POLICY))
    return saved, values(state)


def refuse_to_save(url: str, what: str) -> str:
    """What a rank is told when the state of rank 1 cannot be saved, or the step is not said."""
    state: dict[str, Any] = {"weight": torch.ones(3), "step": 1}
    if what == "code" and dist.get_rank() == 1:
        state["hook"] = lambda: None
    writer = ResilientWriter(url, POLICY)
    try:
        dcp.save(state, storage_writer=writer, checkpoint_id="newest" if what == "step" else "1")
    except BaseException as error:
        return str(error)
    finally:
        writer.close()
    return "saved"


def die_in_a_save(url: str) -> None:
    """Rank 1 is killed when rank 0 has already begun to save step 2."""
    job, writer = Job("fsdp"), ResilientWriter(url, POLICY)
    job.step(1)
    dcp.save(job.state(1), storage_writer=writer, checkpoint_id="1")
    job.step(2)
    state = job.state(2)
    dist.barrier()
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dcp.save(state, storage_writer=writer, checkpoint_id="2")
