"""Jobs of several ranks, for `test_state_distributed.py`: DDP, FSDP2 on meshes, and modules that each rank has alone.

Functions without arguments that return a Job, to be called on every rank of a process group.
"""

import json
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

import resilient
from resilient.checkpoint.checkpointer import Checkpointer
from resilient.errors import LayoutMismatch
from tests.checkpoint.jobs import EVERY_STEP, Job, assert_same, checkpointing, differences, facts, train

WIDTH = 600


class Network(nn.Module):
    """Large enough that replicas share single tensors; with dropout, and buffers that differ between ranks."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.first = nn.Linear(5, width)
        self.norm = nn.BatchNorm1d(width)
        self.drop = nn.Dropout(0.2)
        self.large = nn.Linear(width, 2 * width)
        self.last = nn.Linear(2 * width, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.large(self.drop(self.norm(self.first(x)).relu())).relu())
        return y


def trained(model: nn.Module, optimizer: Optimizer, inputs: int = 5) -> Job:
    def step() -> None:
        optimizer.zero_grad()
        model(torch.randn(8, inputs)).square().mean().backward()
        optimizer.step()

    return Job({"model": model, "optimizer": optimizer}, step)


def adamw(parameters: Iterable[Tensor]) -> Optimizer:
    return torch.optim.AdamW(parameters, lr=0.01)


def ddp() -> Job:
    model = DistributedDataParallel(Network())
    return trained(model, adamw(model.parameters()))


def ddp_with_a_layer_of_its_own() -> Job:
    model = Network(20)
    extra = nn.Linear(5, 5)
    with torch.no_grad():
        extra.weight.add_(dist.get_rank())
    whole = nn.Sequential(extra, model)
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(whole, ["0.weight", "0.bias"])
    wrapped = DistributedDataParallel(whole, broadcast_buffers=False)
    return trained(wrapped, adamw(wrapped.parameters()))


def ddp_of_two_pairs() -> Job:
    """Two pipeline stages, each with its own group and other values under the same names."""
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    stage = dist.get_rank() // 2
    model = Network(20 + stage)
    with torch.no_grad():
        model.last.weight.add_(stage)
    wrapped = DistributedDataParallel(model, process_group=pairs[stage])
    return trained(wrapped, adamw(wrapped.parameters()))


def sharded(mesh: DeviceMesh, make: Callable[[Iterable[Tensor]], Optimizer] = adamw) -> Job:
    model = Network()
    for layer in (model.first, model.large):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return trained(model, make(model.parameters()))


def fsdp() -> Job:
    return sharded(init_device_mesh("cpu", (dist.get_world_size(),)))


def fsdp_with_momentum() -> Job:
    """All that it holds is sharded, unlike the counters of AdamW."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return sharded(mesh, lambda parameters: torch.optim.SGD(parameters, lr=0.01, momentum=0.9))


def small_ddp() -> Job:
    """So small that one rank saves all that is replicated."""
    model = DistributedDataParallel(Network(8))
    return trained(model, adamw(model.parameters()))


def small_and_no_longer_shared() -> Job:
    """The same, but rank 0 says that it shares with nobody, and rank 1 says nothing of it."""
    group: Any = dist.new_group([0])
    model: nn.Module = Network(8)
    if dist.get_rank() == 0:
        model = DistributedDataParallel(model, process_group=group)
    return trained(model, adamw(model.parameters()))


