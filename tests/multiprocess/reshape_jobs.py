"""Jobs of several shapes that are saved in one and restored in another, for `test_reshape.py`."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

import resilient
from resilient.checkpoint.checkpointer import Checkpointer
from resilient.checkpoint.leaves import walk
from resilient.errors import RestoreError
from tests.checkpoint.jobs import EVERY_STEP, Job, checkpointing, train
from tests.multiprocess.distributed_jobs import Network, made, trained
from tests.multiprocess.parity_jobs import note_agent

Make = Callable[[], Job]
NEVER = resilient.Policy(durable_every=0, agent_idle_s=60, fence_timeout_s=40)


def grouped(model: torch.nn.Module) -> Optimizer:
    """Two groups with hyperparameters of their own."""
    named = list(model.named_parameters())
    groups: Any = [
        {"params": [p for name, p in named if "bias" not in name], "lr": 0.02, "weight_decay": 0.1},
        {"params": [p for name, p in named if "bias" in name], "lr": 0.003},
    ]
    return torch.optim.AdamW(groups)


def plain() -> Job:
    model = Network()
    return trained(model, grouped(model))


def ddp() -> Job:
    model = DistributedDataParallel(Network())
    return trained(model, grouped(model.module))


def fsdp() -> Job:
    return _fsdp(init_device_mesh("cpu", (dist.get_world_size(),)))


def even() -> Job:
    """FSDP2 of what six ranks and two cut at places of which the latter are some of the former."""
    model = torch.nn.Sequential(torch.nn.Linear(5, 24), torch.nn.Tanh(), torch.nn.Linear(24, 12))
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    return trained(model, grouped(model))


def wide() -> Job:
    """FSDP2 of a model of which each rank of four has several blocks of 64 KiB of every matrix."""
    model = torch.nn.Sequential(torch.nn.Linear(1024, 1024), torch.nn.Tanh(), torch.nn.Linear(1024, 1024))
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    return trained(model, grouped(model), inputs=1024)


def hsdp() -> Job:
    return _fsdp(init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")))


def _fsdp(mesh: Any) -> Job:
    model = Network()
    for layer in (model.first, model.large):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return trained(model, grouped(model))


def tensor_parallel() -> Job:
    """Rows of one layer, columns of the next; over the data-parallel ranks FSDP2, where there are more than two."""
    size = dist.get_world_size()
    mesh = init_device_mesh("cpu", (size // 2, 2), mesh_dim_names=("dp", "tp"))
    model = Network()
    parallelize_module(model, mesh["tp"], {"large": ColwiseParallel(), "last": RowwiseParallel()})
    if size > 2:
        fully_shard(model, mesh=mesh["dp"])
    job = trained(model, grouped(model))

    def step() -> None:
        torch.manual_seed(5)  # tensor-parallel ranks see the same samples, and drop the same
        job.step()

    return Job(job.state, step)


def pipeline() -> Job:
    """Each rank has some of the layers, under the names they have in the whole model, and an optimizer for them."""
    model = Network()
    layers = list(model._modules)
    size, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    for number, layer in enumerate(layers):
        if number * size // len(layers) != rank:
            delattr(model, layer)
    optimizer = grouped(model)

    def step() -> None:
        optimizer.zero_grad()
        torch.stack([parameter.square().sum() for parameter in model.parameters()]).sum().backward()
        optimizer.step()

    return Job({"model": model, "optimizer": optimizer}, step)


class Lion(Optimizer):
    """Evolved sign momentum (Chen et al., 2023): one moment, and no counter of steps."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.001, "betas": (0.9, 0.99)})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            first, second = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is not None:
                    state = self.state[parameter]
                    moment = state.setdefault("exp_avg", torch.zeros_like(parameter))
                    parameter.sub_((moment * first + parameter.grad * (1 - first)).sign(), alpha=group["lr"])
                    moment.mul_(second).add_(parameter.grad, alpha=1 - second)


