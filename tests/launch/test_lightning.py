"""The callback and the CheckpointIO for Lightning, with a real Trainer. What kills processes is elsewhere."""

import os
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from examples.train_lightning import Net, data, make_trainer
from resilient.errors import DamagedImage, Preempted, StateError, UsageError
from resilient.launch.lightning import ResilientCallback, ResilientCheckpointIO
from resilient.policy import Policy

pytestmark = [
    pytest.mark.usefixtures("runtime_dir", "one_thread"),
    pytest.mark.filterwarnings("ignore"),  # what the frameworks warn of is theirs
]
LOADERS: dict[str, Any] = {"plain": DataLoader, "stateful": StatefulDataLoader}


class Broken(Exception):
    pass


class Fault(pl.Callback):
    """In the middle of the step after `step`: raises Broken, or asks for a stop."""

    def __init__(self, step: int, ask: ResilientCallback | None = None) -> None:
        self.step, self.ask = step, ask

    def on_before_optimizer_step(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step != self.step:
            return
        if self.ask is None:
            raise Broken
        assert self.ask.checkpointer is not None
        self.ask.checkpointer.request_stop()


class Recorded(Net):
    """Keeps the losses of its run with the state, as a user's module may keep anything."""

    def __init__(self, out: str) -> None:
        super().__init__(out)
        self.losses: list[float] = []

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        loss = super().training_step(batch, index)
        self.losses.append(loss.item())
        return loss

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["losses"] = list(self.losses)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.losses = list(checkpoint["losses"])


def callback_of(folder: Path, **policy: Any) -> ResilientCallback:
    return ResilientCallback(str(folder / "run"), Policy(**{"durable_every": 0, "agent_idle_s": 60.0} | policy))


def start(
    folder: Path,
    loader: Any = DataLoader,
    *others: pl.Callback,
    callback: ResilientCallback | None = None,
    **options: Any,
) -> Recorded:
    """What one process does of the run."""
    folder.mkdir(exist_ok=True)
    pl.seed_everything(0, verbose=False)
    net = Recorded(str(folder))
    trainer = make_trainer([callback or callback_of(folder), *others], **options)
    trainer.fit(net, loader(data(), batch_size=4, shuffle=True), DataLoader(data(), batch_size=8))
    return net


def assert_same(one: Recorded, other: Recorded) -> None:
    assert one.losses == other.losses
    ours, theirs = one.state_dict(), other.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_run_that_fails_goes_on_with_the_same_losses_wherever_it_was(
    tmp_path: Path, kind: str, accumulate: int
) -> None:
    options: dict[str, Any] = {"accumulate_grad_batches": accumulate}
    loader = LOADERS[kind]
    calm = start(tmp_path / "calm", loader, **options)
    # In an epoch, in its validation, as the second begins, after its first step, in the last.
    for break_at in (3, 5, 10, 11, 25) if accumulate == 1 else (2, 4, 9):
        with pytest.raises(Broken):
            start(tmp_path / "run", loader, Fault(break_at), **options)
    again = start(tmp_path / "run", loader, **options)
    assert len(again.losses) == 30
    assert_same(calm, again)


def test_a_request_to_stop_ends_the_program_with_the_step_safe_on_the_durable_level(tmp_path: Path) -> None:
    callback = callback_of(tmp_path)
    with pytest.raises(Preempted) as stopped:
        start(tmp_path, DataLoader, Fault(3, ask=callback), callback=callback, max_epochs=100)
    step = stopped.value.step
    assert (stopped.value.code, 3 < step < 1000) == (Preempted.SAFE, True)
    assert (tmp_path / "run" / f"step_{step:08d}" / "rank_00000-of-00001.json").exists()
    with pytest.raises(Broken):
        start(tmp_path, DataLoader, Fault(step), max_epochs=100)  # which is where it goes on


def test_callbacks_that_remember_go_on_remembering(tmp_path: Path) -> None:
    def evaluations_without_a_better_one(folder: Path, *others: pl.Callback) -> int:
        patience = EarlyStopping("loss", patience=50, mode="max")  # the loss becomes less and less
        start(folder, DataLoader, patience, *others)
        return patience.wait_count

    with pytest.raises(Broken):
        evaluations_without_a_better_one(tmp_path / "run", Fault(27))
    seen = evaluations_without_a_better_one(tmp_path / "run")
    assert seen == evaluations_without_a_better_one(tmp_path / "calm") > 2


def test_a_callback_serves_one_trainer_once_and_wants_a_url(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="give the url"):
        ResilientCallback("")
    with pytest.raises(UsageError, match="give each Trainer one"):
        start(tmp_path, DataLoader, callback_of(tmp_path))


def test_a_checkpoint_of_lightning_is_not_loaded_over_a_run_that_goes_on(tmp_path: Path) -> None:
    with pytest.raises(Broken):
        start(tmp_path, DataLoader, Fault(4))
    pl.seed_everything(0, verbose=False)
    net = Recorded(str(tmp_path))
    trainer = make_trainer([callback_of(tmp_path)], plugins=[LightningEnvironment(), ResilientCheckpointIO()])
    ResilientCheckpointIO().save_checkpoint(checkpoint_of(net), tmp_path / "other.ckpt")
    with pytest.raises(UsageError, match="leave out ckpt_path"):
        trainer.fit(net, DataLoader(data()), ckpt_path=str(tmp_path / "other.ckpt"))


# ---- CheckpointIO


def checkpoint_of(net: Net, **more: Any) -> dict[str, Any]:
    """As Lightning makes one."""
    trainer = pl.Trainer(accelerator="cpu", plugins=[LightningEnvironment()], logger=False, enable_checkpointing=False)
    trainer.strategy.connect(net)
    trainer.strategy._lightning_module = net
    return {**trainer._checkpoint_connector.dump_checkpoint(weights_only=True), **more}


def fit(folder: Path, io: Any, epochs: int, ckpt_path: Path | None = None) -> tuple[Net, pl.Trainer]:
    pl.seed_everything(0, verbose=False)
    net = Net(str(folder))
    keep = ModelCheckpoint(dirpath=folder / "kept", save_last=True, save_top_k=1, monitor="loss")
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[keep],
        plugins=[LightningEnvironment(), io],
    )
    loaders = DataLoader(data(), batch_size=4), DataLoader(data(), batch_size=8)
    trainer.fit(net, *loaders, ckpt_path=None if ckpt_path is None else str(ckpt_path))
    return net, trainer


