"""A small decoder-only transformer in plain torch: the model that the examples and benchmarks train.

Written to be read, and deterministic on every device (no fused attention: its backward is not bit-reproducible on
GPUs). Input and output embeddings are tied, and dropout is on, because a resume has to get both right. It is not meant
for long contexts. Sizes: "demo" trains at about a tenth of a second a step on one core, "50m" has about 580 MB of
state with AdamW; `state_of_bytes` makes a state of any size for benchmarks.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

BYTES_PER_PARAMETER = 12  # float32 value and AdamW's two moments


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """The shape of a model. `width` must be a multiple of `heads`."""

    layers: int
    width: int
    heads: int
    context: int
    vocabulary: int = 256
    dropout: float = 0.1

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")


SIZES = {
    "demo": Config(layers=4, width=192, heads=6, context=64),
    "50m": Config(layers=12, width=576, heads=9, context=256),
}


class Attention(nn.Module):
    """Causal self-attention, (batch, time, width) to the same."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.heads = config.heads
        self.mix = nn.Linear(config.width, 3 * config.width)
        self.out = nn.Linear(config.width, config.width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        batch, time, width = x.shape
        query, key, value = self.mix(x).view(batch, time, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        scores = query @ key.transpose(-2, -1) * (width // self.heads) ** -0.5
        future = torch.ones(time, time, dtype=torch.bool, device=x.device).triu(1)
        weights = self.dropout(scores.masked_fill(future, float("-inf")).softmax(-1))
        mixed: Tensor = self.out((weights @ value).transpose(1, 2).reshape(batch, time, width))
        return mixed


class Block(nn.Module):
    """Attention and a feed-forward layer, each added to what came in."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.width)
        self.attention = Attention(config)
        self.feed_norm = nn.LayerNorm(config.width)
        self.feed = nn.Sequential(
            nn.Linear(config.width, 4 * config.width), nn.GELU(), nn.Linear(4 * config.width, config.width)
        )
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x)))
        after: Tensor = x + self.dropout(self.feed(self.feed_norm(x)))
        return after


class GPT(nn.Module):
    """Next-token model: int64 tokens (batch, time) to logits (batch, time, vocabulary)."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.tokens = nn.Embedding(config.vocabulary, config.width)
        self.positions = nn.Embedding(config.context, config.width)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, config.vocabulary, bias=False)
        self.apply(_initialise)
        self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.dropout(self.tokens(tokens) + self.positions(positions))
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


def next_token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats, a scalar."""
    return functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def state_of_bytes(total_bytes: int = 1 << 30, device: str = "cpu") -> tuple[GPT, torch.optim.AdamW]:
    """A model and its optimizer whose tensors together take about `total_bytes` (within a tenth, from 8 MiB up).

    The optimizer's moments exist already and are not zero. Blocks while the tensors are filled.
    """
    config = config_of_bytes(total_bytes)
    with torch.device(device):
        model = GPT(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return model, optimizer


def config_of_bytes(total_bytes: int) -> Config:
    """The model whose parameters and AdamW moments take about `total_bytes`; its layers grow wider, then more."""
    parameters = total_bytes // BYTES_PER_PARAMETER
    width = max(64, round((parameters / (12 * 8)) ** 0.5 / 64) * 64)
    context = 128
    embeddings = (256 + context) * width
    layers = max(1, round((parameters - embeddings) / (12 * width**2 + 13 * width)))
    return Config(layers=layers, width=width, heads=width // 64, context=context)
