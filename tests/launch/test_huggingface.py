"""The callback for the Hugging Face Trainer, with the real one on a tiny model. What kills processes is elsewhere."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from examples.train_huggingface import make_trainer
from resilient.checkpoint.checkpointer import Checkpointer
from resilient.errors import Preempted, UrlInUse, UsageError
from resilient.launch.huggingface import ResilientCallback
from resilient.policy import Policy

pytestmark = [
    pytest.mark.usefixtures("runtime_dir", "one_thread"),
    pytest.mark.filterwarnings("ignore"),  # what the frameworks warn of is theirs
]


class Broken(Exception):
    pass


class Fault(TrainerCallback):
    """In the middle of the step after `step`: raises Broken, or asks for a stop."""

    def __init__(self, step: int, ask: ResilientCallback | None = None) -> None:
        self.step, self.ask = step, ask

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if state.global_step != self.step:
            return
        if self.ask is None:
            raise Broken
        assert self.ask.checkpointer is not None
        self.ask.checkpointer.request_stop()


def policy_of(**keys: Any) -> Policy:
    return Policy(**({"durable_every": 0, "agent_idle_s": 60.0} | keys))


def callback_of(folder: Path, **policy: Any) -> ResilientCallback:
    return ResilientCallback(str(folder / "run"), policy_of(**policy))


def start(
    folder: Path, *, break_at: int | None = None, policy: dict[str, Any] | None = None, **options: Any
) -> Trainer:
    """What one process does of the run."""
    callback = callback_of(folder, **(policy or {}))
    trainer = make_trainer(str(folder), callback, **options)
    if break_at is not None:
        trainer.add_callback(Fault(break_at))
    callback.train(trainer)
    return trainer


def history(trainer: Trainer) -> list[dict[str, float]]:
    """All that was logged of losses, gradients, schedule and evaluations, without what depends on the clock."""
    kept = ("step", "epoch", "loss", "grad_norm", "learning_rate", "eval_loss")
    rows = [{name: row[name] for name in kept if name in row} for row in trainer.state.log_history]
    return [row for row in rows if len(row) > 2]


def model_of(trainer: Trainer) -> Any:
    return trainer.model


def assert_same(one: Trainer, other: Trainer) -> None:
    assert history(one) == history(other)
    ours, theirs = model_of(one).state_dict(), model_of(other).state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("break_at", [5, 12, 13], ids=["in an epoch", "as an epoch begins", "after its first step"])
def test_a_run_that_fails_goes_on_with_the_same_losses_schedule_and_evaluations(tmp_path: Path, break_at: int) -> None:
    options: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 4, "max_steps": 16}
    calm = start(tmp_path / "calm", **options)
    with pytest.raises(Broken):
        start(tmp_path / "run", break_at=break_at, **options)
    again = start(tmp_path / "run", **options)
    assert len(history(again)) == 16 + 4
    assert_same(calm, again)


def test_trainer_starts_again_from_an_older_step_where_the_newest_snapshot_is_damaged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    policy: dict[str, Any] = {"durable_every": 1, "keep_last": 3}
    calm = start(tmp_path / "calm", max_steps=8)
    with pytest.raises(Broken):
        start(tmp_path / "run", break_at=6, max_steps=8, policy=policy)
    Checkpointer(str(tmp_path / "run" / "run"), {"nothing": {}}, policy_of(**policy)).close()  # the memory goes
    image = tmp_path / "run" / "run" / "step_00000006" / "rank_00000-of-00001.safetensors"
    with image.open("r+b") as file:
        file.seek(image.stat().st_size // 2)
        file.write(b"damaged!")
    again = start(tmp_path / "run", max_steps=8, policy=policy)
    assert "Trainer starts again, from step 5" in caplog.text
    assert_same(calm, again)


def test_a_request_to_stop_ends_the_program_with_the_step_safe_on_the_durable_level(tmp_path: Path) -> None:
    steps = 600  # more than are done while the ranks agree
    callback = callback_of(tmp_path)
    trainer = make_trainer(str(tmp_path), callback, max_steps=steps)
    trainer.add_callback(Fault(3, ask=callback))
    with pytest.raises(Preempted) as stopped:
        callback.train(trainer)
    step = stopped.value.step
    assert stopped.value.code == Preempted.SAFE
    assert 3 < step < steps
    assert (tmp_path / "run" / f"step_{step:08d}" / "rank_00000-of-00001.json").exists()
    with pytest.raises(Broken):
        start(tmp_path, max_steps=steps, break_at=step)  # which is where it goes on


def test_callbacks_that_remember_go_on_remembering(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "eval_strategy": "steps",
        "eval_steps": 1,
        "metric_for_best_model": "loss",
        "greater_is_better": True,
    }

    def evaluations_without_a_better_one(folder: Path, break_at: int | None = None) -> int:
        callback, patience = callback_of(folder), EarlyStoppingCallback(early_stopping_patience=50)
        trainer = make_trainer(str(folder), callback, max_steps=8, **options)
        trainer.add_callback(patience)
        if break_at is not None:
            trainer.add_callback(Fault(break_at))
        callback.train(trainer)
        return patience.early_stopping_patience_counter

    with pytest.raises(Broken):
        evaluations_without_a_better_one(tmp_path / "run", break_at=6)
    seen = evaluations_without_a_better_one(tmp_path / "run")
    assert seen == evaluations_without_a_better_one(tmp_path / "calm") > 2


def test_the_last_step_is_kept_with_its_own_weights_though_the_best_are_loaded_at_the_end(tmp_path: Path) -> None:
    policy: dict[str, Any] = {"durable_every": 6}
    options: dict[str, Any] = {
        "eval_strategy": "steps",
        "eval_steps": 2,
        "load_best_model_at_end": True,
        "max_steps": 6,
        "save_strategy": "steps",
    }
    callback = callback_of(tmp_path, **policy)
    trainer = make_trainer(str(tmp_path), callback, save_steps=2, learning_rate=10.0, **options)
    seen: list[torch.Tensor] = []

    class Look(TrainerCallback):
        def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
            seen.append(model_of(trainer).transformer.wte.weight.detach().clone())

    trainer.add_callback(Look())
    callback.train(trainer)
    assert not torch.equal(model_of(trainer).transformer.wte.weight, seen[-1]), (
        "the best model is another than the last"
    )
    with Checkpointer(str(tmp_path / "run"), {"model": model_of(trainer)}, policy_of(**policy)) as checkpointer:
        assert checkpointer.restore() == 6
    assert torch.equal(model_of(trainer).transformer.wte.weight, seen[-1])


def test_a_run_that_is_finished_is_left_as_it_is_when_it_is_started_again(tmp_path: Path) -> None:
    policy: dict[str, Any] = {"durable_every": 100}
    done = start(tmp_path, max_steps=5, policy=policy)  # in the middle of an epoch
    again = start(tmp_path, max_steps=5, policy=policy)
    assert again.state.global_step == 5
    assert all(
        torch.equal(a, b) for a, b in zip(model_of(done).parameters(), model_of(again).parameters(), strict=True)
    )


def test_a_url_that_another_job_writes_to_is_refused(tmp_path: Path) -> None:
    with Checkpointer(str(tmp_path / "run"), {"nothing": {}}, policy_of(run_id="other")), pytest.raises(UrlInUse):
        start(tmp_path, policy={"run_id": "mine"})


def test_trainer_is_not_started_without_the_callback_nor_with_two_or_another_ones(tmp_path: Path) -> None:
    callback = callback_of(tmp_path)
    trainer = make_trainer(str(tmp_path), callback)
    with pytest.raises(UsageError, match=r"start with ResilientCallback.train\(trainer\)"):
        trainer.train()
    with pytest.raises(UsageError, match="not among its callbacks"):
        callback_of(tmp_path).train(trainer)
    trainer.add_callback(callback_of(tmp_path))
    with pytest.raises(UsageError, match="with another, or twice"):
        callback.train(trainer)
    one = callback_of(tmp_path)
    trainer = make_trainer(str(tmp_path), one)
    with pytest.raises(UsageError, match="by itself where to resume"):
        one.train(trainer, resume_from_checkpoint="somewhere")


def test_a_callback_is_not_made_without_a_url() -> None:
    with pytest.raises(UsageError, match="give the url"):
        ResilientCallback("")


@pytest.mark.parametrize(
    ("module", "missing", "extra"),
    [("huggingface", "transformers", "huggingface"), ("lightning", "lightning.pytorch", "lightning")],
)
def test_a_door_whose_framework_is_missing_says_what_to_install(module: str, missing: str, extra: str) -> None:
    program = f"import sys; sys.modules[{missing!r}] = None; import resilient.launch.{module}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert f"pip install 'torch-resilient[{extra}]'" in done.stderr
