"""Jobs of the installed DeepSpeed, for `test_deepspeed_formats.py`: train, save, load; and what live engines hold.

The model has all that DeepSpeed's own universal loader loses or stumbles over: frozen parameters, buffers of integers,
tied weights, groups with hyperparameters of their own, and shapes that no number of ranks divides.
"""

import gc
import logging
import math
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

VOCABULARY, WIDTH = 37, 12
SAVED_AT = 3  # steps before the checkpoint

Case = tuple[str, int, str, str]
"""URL, stage, dtype and optimizer."""
Live = dict[str, dict[str, Tensor]]
"""What an engine holds: "model" (parameters that are frozen, and buffers), "fp32" and states, each by FQN."""


class Block(nn.Module):
    """A layer of the network."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 31)
        self.down = nn.Linear(31, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.down(torch.nn.functional.gelu(self.up(self.norm(x))))
        return y


class Network(nn.Module):
    """`seed`: of its first values; another one shows what a load did not touch."""

    mean: Tensor
    calls: Tensor

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        nn.init.normal_(self.embed.weight, std=0.2)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.adapter = nn.Linear(WIDTH, WIDTH)
        self.adapter.requires_grad_(False)
        self.scale = nn.Parameter(torch.rand(5, 7), requires_grad=False)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("mean", torch.rand(WIDTH))
        self.register_buffer("calls", torch.tensor(100 * seed, dtype=torch.int64))
        self.register_buffer("passing", torch.rand(3), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        self.calls += 1
        x = self.embed(tokens) + self.mean.to(self.adapter.weight.dtype) * self.scale.mean()
        for block in self.blocks:
            x = block(x)
        x = x + self.adapter(x)
        y: Tensor = self.head(x)
        return y


def groups(model: nn.Module) -> list[dict[str, Any]]:
    trained = [(name, one) for name, one in model.named_parameters() if one.requires_grad]
    return [
        {"params": [one for name, one in trained if not name.endswith("bias")], "lr": 1e-2, "weight_decay": 0.1},
        {"params": [one for name, one in trained if name.endswith("bias")], "lr": 5e-3, "weight_decay": 0.0},
    ]


def fused(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """For DeepSpeed a FusedAdam, which it gives a flat master for each group; it computes as torch's, uncompiled."""
    from deepspeed.ops.adam import FusedAdam

    class Uncompiled(FusedAdam):  # type: ignore[misc]
        def __init__(self, parameters: Any, defaults: Any) -> None:
            torch.optim.Optimizer.__init__(self, parameters, defaults)

    class Fused(torch.optim.AdamW, Uncompiled):
        pass

    return Fused(groups, betas=(0.9, 0.98))


OPTIMIZERS: dict[str, Callable[[list[dict[str, Any]]], torch.optim.Optimizer]] = {
    "fused": fused,
    "adamw": lambda groups: torch.optim.AdamW(groups, betas=(0.9, 0.98)),
    "sgd": lambda groups: torch.optim.SGD(groups, momentum=0.9),
    "rmsprop": lambda groups: torch.optim.RMSprop(groups, momentum=0.5, centered=True),
}


VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "": {},
    "round_robin": {"zero_optimization": {"round_robin_gradients": True}},  # another order in the partitions
    "aligned": {"zero_optimization": {"parameter_alignment": True}},  # gaps between parameters
    "accumulated": {"data_types": {"grad_accum_dtype": "fp32"}},  # DeepSpeed's BF16_Optimizer
}
"""Configurations that lay partitions out otherwise; named behind the optimizer, as in "adamw.aligned"."""


