"""The training job that every benchmark disturbs: a GPT with AdamW on random tokens.

What counts here is the size and number of its tensors and that a step is a real forward, backward and update, so the
model learns nothing. Importing this needs torch only; what is saved, and how, is the business of `bench/peers.py`.
"""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """The size of the model and of the batch of one rank."""

    layers: int
    width: int
    heads: int
    vocabulary: int = 4096
    context: int
    batch: int = 1


SHAPES = {
    "large": Shape(layers=12, width=768, heads=12, context=64),  # about 1.06 GB in 444 tensors with AdamW's moments
    "medium": Shape(layers=9, width=640, heads=10, context=128),  # about 48 M parameters, 570 MB
    "tiny": Shape(layers=2, width=128, heads=4, vocabulary=512, context=32),  # to see the benchmarks run, no more
}


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.attended = nn.Linear(width, width)
        self.norm_feed = nn.LayerNorm(width)
        self.widen = nn.Linear(width, 4 * width)
        self.narrow = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        split = self.query_key_value(self.norm_attention(x)).view(batch, length, 3, self.heads, -1)
        query, key, value = split.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.attended(attended.transpose(1, 2).reshape(batch, length, width))
        added: Tensor = x + self.narrow(F.gelu(self.widen(self.norm_feed(x))))
        return added


class Gpt(nn.Module):
    """Logits of the next token. No tied weights, because safetensors' own writer refuses them."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.tokens = nn.Embedding(shape.vocabulary, shape.width)
        self.positions = nn.Embedding(shape.context, shape.width)
        self.blocks = nn.ModuleList(Block(shape.width, shape.heads) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(shape.width)
        self.head = nn.Linear(shape.width, shape.vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


class Training:
    """Model, optimizer and one fixed batch. Distributed over the default group if that has more than one rank."""

    def __init__(self, shape: Shape) -> None:
        torch.manual_seed(0)
        self.model: nn.Module = Gpt(shape)
        self.optimizer: torch.optim.Optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        distributed = dist.is_initialized() and dist.get_world_size() > 1
        self._forward: nn.Module = DistributedDataParallel(self.model) if distributed else self.model
        self._tokens = torch.randint(shape.vocabulary, (shape.batch, shape.context))

    def step(self, updating: Callable[[], AbstractContextManager[object]]) -> float:
        """One step; `updating()` surrounds the optimizer's step. Returns the seconds that it took."""
        started = time.perf_counter()
        self.optimizer.zero_grad()
        logits = self._forward(self._tokens)
        loss = F.cross_entropy(logits.flatten(0, 1), self._tokens.flatten())
        loss.backward()
        with updating():
            self.optimizer.step()
        return time.perf_counter() - started

    @cached_property
    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """The live tensors by name, collected once, after the first step: the optimizer has none before it.

        The same objects serve every later save, so a peer is spared building a state dict each time.
        """
        named = dict(self.model.named_parameters())
        moments = {
            f"{name}.{key}": value
            for name, parameter in named.items()
            for key, value in self.optimizer.state[parameter].items()
        }
        return {"model": {name: value.detach() for name, value in named.items()}, "optimizer": moments}

    def image_bytes(self) -> int:
        return sum(value.nbytes for part in self.tensors.values() for value in part.values())


class Many(Training):
    """A job of very many small tensors and hardly any arithmetic."""

    def __init__(self, tensors: int, elements: int) -> None:
        self.model = nn.ParameterList(torch.randn(elements) for _ in range(tensors))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-4)
        for parameter in self.model.parameters():
            parameter.grad = torch.ones_like(parameter)

    def step(self, updating: Callable[[], AbstractContextManager[object]]) -> float:
        started = time.perf_counter()
        with updating():
            self.optimizer.step()
        return time.perf_counter() - started
