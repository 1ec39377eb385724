"""Engines whose ranks hold different parts of a model, with checkpoints of ours: pipelines, experts, tensor slices."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.multiprocess import deepspeed_cut_jobs as cut_jobs
from tests.multiprocess.deepspeed_cut_jobs import Stage
from tests.multiprocess.deepspeed_hook_jobs import block
from tests.multiprocess.deepspeed_jobs import SAVED_AT, WIDTH, prepare

Step = Callable[[int], float]


@dataclass(frozen=True, slots=True)
class Held:
    """What a rank had, by the name in a snapshot: parameters, and what its masters hold of each as (begin, values)."""

    model: dict[str, Any]
    masters: dict[str, tuple[int, list[float]]]
    losses: list[float]
    fences: int


class Shared(nn.Module):
    """The first and the last layer of the pipeline, which are one."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(WIDTH, WIDTH) / 10)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


def pipeline(url: str, seed: int, stages: int, zero: int) -> tuple[Any, Step]:
    """Four layers with buffers and frozen parameters between two that are tied."""
    deepspeed = prepare()
    from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec

    deepspeed.init_distributed("gloo")
    ends = [TiedLayerSpec("ends", Shared), TiedLayerSpec("ends", Shared)]
    model = PipelineModule(
        layers=[ends[0], *(LayerSpec(Stage) for _ in range(4)), ends[1]],
        num_stages=stages,
        loss_fn=lambda output, target: nn.functional.mse_loss(output.float(), target.float()),
        partition_method="uniform",
        seed_layers=True,
        base_seed=seed,
    )
    config = {
        "train_batch_size": 8,
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 8 // (2 * (dist.get_world_size() // stages)),
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
        **_rest(zero),
    }
    trained = [one for one in model.parameters() if one.requires_grad]
    engine, *_ = deepspeed.initialize(model=model, model_parameters=trained, config=config | block(url))

    def step(number: int) -> float:
        generator = torch.Generator().manual_seed(number)
        batches = [(torch.randn(2, WIDTH, generator=generator).to(_dtype(zero)),) * 2 for _ in range(8)]
        return float(engine.train_batch(data_iter=iter(batches)))

    return engine, step


class Sparse(nn.Module):
    """A layer that all have, and four experts."""

    def __init__(self, ways: int) -> None:
        super().__init__()
        from deepspeed.moe.layer import MoE

        self.first = nn.Linear(WIDTH, WIDTH)
        expert = nn.Linear(WIDTH, WIDTH)
        self.moe = MoE(hidden_size=WIDTH, expert=expert, num_experts=4, ep_size=ways, k=1, use_rts=False)

    def forward(self, x: Tensor) -> Tensor:
        y, balance, _ = self.moe(self.first(x))
        loss: Tensor = y.float().square().mean() + 0.01 * balance
        return loss


def experts(url: str, seed: int, ways: int, zero: int) -> tuple[Any, Step]:
    """`ways`: over how many ranks the experts are spread; each expert is another one."""
    deepspeed = prepare()
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

    deepspeed.init_distributed("gloo")
    torch.manual_seed(seed)
    model = Sparse(ways)
    with torch.no_grad():
        for number, one in enumerate(model.moe.deepspeed_moe.experts.parameters()):
            one += number + 10 * dist.get_rank() * (ways > 1)
    groups = split_params_into_different_moe_groups_for_optimizer(
        {"params": list(model.parameters()), "name": "all", "lr": 1e-2}
    )
    config = {"train_micro_batch_size_per_gpu": 4, "zero_allow_untested_optimizer": True, **_rest(zero)}
    engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(groups), config=config | block(url))

    def step(number: int) -> float:
        seed = number * 10 + dist.get_rank()
        loss = engine(torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(seed)).to(_dtype(zero)))
        engine.backward(loss)
        engine.step()
        return float(loss)

    return engine, step


def slices(url: str, seed: int, zero: int) -> tuple[Any, Step]:
    """AutoTP over all ranks."""
    deepspeed = prepare()
    deepspeed.init_distributed("gloo")
    torch.manual_seed(seed)
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
        "tensor_parallel": {"autotp_size": dist.get_world_size(), "preset_model": "llama"},
        **_rest(zero),
    }
    engine, *_ = deepspeed.initialize(model=cut_jobs.Llama(), config=config | block(url))

    def step(number: int) -> float:
        tokens = torch.randint(0, 64, (4, 8), generator=torch.Generator().manual_seed(number))
        loss = engine(tokens).float().square().mean()
        engine.backward(loss)
        engine.step()
        return float(loss)

    return engine, step


MAKERS: Mapping[str, Callable[..., tuple[Any, Step]]] = {
    "pipeline": pipeline,
    "experts": experts,
    "slices": slices,
}


def save(folder: str, kind: str, *how: Any) -> Held:
    """Train, with a checkpoint at every step; what was held at the last, and the losses of two steps beyond it."""
    from resilient.launch.deepspeed import attach

    engine, step = MAKERS[kind](f"{folder}/run", 1, *how)
    assert engine.zero_cpu_offload() == bool(how[-1])
    hook = attach(engine)
    for number in range(SAVED_AT):
        step(number)
        engine.save_checkpoint(f"{folder}/out")
    held = _held(engine)
    before = len(hook.checkpointer.statistics.fence_seconds)
    losses = [step(number) for number in range(SAVED_AT, SAVED_AT + 2)]
    fences = len(hook.checkpointer.statistics.fence_seconds) - before
    assert hook.close(keep_memory=True) == []
    return Held(*held, losses, fences)


def resume(folder: str, kind: str, *how: Any) -> Held:
    """Load it into an engine that began otherwise, and go on."""
    from resilient.launch.deepspeed import attach

    engine, step = MAKERS[kind](f"{folder}/run", 2, *how)
    hook = attach(engine)
    path, _ = engine.load_checkpoint(f"{folder}/out")
    assert path is not None
    assert Path(path).name == f"global_step{SAVED_AT}"
    held = _held(engine)
    losses = [step(number) for number in range(SAVED_AT, SAVED_AT + 2)]
    assert hook.close() == []
    return Held(*held, losses, 0)


def _held(engine: Any) -> tuple[dict[str, Any], dict[str, tuple[int, list[float]]]]:
    from resilient.checkpoint.formats.deepspeed_engine import flats
    from resilient.launch.deepspeed.names import Names

    names = Names(engine)
    model = {names.of(name): one.tolist() for name, one in engine.module.named_parameters()}
    model |= {names.of(name): one.tolist() for name, one in engine.module.named_buffers()}
    masters = {
        names.of(one.name): (one.begin, flat.master.detach().view(-1)[one.start : one.start + one.numel].tolist())
        for flat in flats(engine)
        for one in flat.fragments
    }
    return model, masters


def _rest(zero: int) -> dict[str, Any]:
    """ZeRO-1 with its optimizer in host memory, or ZeRO-0."""
    offload = {"offload_optimizer": {"device": "cpu"}} if zero else {}
    return {
        "steps_per_print": 1000,
        "zero_optimization": {"stage": zero, **offload},
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": bool(zero)},
    }


def _dtype(zero: int) -> torch.dtype:
    return torch.bfloat16 if zero else torch.float32
