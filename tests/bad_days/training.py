"""A small deterministic training, to be disturbed: what it computes depends on its seed and its state alone."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import keystr, tree_leaves_with_path

from resilient.checkpoint.checkpointer import Checkpointer
from resilient.checkpoint.digest import digest


class Training:
    """A stack of linear layers under AdamW, fed from the global random generator."""

    def __init__(self, width: int = 32, layers: int = 2, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.width = width
        self.model = nn.Sequential(*[nn.Linear(width, width) for _ in range(layers)])
        self.optimizer: torch.optim.Optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)

    @property
    def state(self) -> dict[str, object]:
        return {"model": self.model, "optimizer": self.optimizer}

    def step(self, wrapped: nn.Module | None = None) -> None:
        x = torch.randn(2, self.width)
        (wrapped or self.model)(x).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def run(self, first: int, last: int, checkpointer: Checkpointer | None = None) -> list[Any]:
        """Steps `first` to `last`, each saved; the handles."""
        handles = []
        for step in range(first, last + 1):
            self.step()
            if checkpointer is not None:
                handles.append(checkpointer.save(step))
        return handles

    def tensors(self) -> dict[str, torch.Tensor]:
        """A copy of every tensor of the state, by name."""
        found = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        for number, parameter in enumerate(self.model.parameters()):
            for path, value in tree_leaves_with_path(self.optimizer.state.get(parameter, {})):
                found[f"optimizer.{number}{keystr(path)}"] = torch.as_tensor(value)
        found["rng"] = torch.get_rng_state()
        return {name: tensor.detach().clone() for name, tensor in found.items()}

    def digest(self) -> str:
        """One digest of all tensors, names included."""
        parts = [f"{name}{digest(_bytes(tensor))}" for name, tensor in sorted(self.tensors().items())]
        return digest("\n".join(parts).encode())


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def differing(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    """The names of the tensors that are not the same, bit for bit."""
    same = {
        name
        for name in one.keys() & other.keys()
        if one[name].shape == other[name].shape and _bytes(one[name]) == _bytes(other[name])
    }
    return sorted((one.keys() | other.keys()) - same)


def undisturbed(steps: int, make: Callable[[], Training] = Training) -> dict[str, torch.Tensor]:
    """What a training that nothing happened to ends with."""
    training = make()
    training.run(1, steps)
    return training.tensors()
