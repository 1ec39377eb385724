"""What a live DeepSpeed engine holds: its flat masters, which parts of parameters are in them, and how to renew it.

The attributes are those of DeepSpeed 0.19 `stage_1_and_2`, `bf16_optimizer`, `stage3`, `unfused_optimizer`,
`fused_optimizer`. Only attributes are read; DeepSpeed itself is imported where a gathering of ZeRO-3 needs it. Called
from the training thread, on all ranks.
"""

import importlib
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist

from resilient.checkpoint.formats.deepspeed_zero import Fragment, parts_of_rank
from resilient.errors import UsageError


@dataclass(frozen=True, slots=True)
class Flat:
    """A master tensor of the engine. `state`: what the optimizer has for it, to be replaced. `fragments` of parameters
    lie in the master as one row of elements. `names`: the parameters whose masters `ranks` share in this way, those
    that have no fragment here too. `cut`: it is a row of fragments, else one parameter, whole on each rank. `copied`:
    the row is the same on each rank, else each has another part. `separate`: the master is another tensor than the
    model's parameter."""

    master: torch.Tensor
    state: MutableMapping[str, Any]
    fragments: Sequence[Fragment]
    names: Sequence[str]
    ranks: tuple[int, ...]
    cut: bool = True
    copied: bool = False
    separate: bool = True


def flats(engine: Any) -> list[Flat]:
    """All masters of this rank. Raises UsageError for optimizers that are not known here."""
    optimizer = engine.optimizer
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        return list(_of_zero_3(engine, optimizer))
    partitions = getattr(optimizer, "single_partition_of_fp32_groups", None)
    if partitions is None:
        partitions = getattr(optimizer, "fp32_groups_flat_partition", None)
    if partitions is not None:
        return list(_of_zero_1_or_2(engine, optimizer, partitions))
    if hasattr(optimizer, "fp32_groups"):
        return list(_of_unfused(engine, optimizer))
    if hasattr(optimizer, "fp32_groups_flat"):
        return list(_of_fused(engine, optimizer))
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise UsageError(
            f"an engine with a {type(optimizer).__name__} is not restored; use ZeRO, or an optimizer of torch"
        )
    return list(_of_plain(engine, optimizer))


def inner(engine: Any) -> Any:
    """The optimizer of torch within DeepSpeed's."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def group_names(engine: Any) -> list[list[str]]:
    """The names of the parameters of each group, in the order of the optimizer."""
    optimizer = engine.optimizer
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        found: list[list[str]] = [[] for _ in optimizer.param_groups]
        for number, group in enumerate(optimizer.fp16_groups):
            found[optimizer.sub_group_to_group_id[number]] += [engine.param_names[one] for one in group]
        return found
    for name in ("bit16_groups", "bf16_groups", "fp16_groups"):
        if hasattr(optimizer, name):
            return [[engine.param_names[one] for one in group] for group in getattr(optimizer, name)]
    return [[engine.param_names[one] for one in group["params"]] for group in optimizer.param_groups]


def renew(engine: Any, restored: Sequence[Flat]) -> None:
    """The model's parameters from the masters, which have just been set."""
    optimizer = engine.optimizer
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        _renew_zero_3(optimizer)
    elif hasattr(optimizer, "update_lp_params"):
        for number, group in enumerate(getattr(optimizer, "bit16_groups", None) or optimizer.bf16_groups):
            flat = restored[number]
            for one in group:
                if one._hp_mapping is not None:
                    one._hp_mapping.set_optim_state_fragment(flat.master, flat.state)
        optimizer._hp_optimizer_states_linked = True
        optimizer.update_lp_params()
    elif hasattr(optimizer, "fp32_groups"):
        for low, high in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
            for one, master in zip(low, high, strict=True):
                one.data.copy_(master.data)
    elif hasattr(optimizer, "fp32_groups_flat"):
        for low, master in zip(optimizer.fp16_groups, optimizer.fp32_groups_flat, strict=True):
            for one, part in zip(low, master.detach().split([one.numel() for one in low]), strict=True):
                one.data.copy_(part.view(one.shape))


@contextmanager
def partitioned(engine: Any) -> Iterator[None]:
    """ZeRO-3 keeps small parameters gathered: within, all are partitioned; then those are gathered anew."""
    if hasattr(engine.optimizer, "fp32_partitioned_groups_flat"):
        engine.optimizer.checkpoint_event_prologue()
        try:
            yield
        finally:
            engine.optimizer.checkpoint_event_epilogue()
    else:
        yield


