"""Train a small network with Lightning, be killed, and go on where it was.

    torchrun --standalone --nproc-per-node 2 --max-restarts 3 examples/train_lightning.py --url /tmp/run --out out

Two lines protect it, marked as such. `--die-at-step` kills rank 0 in its first life; the losses in `<out>/losses.0` and
the weights in `<out>/model.pt` are those of an undisturbed run, bit for bit.
"""

import argparse
import json
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.environments import LightningEnvironment
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from resilient.launch.joining import join_group
from resilient.launch.lightning import ResilientCallback
from resilient.policy import Policy


class Net(pl.LightningModule):
    """Writes each loss to a file; dies in the middle of a step, where it is told to."""

    def __init__(self, out: str, die_at_step: int | None = None) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 32), nn.Dropout(0.2), nn.Linear(32, 1))
        self.out, self.die_at_step = Path(out), die_at_step

    def training_step(self, batch: Sequence[Tensor], index: int) -> Tensor:
        loss: Tensor = (self.net(batch[0]) - batch[1]).square().mean()
        with (self.out / f"losses.{self.global_rank}").open("a") as file:
            file.write(json.dumps([os.getpid(), self.global_step, loss.item()]) + "\n")
        if self.global_rank == 0 and self.global_step == self.die_at_step:
            os.kill(os.getpid(), signal.SIGKILL)
        return loss

    def validation_step(self, batch: Sequence[Tensor], index: int) -> None:
        self.log("loss", (self.net(batch[0]) - batch[1]).square().mean(), sync_dist=True)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 3)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def data() -> TensorDataset:
    x = torch.randn(40, 8, generator=torch.Generator().manual_seed(1))
    return TensorDataset(x, x.sum(1, keepdim=True))


def make_trainer(callbacks: list[pl.Callback], **options: Any) -> pl.Trainer:
    """A trainer of 3 epochs, which validates in the middle of each, under torchrun or by itself."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if ranks == 1:
        options.setdefault("plugins", [LightningEnvironment()])
    settings: dict[str, Any] = {
        "max_epochs": 3,
        "val_check_interval": 0.5,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    strategy = "ddp" if ranks > 1 else "auto"
    return pl.Trainer(accelerator="cpu", devices=ranks, strategy=strategy, callbacks=callbacks, **(settings | options))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", required=True, help="where durable snapshots go")
    parser.add_argument("--out", required=True, help="folder for losses and weights")
    parser.add_argument("--die-at-step", type=int)
    options = parser.parse_args()
    Path(options.out).mkdir(parents=True, exist_ok=True)
    join_group("gloo")  # 1: a restart by torchrun finds its peers
    pl.seed_everything(0, verbose=False)
    first_life = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
    net = Net(options.out, options.die_at_step if first_life else None)
    trainer = make_trainer([ResilientCallback(options.url, Policy(durable_every=20))])  # 2
    trainer.fit(net, DataLoader(data(), batch_size=4, shuffle=True), DataLoader(data(), batch_size=8))
    if trainer.is_global_zero:
        torch.save(net.state_dict(), Path(options.out, "model.pt"))


if __name__ == "__main__":
    main()
