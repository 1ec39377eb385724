"""Jobs of the installed DeepSpeed that cut a model: stages of a pipeline, slices of tensor-parallel ranks."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.multiprocess.deepspeed_jobs import SAVED_AT, WIDTH, prepare, whole_state


class Stage(nn.Module):
    """A layer of a pipeline, with a buffer and a frozen parameter."""

    shift: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.gain = nn.Parameter(torch.rand(WIDTH), requires_grad=False)
        self.register_buffer("shift", torch.rand(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + torch.tanh(self.linear(x)) * self.gain + self.shift.to(x.dtype)
        return y


def save_pipeline(folder: str, stages: int, zero: int) -> None:
    """Train a pipeline of two layers a stage and save it; what each rank held is in `live_<rank>.pt`."""
    deepspeed = prepare()
    from deepspeed.pipe import LayerSpec, PipelineModule

    deepspeed.init_distributed("gloo")

    dist_world = dist.get_world_size()
    model = PipelineModule(
        layers=[LayerSpec(Stage) for _ in range(4)],
        num_stages=stages,
        loss_fn=lambda output, target: nn.functional.mse_loss(output.float(), target.float()),
        partition_method="uniform",
        seed_layers=True,
        base_seed=7,
    )
    config = {
        "train_batch_size": 8,
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 8 // (2 * (dist_world // stages)),
        "steps_per_print": 1000,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
        "zero_optimization": {"stage": zero},
        "bf16": {"enabled": bool(zero)},
    }
    trained = [one for one in model.parameters() if one.requires_grad]
    engine, *_ = deepspeed.initialize(model=model, model_parameters=trained, config=config)
    dtype = torch.bfloat16 if zero else torch.float32
    generator = torch.Generator().manual_seed(5)
    for _ in range(SAVED_AT):
        batches = [(torch.randn(2, WIDTH, generator=generator).to(dtype),) * 2 for _ in range(8)]
        engine.train_batch(data_iter=iter(batches))
    engine.save_checkpoint(folder)
    held = {name: one.detach().clone() for name, one in (*model.named_parameters(), *model.named_buffers())}
    masters = {
        f"{name}.{state}": whole_state(engine, one, state)
        for name, one in model.named_parameters()
        if one.requires_grad
        for state in ("fp32", "exp_avg", "exp_avg_sq")
    }
    torch.save({"model": held, "states": masters}, f"{folder}/live_{dist.get_rank()}.pt")
    dist.barrier()
    engine.destroy()


class Attention(nn.Module):
    """By the names that DeepSpeed's preset for Llama looks for."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            self.add_module(name, nn.Linear(16, 16, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.get_submodule("q_proj")(x) * self.get_submodule("k_proj")(x) + self.get_submodule("v_proj")(x)
        y: Tensor = self.get_submodule("o_proj")(torch.tanh(mixed))
        return y


class Llama(nn.Module):
    """Its shape, in small: what is cut along rows, along columns, and not at all."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(64, 16)
        layer = nn.ModuleDict({"self_attn": Attention(), "norm": nn.LayerNorm(16)})
        self.layers = nn.ModuleList([layer])

    def forward(self, tokens: Tensor) -> Tensor:
        x: Tensor = self.embed_tokens(tokens)
        for layer in self.layers:
            x = x + layer.get_submodule("self_attn")(layer.get_submodule("norm")(x))
        return x


def save_slices(folder: str) -> None:
    """Train in tensor-parallel slices over all ranks, as DeepSpeed cuts a model (AutoTP), and save it.

    `live.pt`: its masters and states, joined by hand.
    """
    engine, shapes = _engine_of_slices(seed=0, universal=False)
    for step in range(SAVED_AT):
        tokens = torch.randint(0, 64, (4, 8), generator=torch.Generator().manual_seed(step))
        loss = engine(tokens).float().square().mean()
        engine.backward(loss)
        engine.step()
    engine.save_checkpoint(folder)
    _save_joined(engine, shapes, f"{folder}/live.pt")


def load_slices(folder: str) -> None:
    """DeepSpeed's own loader, from a universal checkpoint into slices over all ranks; leaves `loaded.pt`."""
    engine, shapes = _engine_of_slices(seed=1, universal=True)
    path, _ = engine.load_checkpoint(folder)
    assert path is not None
    _save_joined(engine, shapes, f"{folder}/loaded.pt")


def _engine_of_slices(*, seed: int, universal: bool) -> tuple[Any, dict[str, torch.Size]]:
    deepspeed = prepare()
    deepspeed.init_distributed("gloo")
    torch.manual_seed(seed)
    model = Llama()
    shapes = {name: one.shape for name, one in model.named_parameters()}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 1,
        "steps_per_print": 1000,
        "bf16": {"enabled": True},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
        "zero_optimization": {"stage": 1},
        "checkpoint": {"load_universal": universal},
    }
    if dist.get_world_size() > 1:
        config["tensor_parallel"] = {"autotp_size": dist.get_world_size(), "preset_model": "llama"}
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    return engine, shapes


def _save_joined(engine: Any, shapes: dict[str, torch.Size], path: str) -> None:
    states = {
        f"{name}.{state}": _joined(whole_state(engine, one, state), shapes[name])
        for name, one in engine.module.named_parameters()
        for state in ("fp32", "exp_avg", "exp_avg_sq")
    }
    if dist.get_rank() == 0:
        torch.save(states, path)
    dist.barrier()
    engine.destroy()


def _joined(mine: Tensor, shape: torch.Size) -> Tensor:
    """The slices of all ranks, along the dimension that is shorter than in the whole; equal ones once."""
    parts = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, mine)
    shorter = [dim for dim, (own, full) in enumerate(zip(mine.shape, shape, strict=True)) if own != full]
    return torch.cat(parts, shorter[0]) if shorter else parts[0]