@pytest.mark.parametrize("io", [ResilientCheckpointIO, lambda: AsyncCheckpointIO(ResilientCheckpointIO())])
def test_model_checkpoints_are_folders_of_ours_from_which_lightning_goes_on(tmp_path: Path, io: Any) -> None:
    net, _ = fit(tmp_path, io(), 2)
    last = tmp_path / "kept" / "last.ckpt"
    kept = sorted(path.name for path in (tmp_path / "kept").iterdir())
    assert len(kept) == 2, "the best and the last; others were removed"
    assert not [path for path in last.rglob("*") if path.suffix in (".pt", ".ckpt")]
    loaded = ResilientCheckpointIO().load_checkpoint(last)
    assert all(torch.equal(loaded["state_dict"][name], value) for name, value in net.state_dict().items())
    assert loaded["optimizer_states"][0]["state"][0]["exp_avg"].abs().sum() > 0
    _, trainer = fit(tmp_path, io(), 3, last)
    assert (trainer.global_step, trainer.current_epoch) == (30, 3)


def test_a_checkpoint_that_torch_wrote_is_loaded_and_removed_as_ever(tmp_path: Path) -> None:
    path = tmp_path / "old.ckpt"
    torch.save({"state_dict": {"weight": torch.ones(2)}, "global_step": 3}, path)
    io = ResilientCheckpointIO()
    assert io.load_checkpoint(path)["global_step"] == 3
    io.remove_checkpoint(path)
    assert not path.exists()


def test_the_newer_checkpoint_takes_the_place_of_the_older_and_removing_leaves_nothing(tmp_path: Path) -> None:
    io, path = ResilientCheckpointIO(), tmp_path / "last.ckpt"
    for step in (1, 2, 2):
        io.save_checkpoint({"state_dict": {"w": torch.full((3,), float(step))}, "global_step": step}, path)
    assert os.listdir(path) == ["step_00000002"]
    assert io.load_checkpoint(path)["state_dict"]["w"].tolist() == [2.0, 2.0, 2.0]
    io.remove_checkpoint(path)
    assert not path.exists()


def test_damage_and_what_cannot_be_saved_are_refused_by_name(tmp_path: Path) -> None:
    io, path = ResilientCheckpointIO(), tmp_path / "one.ckpt"
    with pytest.raises(StateError, match="hyper_parameters"):
        io.save_checkpoint({"state_dict": {}, "global_step": 0, "hyper_parameters": {"f": lambda: 0}}, path)
    io.save_checkpoint({"state_dict": {"layer.weight": torch.randn(64, 64)}, "global_step": 1}, path)
    image = next(path.rglob("*.safetensors"))
    with image.open("r+b") as file:
        file.seek(image.stat().st_size // 2)
        file.write(b"damaged!")
    with pytest.raises(DamagedImage, match=r"layer\.weight"):
        io.load_checkpoint(path)
