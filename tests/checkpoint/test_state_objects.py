"""Schedulers, scalers, loaders, generators and objects of one's own go on where they were."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer, lr_scheduler
from torch.utils.data import Dataset
from torchdata.stateful_dataloader import StatefulDataLoader

from tests.checkpoint.jobs import Job, assert_restores

pytestmark = pytest.mark.usefixtures("runtime_dir")

SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2, 0.5),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 0.9**epoch),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda epoch: 0.9),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 10),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 2, 2),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, 20),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, 2, cycle_momentum=False),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, total_iters=2), lr_scheduler.ExponentialLR(o, 0.9)], [2]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, total_iters=3), lr_scheduler.PolynomialLR(o, 8)]
    ),
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, 0.001, anneal_epochs=4),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_goes_on_where_it_was(name: str, tmp_path: Path) -> None:
    def make() -> Job:
        model = nn.Linear(4, 2)
        rate: Any = torch.tensor(0.05) if name in ("StepLR", "CosineAnnealingLR") else 0.05
        optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
        scheduler = SCHEDULERS[name](optimizer)

        def step() -> None:
            optimizer.zero_grad()
            loss = model(torch.randn(8, 4)).square().mean()
            loss.backward()
            optimizer.step()
            scheduler.step(*([loss.item()] if name == "ReduceLROnPlateau" else []))

        # The scheduler comes first: its state must not be what the optimizer's groups end with.
        return Job({"scheduler": scheduler, "model": model, "optimizer": optimizer}, step)

    assert_restores(make, tmp_path)


def test_a_gradient_scaler_and_an_average_of_the_model_go_on(tmp_path: Path) -> None:
    def make() -> Job:
        model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        average = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)

        def step() -> None:
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = model(torch.randn(8, 4)).square().mean()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            average.update_parameters(model)

        off = torch.amp.GradScaler("cpu", enabled=False)
        return Job({"model": model, "average": average, "optimizer": optimizer, "scaler": scaler, "off": off}, step)

    assert_restores(make, tmp_path)


class Numbers(Dataset[Tensor]):
    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> Tensor:
        return torch.full((4,), float(index))


class Position:
    """An object of one's own."""

    def __init__(self) -> None:
        self.seen: list[int] = [random.randrange(100)]
        self.generator = np.random.default_rng(random.randrange(100))

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen, "generator": self.generator.bit_generator.state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seen = state["seen"]
        self.generator.bit_generator.state = state["generator"]


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")  # torchdata calls it
def test_a_loader_in_the_middle_of_an_epoch_every_generator_and_objects_go_on(tmp_path: Path) -> None:
    def make() -> Job:
        model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))
        optimizer = torch.optim.AdamW(model.parameters())
        loader: Any = StatefulDataLoader(Numbers(), batch_size=4, shuffle=True)
        progress: dict[str, Any] = {"epoch": 0, "best": float("inf"), "losses": [], "batches": {}}
        position, generator = Position(), torch.Generator().manual_seed(int(torch.randint(100, ())))
        batches: Any = None

        def step() -> None:
            nonlocal batches
            batches = batches or iter(loader)
            batch = next(batches)
            optimizer.zero_grad()
            noise = (
                torch.rand((), generator=generator) + random.random() + np.random.rand() + position.generator.random()
            )
            loss = (model(batch) * noise).square().mean()
            loss.backward()
            optimizer.step()
            progress["losses"].append(loss.item())
            progress["batches"][len(progress["losses"])] = batch[:, 0].tolist()
            position.seen.append(int(batch[0, 0]))

        parts = {"loader": loader, "progress": progress, "position": position, "generator": generator}
        return Job({"model": model, "optimizer": optimizer, **parts}, step)

    assert_restores(make, tmp_path, steps=4)