def hsdp() -> Job:
    return sharded(init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")))


def fsdp_uneven() -> Job:
    """Shapes that do not divide, one rank with an empty part of some, frozen parameters, two groups."""
    model = nn.Sequential(nn.Linear(3, 1), nn.Linear(1, 5), nn.Linear(5, 7), nn.Linear(7, 1))
    model[2].requires_grad_(False)
    model.register_buffer("mine", torch.full((3,), float(dist.get_rank())))
    for layer in model:
        fully_shard(layer)
    fully_shard(model)
    groups: Any = [
        {"params": model[0].parameters(), "lr": 0.1},
        {"params": [*model[1].parameters(), *model[3].parameters()]},
    ]
    return trained(model, torch.optim.AdamW(groups), 3)


class Partly(Optimizer):
    """State that is sharded otherwise than its parameter, or is each rank's own, or nested."""

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        super().__init__(parameters, {"lr": 0.01})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state["mean"] = parameter.grad.redistribute(placements=[Replicate()]).clone()
                    state["local"] = torch.zeros(3 + dist.get_rank())
                    state["half"] = parameter.grad.to(torch.bfloat16)
                    state["calls"] = 0
                state["mean"].mul_(0.9)
                state["local"].add_(torch.randn(3 + dist.get_rank()))
                state["half"].add_(parameter.grad)
                state["calls"] += 1
                parameter.sub_(state["half"], alpha=group["lr"])


def fsdp_partly() -> Job:
    return sharded(init_device_mesh("cpu", (2,)), Partly)


def fsdp_and_tensor_parallel() -> Job:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = nn.Sequential(nn.Linear(5, 12), nn.ReLU(), nn.Linear(12, 7))
    parallelize_module(model, mesh["tp"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    fully_shard(model, mesh=mesh["dp"])
    return trained(model, adamw(model.parameters()))


def own() -> Job:
    rank = dist.get_rank()
    model = nn.Linear(4, 3 + rank)
    return trained(model, adamw(model.parameters()), 4)


def own_four() -> Job:
    """Images of very different sizes."""
    inputs = (300_000, 10, 100_000, 1000)[dist.get_rank()]
    model = nn.Linear(inputs, 3)
    return trained(model, adamw(model.parameters()), inputs)


def made(make: Callable[[], Job], seed: int) -> Job:
    """A job whose initial values depend on the seed, and whose random numbers on the rank too."""
    torch.manual_seed(seed)
    job = make()
    torch.manual_seed(seed * 100 + dist.get_rank())
    return job


def save_for(make: Callable[[], Job], url: str, facts_in: str) -> None:
    """Save two steps on the disk, and note what there was."""
    job = made(make, 1)
    with checkpointing(Path(url), job) as checkpointer:
        train(job, 2)
        checkpointer.save(2).durable("durable").result(40)
        torch.save(facts(job.state), f"{facts_in}/{dist.get_rank()}")


def restore_from(make: Callable[[], Job], url: str, facts_in: str) -> int:
    """Restore what `save_for` has saved; of how many images each rank knew the pieces."""
    job = made(make, 2)
    with checkpointing(Path(url), job) as checkpointer:
        assert checkpointer.restore() == 2
        assert checkpointer.last_restore is not None
        assert checkpointer.last_restore.read_bytes is None, "as a job of the same shape"
        saved = torch.load(f"{facts_in}/{dist.get_rank()}", weights_only=False)
        for one in (saved, now := facts(job.state)):  # with or without DDP around it
            one["model"] = {name.removeprefix("module."): value for name, value in one["model"].items()}
        assert_same(saved["model"], now["model"])
        dist.barrier()
        return checkpointer.last_restore.read_records


def save_and_restore(make: Callable[[], Job], url: str) -> None:
    """On every rank: save, restore from memory and from disk into other jobs, train on beside the undisturbed one."""
    job = made(make, 1)
    checkpointer = Checkpointer(url, job.state, EVERY_STEP)
    for step in (1, 2):
        job.step()
        handle = checkpointer.save(step)
    handle.durable("durable").result(40)
    assert checkpointer.close(keep_memory=True) == []
    saved = facts(job.state)
    train(job, 2)
    later = facts(job.state)
    for level in ("memory", "durable"):
        fresh = made(make, 2)
        assert differences(saved["model"], facts(fresh.state)["model"])
        with checkpointing(Path(url), fresh) as restored:
            assert restored.restore() == 2
            assert restored.last_restore is not None
            assert set(restored.last_restore.levels.values()) == {level}
            assert_same(saved, facts(fresh.state))
            dist.barrier()
        train(fresh, 2)
        assert_same(later, facts(fresh.state))


MEMORY_ONLY = resilient.Policy(durable_every=0, agent_idle_s=60, fence_timeout_s=40)


def nothing(checkpointer: Checkpointer) -> None:
    pass


def train_and_die(
    make: Callable[[], Job],
    url: str,
    folder: str,
    policy: resilient.Policy = MEMORY_ONLY,
    level: str = "memory",
    started: Callable[[Checkpointer], None] = nothing,
) -> None:
    """Save three steps, each until a level has it, note what was saved, and be killed in the fourth: rank 1 first."""
    job = made(make, 1)
    checkpointer = Checkpointer(url, job.state, policy)
    started(checkpointer)
    for step in (1, 2, 3):
        job.step()
        checkpointer.save(step).durable(level).result(40)
    rank = dist.get_rank()
    torch.save(facts(job.state), f"{folder}/saved{rank}")
    train(job, 1)
    torch.save(facts(job.state), f"{folder}/later{rank}")
    dist.barrier()
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    threading.Event().wait(60)  # until it is killed too


def come_back(
    make: Callable[[], Job],
    url: str,
    folder: str,
    policy: resilient.Policy = MEMORY_ONLY,
    level: str = "memory",
    started: Callable[[Checkpointer], None] = nothing,
) -> dict[int, str]:
    """Restore what `train_and_die` saved, and go on until a level has the next step; returns the levels."""
    rank = dist.get_rank()
    fresh = made(make, 2)
    with checkpointing(Path(url), fresh, policy) as restored:
        started(restored)
        assert restored.restore() == 3
        assert_same(torch.load(f"{folder}/saved{rank}", weights_only=False), facts(fresh.state))
        train(fresh, 1)
        assert_same(torch.load(f"{folder}/later{rank}", weights_only=False), facts(fresh.state))
        restored.save(4).durable(level).result(40)
        assert restored.last_restore is not None
        return restored.last_restore.levels


def own_misfit() -> Job:
    """As `own`, but rank 1 has another shape than when it was saved."""
    model = nn.Linear(4, 3 if dist.get_rank() == 0 else 9)
    return trained(model, adamw(model.parameters()), 4)


def refuse(save: Callable[[], Job], restore: Callable[[], Job], url: str) -> str:
    """Save one job, restore another: the message of the error, which overwrites nothing on any rank."""
    with checkpointing(Path(url), made(save, 1)) as checkpointer:
        checkpointer.save(1).durable("durable").result(40)
    other = made(restore, 2)
    before = facts(other.state)
    with checkpointing(Path(url), other) as checkpointer:
        try:
            checkpointer.restore()
        except LayoutMismatch as error:
            assert_same(before, facts(other.state))
            return str(error)
    raise AssertionError("another model's snapshot was restored")


def stored(url: Path, step: int) -> tuple[dict[Any, list[tuple[int, int]]], list[int]]:
    """The ranges that all images of a snapshot hold of each box of each shared tensor, and the size of each image."""
    ranges: dict[Any, list[tuple[int, int]]] = {}
    sizes = []
    for path in sorted((url / f"step_{step:08d}").glob("rank_*.json")):
        record = json.loads(path.read_text())
        pieces = [one for one in record["pieces"] if "nbytes" in one]
        sizes.append(sum(one["nbytes"] for one in pieces if not one["own"]))
        for one in pieces:
            box = (one["key"], tuple(one["offsets"]), tuple(one["sizes"]), record["rank"] if one["own"] else None)
            ranges.setdefault(box, []).append((one["start"], one["stop"]))
    return ranges, sizes


def stored_kinds(url: Path, step: int) -> Counter[str]:
    ranges, _ = stored(url, step)
    return Counter(box[0].split(".")[0] for box in ranges)
