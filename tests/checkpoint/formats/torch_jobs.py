"""Models in training with optimizers of several kinds, for the tests of torch's own formats."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class Network(nn.Module):
    """With tied weights and buffers, and matrices on both sides of the rest."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(30, 8)
        self.inner = nn.Linear(8, 8)
        self.norm = nn.BatchNorm1d(8)
        self.outer = nn.Linear(8, 8)
        self.head = nn.Linear(8, 30, bias=False)
        self.head.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.outer(self.norm(self.inner(self.table(x)))))
        return y


def matrices_apart(model: nn.Module) -> list[dict[str, Any]]:
    matrices = [one for one in model.parameters() if one.ndim >= 2]
    others = [one for one in model.parameters() if one.ndim < 2]
    return [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]


OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "adamw": lambda model: torch.optim.AdamW(model.parameters(), lr=0.01),
    "groups": lambda model: torch.optim.AdamW(matrices_apart(model), lr=0.01, amsgrad=True),
    "named": lambda model: torch.optim.RAdam(list(model.named_parameters())[::-1], lr=0.01),
    "momentum": lambda model: torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9),
    "plain": lambda model: torch.optim.SGD(model.parameters(), lr=0.01),
    "factored": lambda model: torch.optim.Adafactor(model.parameters(), lr=0.01),
}


class Job:
    """A model in training, with a schedule."""

    def __init__(self, kind: str) -> None:
        torch.manual_seed(1)
        self.model = Network()
        self.optimizer = OPTIMIZERS[kind](self.model)
        self.schedule = torch.optim.lr_scheduler.StepLR(self.optimizer, 2, 0.5)

    def train(self, steps: int, seed: int) -> list[float]:
        generator, losses = torch.Generator().manual_seed(seed), []
        for _ in range(steps):
            x = torch.randint(0, 30, (8,), generator=generator)
            loss = nn.functional.cross_entropy(self.model(x), x)
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.schedule.step()
            losses.append(loss.item())
        return losses

    def state(self) -> dict[str, Any]:
        parts: dict[str, Any] = {"model": self.model, "optimizer": self.optimizer, "schedule": self.schedule}
        return {**{name: part.state_dict() for name, part in parts.items()}, "step": 3}

    def load(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
