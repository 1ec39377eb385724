"""Jobs that keep all sorts of state, and the comparison that every one of them must pass.

A job is what a training script makes: a state for the Checkpointer and a function that trains one step. `facts` are
all the bits of a state that the next step depends on; `assert_restores` saves one job and restores it into another.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

import resilient
from resilient.checkpoint.checkpointer import Checkpointer
from resilient.checkpoint.rng import capture_rng

EVERY_STEP = resilient.Policy(durable_every=1, agent_idle_s=30, fence_timeout_s=60, write_timeout_s=60)


@dataclass(slots=True)
class Job:
    """`state` is what the Checkpointer is given; `step()` trains once, with data from the random generators."""

    state: dict[str, Any]
    step: Callable[[], object]


Make = Callable[[], Job]


def facts(state: Mapping[str, Any]) -> dict[str, Any]:
    """Copies of everything in a state, by name, with the random generators."""
    found: dict[str, Any] = {"rng": capture_rng()}
    for item, value in state.items():
        if isinstance(value, nn.Module):
            found[item] = dict(_of_module(value))
        elif isinstance(value, Optimizer):
            found[item] = _of_optimizer(value)
        elif isinstance(value, Tensor):
            found[item] = value.detach()
        elif isinstance(value, torch.Generator):
            found[item] = value.get_state()
        elif hasattr(value, "state_dict"):
            found[item] = value.state_dict()
        else:
            found[item] = value
    return copy.deepcopy(found)


def _of_module(module: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, parameter in module.named_parameters(remove_duplicate=False):
        yield name, parameter.detach()
    yield from module.named_buffers(remove_duplicate=False)
    for name, part in module.named_modules():
        if type(part).get_extra_state is not nn.Module.get_extra_state:
            yield f"{name} (extra state)", part.get_extra_state()


def _of_optimizer(optimizer: Optimizer) -> dict[str, Any]:
    numbers = {
        parameter: number
        for number, parameter in enumerate(one for group in optimizer.param_groups for one in group["params"])
    }
    return {
        "state": {numbers.get(key, key): state for key, state in optimizer.state.items() if state},
        "groups": [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups],
    }


def differences(one: Any, other: Any, where: str = "") -> list[str]:
    """Where two values differ, in type, dtype, shape, strides, device or any bit; empty when they are the same."""
    if type(one) is not type(other):
        return [f"{where}: {type(one).__name__} and {type(other).__name__}"]
    if isinstance(one, DTensor):
        same = [one.placements == other.placements, one.device_mesh == other.device_mesh, one.shape == other.shape]
        return differences(one.to_local(), other.to_local(), where) if all(same) else [f"{where}: sharded otherwise"]
    if isinstance(one, Tensor):
        kinds = [(t.dtype, t.shape, t.stride() if t.numel() else None, t.device) for t in (one, other)]
        if kinds[0] != kinds[1]:
            return [f"{where}: {kinds[0]} and {kinds[1]}"]
        return [] if bits(one) == bits(other) else [f"{where}: other bits"]
    if isinstance(one, Mapping):
        if one.keys() != other.keys():
            return [f"{where}: only on one side {sorted(map(str, one.keys() ^ other.keys()))}"]
        return [text for key in one for text in differences(one[key], other[key], f"{where}/{key}")]
    if isinstance(one, (list, tuple)):
        if len(one) != len(other):
            return [f"{where}: {len(one)} and {len(other)} items"]
        pairs = enumerate(zip(one, other, strict=True))
        return [text for number, (a, b) in pairs for text in differences(a, b, f"{where}/{number}")]
    if hasattr(one, "tobytes"):
        return [] if one.tobytes() == other.tobytes() else [f"{where}: other bytes"]
    return [] if one == other or (one != one and other != other) else [f"{where}: {one!r} and {other!r}"]


def assert_same(one: Any, other: Any) -> None:
    found = differences(one, other)
    assert not found, "\n".join(found[:20])


def bits(tensor: Tensor) -> bytes:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return bytes(flat.view(torch.uint8).numpy()) if flat.numel() else b""


def train(job: Job, steps: int) -> None:
    for _ in range(steps):
        job.step()


@contextmanager
def checkpointing(url: Path | str, job: Job, policy: resilient.Policy = EVERY_STEP) -> Iterator[Checkpointer]:
    """A Checkpointer that is closed at the end without leaving an agent behind, also when a test fails."""
    checkpointer = Checkpointer(str(url), job.state, policy)
    try:
        yield checkpointer
    finally:
        assert checkpointer.close() == []


def assert_restores(make: Make, url: Path, *, steps: int = 3, more: int = 2) -> None:
    """Save a job, restore it into differently initialised ones from memory and from disk, and train on beside it."""
    torch.manual_seed(1)
    job = make()
    checkpointer = Checkpointer(str(url), job.state, EVERY_STEP)
    for step in range(1, steps + 1):
        job.step()
        handle = checkpointer.save(step)
    handle.durable("durable").result(60)
    checkpointer.close(keep_memory=True)
    saved = facts(job.state)
    train(job, more)
    later = facts(job.state)
    for level in ("memory", "durable"):
        torch.manual_seed(2)
        fresh = make()
        with checkpointing(url, fresh) as restored:
            assert restored.restore() == steps
            assert restored.last_restore is not None
            assert restored.last_restore.levels == {0: level}
            assert restored.last_restore.notes == ()
            assert_same(saved, facts(fresh.state))
        train(fresh, more)
        assert_same(later, facts(fresh.state))
