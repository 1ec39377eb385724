"""Jobs of several ranks that save with torch's DCP and load with it, for `test_dcp_formats.py`."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from tests.checkpoint.formats.torch_made import bytes_of
from tests.checkpoint.jobs import Job, train
from tests.multiprocess.distributed_jobs import made

Make = Callable[[], Job]


def save(make: Make, folder: str, flattened: bool) -> dict[str, bytes]:
    """Train and save: the whole state as it was saved, on rank 0."""
    return whole(_saved(make, folder, flattened))


def save_and_train_on(make: Make, folder: str, flattened: bool) -> tuple[dict[str, bytes], list[float]]:
    """The same, and the losses that followed."""
    job = _saved(make, folder, flattened)
    return whole(job), losses(job)


def _saved(make: Make, folder: str, flattened: bool) -> Job:
    job = made(make, 1)
    train(job, 2)
    for buffer in job.state["model"].buffers():
        dist.broadcast(buffer, 0)  # of what ranks have differently DCP saves anybody's
    dcp.save({**parts(job, flattened), "step": 2}, checkpoint_id=folder)
    return job


def load(make: Make, folder: str, flattened: bool) -> tuple[dict[str, bytes], list[float]]:
    """Load into a job of other values and train on: the same."""
    job = made(make, 2)
    state = {**parts(job, flattened), "step": 0}
    dcp.load(state, checkpoint_id=folder)
    assert state["step"] == 2
    set_state_dict(
        job.state["model"],
        job.state["optimizer"],
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
        options=StateDictOptions(flatten_optimizer_state_dict=flattened),
    )
    return whole(job), losses(job)


def parts(job: Job, flattened: bool) -> dict[str, Any]:
    options = StateDictOptions(flatten_optimizer_state_dict=flattened)
    model, optimizer = get_state_dict(job.state["model"], job.state["optimizer"], options=options)
    return {"model": model, "optimizer": optimizer}


def whole(job: Job) -> dict[str, bytes]:
    """The bytes of all tensors of a job, put together, by the names that a catalog has for them."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    optimizer: Any
    model, optimizer = get_state_dict(job.state["model"], job.state["optimizer"], options=options)
    found: dict[str, Any] = {f"model.{name}": tensor for name, tensor in model.items()}
    for name, state in optimizer.get("state", {}).items():
        for key, value in state.items():
            found[f"optimizer.state.model.{name}.{key}"] = value
    return {name: bytes_of(tensor) for name, tensor in found.items()}


def losses(job: Job) -> list[float]:
    """Of some steps with the same data on all ranks, so that it does not matter how many there are."""
    model, optimizer = job.state["model"], job.state["optimizer"]
    model.eval()  # no dropout, and the running statistics stay as they are
    generator, found = torch.Generator().manual_seed(3), []
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(torch.randn(8, 5, generator=generator)).square().mean()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    dist.barrier()
    return found