def ranks_of(group: Any) -> tuple[int, ...]:
    """The global ranks of a process group, ascending."""
    return tuple(sorted(dist.get_process_group_ranks(group)))


def replicas_of(engine: Any, parameter: Any) -> tuple[int, ...]:
    """The ranks that have the same parameter: of an expert those that have this expert."""
    expert = getattr(parameter, "group_name", None) if not getattr(parameter, "allreduce", True) else None
    return ranks_of(engine.seq_data_parallel_group if expert is None else engine.expert_data_parallel_group[expert])


def shape_of(parameter: Any) -> tuple[int, ...]:
    """The whole shape; ZeRO-3 leaves parameters empty."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def set_whole(parameter: Any, value: Callable[[], torch.Tensor]) -> None:
    """Set a parameter that no optimizer holds. All ranks call it; with ZeRO-3 rank 0's value is everyone's."""
    if not hasattr(parameter, "ds_id"):
        parameter.data.copy_(value())
        return
    zero = importlib.import_module("deepspeed").zero
    with zero.GatheredParameters([parameter], modifier_rank=0):
        if dist.get_rank() == 0:
            parameter.data.copy_(value())


def _of_zero_1_or_2(engine: Any, optimizer: Any, partitions: Sequence[torch.Tensor]) -> Iterator[Flat]:
    groups = getattr(optimizer, "bit16_groups", None) or optimizer.bf16_groups
    for partition, group, ranks in zip(partitions, groups, optimizer.real_dp_process_group, strict=True):
        fragments = []
        for one in group:
            mapping = one._hp_mapping
            if mapping is not None:
                low, high = mapping.lp_fragment_address, mapping.hp_fragment_address
                fragments.append(Fragment(engine.param_names[one], low.start, high.start, high.numel))
        names = [engine.param_names[one] for one in group]
        yield Flat(partition, optimizer.optimizer.state[partition], fragments, names, ranks_of(ranks))


def _of_zero_3(engine: Any, optimizer: Any) -> Iterator[Flat]:
    for master, group in zip(optimizer.fp32_partitioned_groups_flat, optimizer.fp16_groups, strict=True):
        if not master.numel():
            raise UsageError(
                "an engine that keeps its masters on NVMe is not restored yet: its partitions are not in memory"
            )
        shapes = {engine.param_names[one]: shape_of(one) for one in group}
        partition = group[0].ds_process_group if group else optimizer.dp_process_group
        fragments = list(parts_of_rank(shapes, dist.get_rank(partition), dist.get_world_size(partition)))
        yield Flat(master, optimizer.optimizer.state[master], fragments, list(shapes), ranks_of(partition))


def _of_unfused(engine: Any, optimizer: Any) -> Iterator[Flat]:
    for low, high in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
        for one, master in zip(low, high, strict=True):
            whole = Fragment(engine.param_names[one], 0, 0, master.numel())
            yield Flat(
                master, optimizer.optimizer.state[master], [whole], [whole.name], replicas_of(engine, one), cut=False
            )


def _of_fused(engine: Any, optimizer: Any) -> Iterator[Flat]:
    """Each rank has all parameters of a group end to end."""
    for low, master in zip(optimizer.fp16_groups, optimizer.fp32_groups_flat, strict=True):
        starts = accumulate((one.numel() for one in low), initial=0)
        fragments = [
            Fragment(engine.param_names[one], 0, start, one.numel()) for one, start in zip(low, starts, strict=False)
        ]
        names, ranks = [one.name for one in fragments], replicas_of(engine, low[0])
        yield Flat(master, optimizer.optimizer.state[master], fragments, names, ranks, copied=True)


def _of_plain(engine: Any, optimizer: torch.optim.Optimizer) -> Iterator[Flat]:
    for group in optimizer.param_groups:
        for one in group["params"]:
            whole = Fragment(engine.param_names[one], 0, 0, one.numel())
            ranks = replicas_of(engine, one)
            yield Flat(one, optimizer.state[one], [whole], [whole.name], ranks, cut=False, separate=False)


def _renew_zero_3(optimizer: Any) -> None:
    """As `stage3.py` does after it has loaded a universal checkpoint."""
    for number, master in enumerate(optimizer.fp32_partitioned_groups_flat):
        low = optimizer.fp16_partitioned_groups_flat[number]
        low.data.copy_(master.data)
        own = optimizer.fp16_partitioned_groups[number]
        for partition, values in zip(own, optimizer.unflatten(low, own), strict=True):
            partition.data = values.data