class Factored(Optimizer):
    """Second moments as rows and columns (Adafactor's idea); torch's Adafactor does not work by FSDP2."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.001})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                square, state = parameter.grad.square() + 1e-6, self.state[parameter]
                for name, dim in (("row_var", 1), ("col_var", 0)):
                    mean = square.mean(dim=dim, keepdim=True)
                    if isinstance(mean, DTensor):
                        mean = mean.redistribute(placements=[Replicate()] * mean.device_mesh.ndim)
                    state[name] = state.get(name, torch.zeros_like(mean)) * 0.9 + mean * 0.1
                parameter.sub_(parameter.grad / (state["row_var"] * state["col_var"]).sqrt(), alpha=group["lr"])


def matrices(make: Callable[[Any], Optimizer], *, sharded: bool, steps: int = 0) -> Job:
    """A model of matrices alone, which Muon wants, plain, by FSDP2, or of four ranks by HSDP."""
    model = torch.nn.Sequential(
        torch.nn.Linear(5, 24, bias=False), torch.nn.Tanh(), torch.nn.Linear(24, 12, bias=False)
    )
    if sharded:
        size, names = dist.get_world_size(), ("replicate", "shard")
        four = init_device_mesh("cpu", (2, 2), mesh_dim_names=names) if size == 4 else None
        fully_shard(model, mesh=four or init_device_mesh("cpu", (size,)))
    job = trained(model, make(model.parameters()))
    if steps:
        job.step()
    return job


def muon(parameters: Any) -> Optimizer:
    return torch.optim.Muon(parameters, lr=0.01)


def adafactor() -> Job:
    model = DistributedDataParallel(Network())
    return trained(model, torch.optim.Adafactor(model.parameters(), lr=0.01))


def everything(job: Job) -> dict[str, Any]:
    """All tensors as a whole, by name, and the groups; buffers are each rank's own."""
    found: dict[str, Any] = {}
    for leaf in walk(job.state).leaves:
        tensor = leaf.tensor.detach()
        found[leaf.key] = (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()
    groups = job.state["optimizer"].param_groups
    found["groups"] = [{k: v for k, v in group.items() if k != "params"} for group in groups]
    return found


def shared(found: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in found.items() if ".norm.running" not in name and "num_batches" not in name}


def save(make: Make, url: str, folder: str, policy: resilient.Policy = EVERY_STEP, level: str = "durable") -> None:
    """Train two steps, save, and note everything."""
    job = made(make, 1)
    checkpointer = Checkpointer(url, job.state, policy)
    for step in (1, 2):
        job.step()
        checkpointer.save(step).durable(level).result(40)
        torch.save(everything(job), f"{folder}/{'first' if step == 1 else 'saved'}{_rank()}")
    if level == "parity":  # its nodes are lost with all they hold, as the test does it
        note_agent(checkpointer, folder)
        dist.barrier()
        os.kill(os.getpid(), signal.SIGKILL)
    assert checkpointer.close(keep_memory=level == "memory") == []


def restore(
    make: Make, url: str, folder: str, saved_by: int, policy: resilient.Policy = EVERY_STEP, level: str = "durable"
) -> tuple[dict[int, str], int, int]:
    """Restore into a fresh job of another shape; compare; train on, save again. Levels; bytes and records read."""
    job = made(make, 2)
    with checkpointing(url, job, policy) as checkpointer:
        assert checkpointer.restore() == 2
        done = checkpointer.last_restore
        assert done is not None
        found = everything(job)
        expected = torch.load(f"{folder}/saved{_rank() % saved_by}", weights_only=False)
        if make is pipeline:  # each stage has what it has, of what all stages had
            for rank in range(saved_by):
                expected |= torch.load(f"{folder}/saved{rank}", weights_only=False)
            expected = {name: value for name, value in expected.items() if name in found}
        assert_equal(expected, found)
        train(job, 1)
        checkpointer.save(3).durable(level).result(40)
        train(job, 1)
        checkpointer.save(4).durable(level).result(40)
        return done.levels, done.read_bytes or 0, done.read_records or 0


def assert_equal(expected: dict[str, Any], found: dict[str, Any]) -> None:
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        if isinstance(value, Tensor):
            assert value.dtype == found[name].dtype, name
            assert torch.equal(value, found[name]), name
        else:
            assert value == found[name], name


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def go_back(make: Make, url: str, folder: str, saved_by: int, where: str) -> list[str]:
    """A run that has restored another job's snapshot, and trained on, goes back to it when it is damaged meanwhile.

    What the error said, if there was one; the state is then as it was. Else it is that of the first step.
    """
    job = made(make, 2)
    with checkpointing(url, job, NEVER) as checkpointer:
        assert checkpointer.restore() == 2
        train(job, 1)
        if _rank() == 0:
            damage(Path(url) / "step_00000002/rank_00001-of-00002", where)
        dist.barrier()
        before = everything(job)
        try:
            assert checkpointer.restore() == 1
        except RestoreError as error:
            assert_equal(before, everything(job))
            return [str(error), *getattr(error, "__notes__", [])]
        assert_equal(torch.load(f"{folder}/first{_rank() % saved_by}", weights_only=False), everything(job))
        return []


def damage(path: Path, where: str) -> None:
    """Change a byte of an image, of its digests or of its record."""
    file = path.with_suffix({"digests": ".digests", "record": ".json"}.get(where, ".safetensors"))
    data = bytearray(file.read_bytes())
    data[{"data": -100_000, "header": 100}.get(where, len(data) // 2)] ^= 1
    file.write_bytes(data)
