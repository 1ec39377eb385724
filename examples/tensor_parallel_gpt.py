"""A small GPT that is cut over the ranks of the job, and trains to the losses of one that is not.

    torchrun --nproc-per-node 2 examples/tensor_parallel_gpt.py --url /tmp/tp --steps 100
    torchrun --nproc-per-node 1 examples/tensor_parallel_gpt.py --url /tmp/tp --steps 200    # goes on, on one rank

Heads and hidden units are dealt out to the ranks, and between the layers the tokens are (sequence parallelism). What is
sent and received hides behind the matmuls (`resilient.kernels`). Parameters are DTensors of the plain shapes, so a
checkpoint of two ranks is restored into one, or four. The data, and what follows the last layer, is the same on all.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn import functional

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))

from examples.corpus import Sampler, load_tokens  # noqa: E402
from examples.gpt import SIZES, Config, next_token_loss  # noqa: E402
from resilient import Checkpointer, Policy  # noqa: E402
from resilient.kernels.layers import (  # noqa: E402
    AttentionProjections,
    ParallelMLP,
    gather_sequence,
    parallel_norm,
    scatter_sequence,
)


class Block(nn.Module):
    """[batch, this rank's time, width] to the same."""

    def __init__(self, config: Config, mesh: DeviceMesh) -> None:
        super().__init__()
        self.attention_norm = parallel_norm(nn.LayerNorm(config.width), mesh)
        self.attention = AttentionProjections(config.width, config.heads, mesh, sequence_parallel=True)
        self.feed_norm = parallel_norm(nn.LayerNorm(config.width), mesh)
        self.feed = ParallelMLP(config.width, 4 * config.width, mesh, sequence_parallel=True)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (part.transpose(1, 2) for part in self.attention.project(self.attention_norm(x)))
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.attention.merge(mixed.transpose(1, 2))
        after: Tensor = x + self.feed(self.feed_norm(x))
        return after


class TensorParallelGPT(nn.Module):
    """int64 tokens (batch, time), the same on all ranks, to logits (batch, time, vocabulary), the same on all ranks."""

    def __init__(self, config: Config, mesh: DeviceMesh) -> None:
        super().__init__()
        self.mesh = mesh
        self.tokens = nn.Embedding(config.vocabulary, config.width)
        self.positions = nn.Embedding(config.context, config.width)
        self.blocks = nn.ModuleList(Block(config, mesh) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, config.vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        x = scatter_sequence(x, self.mesh)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(gather_sequence(x, self.mesh)))
        return logits


def train(arguments: argparse.Namespace, mesh: DeviceMesh) -> list[float]:
    """The loss of each step from where the run was to `steps`."""
    config = SIZES[arguments.size]
    torch.manual_seed(0)
    model = TensorParallelGPT(config, mesh)
    # What is cut and what is not cannot be updated in one multi-tensor call.
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=False)
    sampler = Sampler(load_tokens(), context=config.context, batch=arguments.batch, rank=0, world_size=1, seed=0)
    checkpointer = Checkpointer(
        arguments.url,
        {"model": model, "optimizer": optimizer, "loader": sampler},
        Policy(durable_every=arguments.every),
    )
    losses = []
    for step in range((checkpointer.restore() or 0) + 1, arguments.steps + 1):
        inputs, targets = sampler.next()
        loss = next_token_loss(model(inputs), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        checkpointer.save(step)
        losses.append(loss.item())
        if dist.get_rank() == 0 and step % 10 == 0:
            print(f"step {step}: loss {losses[-1]:.4f}", flush=True)
    checkpointer.close()
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--url", required=True, help="where checkpoints go: a folder, file://..., s3://..., ...")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--size", choices=sorted(SIZES), default="demo")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--every", type=int, default=50, metavar="N", help="write every Nth step to --url")
    parser.add_argument("--result", type=Path, metavar="FILE", help="write the losses here")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    losses = train(arguments, init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",)))
    if arguments.result and dist.get_rank() == 0:
        arguments.result.write_text(json.dumps(losses))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