def prepare() -> Any:
    """DeepSpeed, imported so that it works on CPU and compiles nothing."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ["LOCAL_RANK"] = str(dist.get_rank())
    os.environ["RANK"], os.environ["WORLD_SIZE"] = str(dist.get_rank()), str(dist.get_world_size())
    warnings.simplefilter("ignore")  # what DeepSpeed calls is deprecated in torch
    logging.disable()
    import deepspeed
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else it compiles this for a minute
    return deepspeed


@contextmanager
def training(
    stage: int,
    dtype: str,
    optimizer: str = "adamw",
    *,
    seed: int = 1,
    universal: bool = False,
    blocks: Mapping[str, Any] | None = None,
) -> Iterator[Any]:
    """An engine on all ranks of the process group. Its batches are the same at every world size.

    `blocks`: further blocks of its configuration.
    """
    deepspeed = prepare()
    model = Network(seed)
    config: dict[str, Any] = {
        "train_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "steps_per_print": 1000,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage, "sub_group_size": 400, "stage3_param_persistence_threshold": 0},
    }
    if dtype == "bfloat16":
        config["bf16"] = {"enabled": True}
    if dtype == "float16":
        config["fp16"] = {"enabled": True, "initial_scale_power": 8, "loss_scale_window": 2}
        _let_fp16_be()
    optimizer, _, variant = optimizer.partition(".")
    for section, values in [*VARIANTS[variant].items(), *(blocks or {}).items()]:
        config[section] = {**config.get(section, {}), **values} if isinstance(values, Mapping) else values
    if universal:
        config["checkpoint"] = {"load_universal": True}
    made = OPTIMIZERS[optimizer](groups(model))
    schedule = torch.optim.lr_scheduler.LambdaLR(made, lambda step: 1 / (1 + step / 10))
    engine, *_ = deepspeed.initialize(model=model, optimizer=made, lr_scheduler=schedule, config=config)
    try:
        yield engine
    finally:
        engine.destroy()
        del engine, model, made
        gc.collect()


def _let_fp16_be() -> None:
    """DeepSpeed refuses fp16 on CPUs without instructions for it, though torch computes with it on all."""
    from deepspeed.accelerator import get_accelerator

    kind: Any = type(get_accelerator())
    kind.is_fp16_supported = lambda self: True


def train(engine: Any, steps: range, overflows: Sequence[int] = ()) -> list[float]:
    """The mean losses of the steps. `overflows`: of these the gradients are no numbers, as of fp16 out of its range."""
    losses = []
    rank, world = dist.get_rank(), dist.get_world_size()
    for step in steps:
        tokens = torch.randint(0, VOCABULARY, (8, 6), generator=torch.Generator().manual_seed(step))
        mine = tokens[rank * 8 // world : (rank + 1) * 8 // world]
        loss = torch.nn.functional.cross_entropy(engine(mine[:, :-1]).float().flatten(0, 1), mine[:, 1:].flatten())
        engine.backward(loss * math.inf if step in overflows else loss)
        engine.step()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        losses.append(mean.item() / world)
    return losses


def live(engine: Any, states: tuple[str, ...]) -> Live:
    """What the engine holds, whole, on every rank."""
    found: Live = {"model": {name: one.detach().clone() for name, one in engine.module.named_buffers()}}
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            found["model"][name] = _whole(parameter)
            continue
        for state in ("fp32", *states):
            found.setdefault(state, {})[name] = whole_state(engine, parameter, state)
    return found


def whole_state(engine: Any, parameter: Tensor, state: str) -> Tensor:
    value: Any
    stage = engine.zero_optimization_stage()
    if stage == 3:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        value = (
            safe_get_full_fp32_param(parameter) if state == "fp32" else safe_get_full_optimizer_state(parameter, state)
        )
    elif stage:
        value = _whole_of_fragments(engine, parameter, state)
    else:
        value = _of_plain_optimizer(engine, parameter, state)
    found: Tensor = value.detach().clone()
    return found


def _whole_of_fragments(engine: Any, parameter: Any, state: str) -> Tensor:
    """DeepSpeed's own function fails here with more than one group: it links their states too early."""
    whole = torch.zeros(parameter.numel())
    fragment = parameter._hp_mapping
    if fragment is not None:
        optimizer = engine.optimizer
        of_bf16 = hasattr(optimizer, "fp32_groups_flat_partition")
        flats = optimizer.fp32_groups_flat_partition if of_bf16 else optimizer.single_partition_of_fp32_groups
        flat = flats[fragment.param_group_index]
        flat = flat if state == "fp32" else engine.optimizer.optimizer.state[flat][state]
        at, into = fragment.hp_fragment_address, fragment.lp_fragment_address
        whole[into.start : into.start + into.numel] = flat.detach()[at.start : at.start + at.numel]
    dist.all_reduce(whole, group=engine.optimizer.dp_process_group)
    return whole.view(parameter.shape)


def _of_plain_optimizer(engine: Any, parameter: Tensor, state: str) -> Any:
    optimizer = engine.optimizer
    if hasattr(optimizer, "fp32_groups"):  # 16-bit training: masters
        for low, high in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
            for one, master in zip(low, high, strict=True):
                if one is parameter:
                    return master if state == "fp32" else optimizer.optimizer.state[master][state]
    if hasattr(optimizer, "fp32_groups_flat"):
        for low, master in zip(optimizer.fp16_groups, optimizer.fp32_groups_flat, strict=True):
            flat = master if state == "fp32" else optimizer.optimizer.state[master][state]
            for one, part in zip(low, flat.split([one.numel() for one in low]), strict=True):
                if one is parameter:
                    return part.view(one.shape)
    return parameter if state == "fp32" else optimizer.state[parameter][state]


