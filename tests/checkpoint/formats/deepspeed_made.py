"""Checkpoints as DeepSpeed's ZeRO lays them out, written without DeepSpeed: by the rules, at any number of ranks.

What the real one writes is read in `tests/multiprocess/test_deepspeed_formats.py`; here are the many shapes and worlds,
and what nobody would write on purpose.
"""

import math
import sys
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

Groups = list[dict[str, torch.Tensor]]
"""The masters of each group, by name."""


@dataclass
class fragment_address:
    numel: int
    start: int


fragment_address.__module__ = "deepspeed.utils.tensor_fragment"


@contextmanager
def pickled_as_deepspeeds() -> Iterator[None]:
    """Within, pickle finds our class under DeepSpeed's name, whether or not DeepSpeed is installed."""
    names = ("deepspeed", "deepspeed.utils", "deepspeed.utils.tensor_fragment")
    before = {name: sys.modules.get(name) for name in names}
    for name in names:
        sys.modules[name] = ModuleType(name)
    vars(sys.modules[names[-1]])["fragment_address"] = fragment_address
    try:
        yield
    finally:
        for name, module in before.items():
            sys.modules.pop(name)
            if module is not None:
                sys.modules[name] = module


def momentum(master: torch.Tensor) -> torch.Tensor:
    """The state of each parameter: told from its master, so that tests know it."""
    return master * 2 + 1


def write_zero_2(
    folder: Path, groups: Groups, world: int, *, step: int = 5, module: Mapping[str, torch.Tensor] | None = None
) -> None:
    """`mp_rank_00_model_states.pt` and the ranks' optimizer states, in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    own = {name: one.bfloat16() for group in groups for name, one in group.items()} | dict(module or {})
    torch.save(_model_states(groups, own, world, step), folder / "mp_rank_00_model_states.pt")
    for rank in range(world):
        states = _partition_of_zero_2(groups, rank, world, step)
        with pickled_as_deepspeeds():
            torch.save(states, folder / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")


def write_zero_3(folder: Path, groups: Groups, world: int, *, step: int = 5) -> None:
    """The model and optimizer states of every rank; each group is one sub-group."""
    folder.mkdir(parents=True, exist_ok=True)
    for rank in range(world):
        placeholders = {name: torch.empty(0) for group in groups for name in group}
        states = _model_states(groups, placeholders, world, step)
        torch.save(states, folder / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")
        masters = [torch.cat([_part(one, rank, world) for one in group.values()]) for group in groups]
        momenta = [torch.cat([_part(momentum(one), rank, world) for one in group.values()]) for group in groups]
        inner = {
            "zero_stage": 3,
            "partition_count": world,
            "optimizer_state_dict": _optimizer(momenta, step),
            "fp32_flat_groups": masters,
        }
        name = f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        torch.save({"optimizer_state_dict": inner, "ds_config": {}, "ds_version": "0.19.8"}, folder / name)


def _model_states(groups: Groups, module: Mapping[str, torch.Tensor], world: int, step: int) -> dict[str, Any]:
    return {
        "module": OrderedDict(module),
        "buffer_names": [],
        "optimizer": None,
        "param_shapes": [OrderedDict((name, one.shape) for name, one in group.items()) for group in groups],
        "frozen_param_shapes": None,
        "shared_params": {},
        "global_steps": step,
        "dp_world_size": world,
        "mp_world_size": 1,
        "ds_version": "0.19.8",
    }


def _partition_of_zero_2(groups: Groups, rank: int, world: int, step: int) -> dict[str, Any]:
    masters, momenta, mappings, paddings = [], [], [], []
    for group in groups:
        numel = sum(one.numel() for one in group.values())
        size = math.ceil(numel / (2 * world)) * 2
        begin, end = min(rank * size, numel), min((rank + 1) * size, numel)
        masters.append(torch.cat([one.flatten() for one in group.values()])[begin:end].clone())
        flat = torch.cat([momentum(one).flatten() for one in group.values()])[begin:end]
        momenta.append(torch.cat([flat, torch.zeros(size - (end - begin))]))  # these keep their padding
        mappings.append(_mapping(group, begin, end))
        paddings.append(size - (end - begin))
    inner = {
        "base_optimizer_state": _optimizer(momenta, step),
        "single_partition_of_fp32_groups": masters,
        "zero_stage": 2,
        "group_paddings": paddings,
        "partition_count": [world] * len(groups),
        "param_slice_mappings": mappings,
        "ds_version": "0.19.8",
    }
    return {"optimizer_state_dict": inner, "ds_config": {}, "ds_version": "0.19.8"}


def _mapping(group: Mapping[str, torch.Tensor], begin: int, end: int) -> "OrderedDict[str, fragment_address]":
    found: OrderedDict[str, fragment_address] = OrderedDict()
    at = 0
    for name, one in group.items():
        low, high = max(at, begin), min(at + one.numel(), end)
        if low < high:
            found[name] = fragment_address(high - low, low - begin)
        at += one.numel()
    return found


def _optimizer(momenta: list[torch.Tensor], step: int) -> dict[str, Any]:
    states = {number: {"step": torch.tensor(float(step)), "momentum": one} for number, one in enumerate(momenta)}
    return {"state": states, "param_groups": [{"lr": 0.1 * number, "params": [number]} for number in states]}


def _part(tensor: torch.Tensor, rank: int, world: int) -> torch.Tensor:
    size = math.ceil(tensor.numel() / world)
    part = tensor.flatten()[rank * size : (rank + 1) * size]
    return torch.cat([part, torch.zeros(size - part.numel())])
