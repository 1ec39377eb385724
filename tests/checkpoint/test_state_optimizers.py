"""Every optimizer comes back with all its state, from memory and from disk, and trains on as if nothing had been."""

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer, lr_scheduler

from tests.checkpoint.jobs import Job, assert_restores, checkpointing

pytestmark = pytest.mark.usefixtures("runtime_dir")
MakeOptimizer = Callable[[Iterable[Tensor]], Optimizer]


class Network(nn.Module):
    """Some parameters of several shapes, dropout, and one that gets no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Dropout(0.2), nn.Linear(10, 4))
        self.unused = nn.Parameter(torch.randn(3))
        self.scale = nn.Parameter(torch.randn(()))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x) * self.scale
        return y


def job_of(make_optimizer: MakeOptimizer) -> Job:
    model = Network()
    optimizer: Any = make_optimizer(model.parameters())

    def step() -> None:
        x = torch.randn(8, 6)

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss: Tensor = model(x).square().mean()
            loss.backward()
            return loss

        optimizer.step(closure)

    return Job({"model": model, "optimizer": optimizer}, step)


class Unusual(Optimizer):
    """State of Python numbers, nested tensors, other dtypes and shapes, and some that belongs to no parameter."""

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        super().__init__(parameters, {"lr": 0.1, "schedule": [0.5, (1, None)], "mask": torch.ones(2)})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        closure()
        state: Any = self.state
        seen = state.setdefault("seen", {"steps": 0})  # always the same object
        seen.update(steps=seen["steps"] + 1, last=torch.randn(2))
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group["lr"])

    @torch.no_grad()
    def _update(self, parameter: Tensor, gradient: Tensor, lr: float) -> None:
        state = self.state[parameter]
        count = state.get("step", 0)
        if not state:
            state["history"] = []
            state["turned"] = torch.zeros(3, 2).t()
            state["low"] = torch.zeros(parameter.shape, dtype=torch.bfloat16)
            state["count"] = torch.zeros((), dtype=torch.int64)
            state["flag"] = 1  # becomes a tensor later
        state["step"] = count + 1
        state["turned"].add_(torch.randn(2, 3))
        state["low"].add_(gradient)
        state["count"].add_(1)
        state["history"] = [*state["history"][-2:], {"gradient": gradient.clone(), "at": (count, 0.5)}]
        if count == 2:
            state["flag"] = torch.tensor([4.0, 5.0])
        parameter.sub_(lr * state["low"])


OPTIMIZERS: dict[str, MakeOptimizer] = {
    "AdamW": partial(torch.optim.AdamW, lr=0.01),
    "AdamW amsgrad": partial(torch.optim.AdamW, lr=0.01, amsgrad=True),
    "AdamW foreach": partial(torch.optim.AdamW, lr=0.01, foreach=True),
    "AdamW fused": partial(torch.optim.AdamW, lr=0.01, fused=True),
    "AdamW with a tensor for its rate": partial(torch.optim.AdamW, lr=torch.tensor(0.01)),
    "SGD": partial(torch.optim.SGD, lr=0.01),
    "SGD with momentum": partial(torch.optim.SGD, lr=0.01, momentum=0.9, nesterov=True),
    "SGD fused": partial(torch.optim.SGD, lr=0.01, momentum=0.9, fused=True),
    "Adagrad": partial(torch.optim.Adagrad, lr=0.01),
    "LBFGS": partial(torch.optim.LBFGS, lr=0.1, max_iter=3, history_size=4),
    "LBFGS with line search": partial(torch.optim.LBFGS, max_iter=2, line_search_fn="strong_wolfe"),
    "Adafactor": partial(torch.optim.Adafactor, lr=0.01),
    "RMSprop": partial(torch.optim.RMSprop, lr=0.01, momentum=0.9, centered=True),
    "NAdam": partial(torch.optim.NAdam, lr=0.01),
    "RAdam": partial(torch.optim.RAdam, lr=0.01),
    "Adamax": partial(torch.optim.Adamax, lr=0.01),
    "Adadelta": torch.optim.Adadelta,
    "ASGD": partial(torch.optim.ASGD, lr=0.01),
    "Rprop": partial(torch.optim.Rprop, lr=0.01),
    "one of one's own": Unusual,
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_comes_back_bit_for_bit_and_goes_on_so(name: str, tmp_path: Path) -> None:
    assert_restores(lambda: job_of(OPTIMIZERS[name]), tmp_path)


def test_several_groups_of_a_named_optimizer_keep_their_own_hyperparameters(tmp_path: Path) -> None:
    def make() -> Job:
        model = Network()
        rate = torch.tensor(0.02)
        groups = [
            {"params": list(model.inner[0].named_parameters()), "lr": rate, "weight_decay": torch.rand(()).item()},
            {"params": list(model.inner[3].named_parameters()), "lr": rate, "betas": (0.8, torch.rand(()).item())},
            {"params": [("scale", model.scale)], "lr": 0.5},
        ]
        optimizer = torch.optim.AdamW(groups)
        scheduler = lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.9**epoch)

        def step() -> None:
            optimizer.zero_grad()
            model(torch.randn(8, 6)).square().mean().backward()
            optimizer.step()
            scheduler.step()

        return Job({"model": model, "optimizer": optimizer, "scheduler": scheduler}, step)

    assert_restores(make, tmp_path)


def test_groups_find_each_other_by_their_parameters(tmp_path: Path) -> None:
    def make(order: int) -> Job:
        model = Network()
        groups = [
            {"params": model.inner[0].parameters(), "lr": 0.1 + order},
            {"params": model.inner[3].parameters(), "lr": 0.2 + order},
            {"params": [], "lr": 0.3 + order},
        ]
        optimizer = torch.optim.SGD(groups[::order])
        return Job({"model": model, "optimizer": optimizer}, lambda: None)

    with checkpointing(tmp_path, make(1)) as checkpointer:
        checkpointer.save(1).durable("durable").result(30)
    job = make(-1)
    with checkpointing(tmp_path, job) as checkpointer:
        checkpointer.restore()
    assert [group["lr"] for group in job.state["optimizer"].param_groups] == [1.3, 1.2, 1.1]


def test_a_tensor_that_groups_share_is_not_given_the_values_of_two(tmp_path: Path) -> None:
    def make(first: Tensor, second: Tensor) -> Job:
        model = Network()
        groups = [
            {"params": model.inner[0].parameters(), "lr": first},
            {"params": model.inner[3].parameters(), "lr": second},
        ]
        return Job({"model": model, "optimizer": torch.optim.AdamW(groups)}, lambda: None)

    with checkpointing(tmp_path, make(torch.tensor(0.1), torch.tensor(0.2))) as checkpointer:
        checkpointer.save(1).durable("durable").result(30)
    shared = torch.tensor(0.5)
    job = make(shared, shared)
    with checkpointing(tmp_path, job) as checkpointer:
        checkpointer.restore()
    rates = [group["lr"] for group in job.state["optimizer"].param_groups]
    assert rates == [torch.tensor(0.1), torch.tensor(0.2)]
    assert rates[0] is shared