def _whole(parameter: Tensor) -> Tensor:
    if not hasattr(parameter, "ds_id"):
        return parameter.detach().clone()
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter]):
        return parameter.detach().clone()


STATES = {
    "adamw": ("exp_avg", "exp_avg_sq"),
    "fused": ("exp_avg", "exp_avg_sq"),
    "sgd": ("momentum_buffer",),
    "rmsprop": ("square_avg", "momentum_buffer", "grad_avg"),
}


def states_of(optimizer: str) -> tuple[str, ...]:
    """The keys of its state, but the step."""
    return STATES[optimizer.partition(".")[0]]


def save_all(folder: str, cases: list[tuple[int, str, str]]) -> dict[str, list[float]]:
    """Train each (stage, dtype, optimizer) and save it as `<folder>/<case>`, with what it held as `live.pt` in there.

    By case the losses of the steps that follow.
    """
    found = {}
    for stage, dtype, optimizer in cases:
        case = case_name(stage, dtype, optimizer)
        with training(stage, dtype, optimizer) as engine:
            train(engine, range(SAVED_AT))
            engine.save_checkpoint(f"{folder}/{case}", client_state={"note": "mine", "seen": 3})
            held = live(engine, states_of(optimizer))
            if dist.get_rank() == 0:
                torch.save(held, f"{folder}/{case}/live.pt")
            found[case] = train(engine, range(SAVED_AT, SAVED_AT + 3))
    return found


def load_all(cases: list[Case]) -> list[tuple[Any, list[float], Any]]:
    """DeepSpeed's own loader, on each (folder of universal checkpoints, stage, dtype, optimizer).

    What the engine then holds, the losses of the next steps, and the client's state. Frozen parameters and buffers are
    those of a new model with the saved one's seed, since that loader leaves them alone.
    """
    found = []
    for folder, stage, dtype, optimizer in cases:
        with training(stage, dtype, optimizer, universal=True) as engine:
            path, client = engine.load_checkpoint(folder)
            assert path is not None
            held = live(engine, states_of(optimizer))
            found.append((_listed(held), train(engine, range(SAVED_AT, SAVED_AT + 3)), client))
    return found


def restore_all(cases: list[Case]) -> list[tuple[Any, list[float], Any, list[Any]]]:
    """Ours, into models that differ in everything. Also the groups' hyperparameters and the counters after it."""
    from resilient.checkpoint.formats.deepspeed_restore import restore

    found = []
    for url, stage, dtype, optimizer in cases:
        with training(stage, dtype, optimizer, seed=2) as engine:
            for group in engine.optimizer.param_groups:
                group["lr"], group["weight_decay"] = 0.5, 0.5
            client = restore(engine, url)
            held = live(engine, states_of(optimizer))
            after = [[group["lr"], group["weight_decay"]] for group in engine.optimizer.param_groups]
            facts = [after, engine.global_steps, engine.lr_scheduler.last_epoch]
            found.append((_listed(held), train(engine, range(SAVED_AT, SAVED_AT + 3)), client, facts))
    return found


def load_and_restore(
    own_loader: list[list[Case]], restored: list[list[Case]], refused: tuple[str, str] | None = None
) -> tuple[list[Any], list[Any], Any]:
    """`load_all` of each of the lists, `restore_all` of each of the others, and `refuse_on_one_rank`."""
    return (
        [load_all(cases) for cases in own_loader],
        [restore_all(cases) for cases in restored],
        refuse_on_one_rank(*refused) if refused is not None else None,
    )


def refuse_on_one_rank(url: str, nowhere: str) -> tuple[str, bool]:
    """Rank 1 looks where nothing is. What the restore raised, and whether the model is as it was."""
    from resilient.checkpoint.formats.deepspeed_restore import restore

    with training(2, "float32", seed=2) as engine:
        before = [one.detach().clone() for one in engine.module.state_dict().values()]
        try:
            restore(engine, f"{nowhere}/none" if dist.get_rank() else url)
        except Exception as error:
            after = engine.module.state_dict().values()
            return type(error).__name__, all(torch.equal(*pair) for pair in zip(before, after, strict=True))
    return "nothing", False


def _listed(held: Live) -> Any:
    """As plain lists, which travel between processes."""
    return {state: {name: one.tolist() for name, one in tensors.items()} for state, tensors in held.items()}


def case_name(stage: int, dtype: str, optimizer: str) -> str:
    return f"zero{stage}-{dtype}-{optimizer}"


def files(folder: Path) -> list[str]:
    """The names of a checkpoint's ranks' files."""
    return sorted(file.name for file in folder.rglob("*.pt") if re.search(r"rank", file.name))
