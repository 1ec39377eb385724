"""Loops that are not the plain one, and ends that are not `close()`."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset
from torchdata.stateful_dataloader import StatefulDataLoader

import resilient
from resilient.checkpoint.protected import Protected
from resilient.policy import Policy
from tests.bad_days.conftest import Agents, Make, Trainers
from tests.bad_days.training import Training, differing, undisturbed

LONG_S = 30.0


def protect(training: "Training | Recipe", url: Path, **state: Any) -> Protected:
    return resilient.protect(training.model, training.optimizer, str(url), policy=Policy(durable_every=0), **state)


def test_protect_saves_after_every_step_by_itself_and_goes_on_where_it_was(agents: Agents, tmp_path: Path) -> None:
    training = Training()

    def interrupted() -> None:
        with protect(training, tmp_path / "url") as protected:
            assert protected.step == 0
            training.run(1, 5)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert agents.pids() != [], "the memory of a job that was interrupted is gone"
    again = Training(seed=2)
    with protect(again, tmp_path / "url") as protected:
        assert protected.step == 5
        assert differing(again.tensors(), undisturbed(5)) == []
        again.run(6, 8)
        assert protected.step == 8
        assert protected.checkpointer.statistics.saves == 3
    again.run(9, 9)  # afterwards the optimizer is left alone
    assert protected.step == 8


def test_a_step_that_the_scaler_skips_is_no_step_and_its_scale_is_restored(agents: Agents, tmp_path: Path) -> None:
    training, scaler = Training(), torch.amp.GradScaler("cpu", init_scale=1024.0)

    def step(training: Training, scaler: Any, factor: float) -> None:
        loss = training.model(torch.randn(2, training.width)).square().mean() * factor
        scaler.scale(loss).backward()
        scaler.step(training.optimizer)
        scaler.update()
        training.optimizer.zero_grad()

    def interrupted() -> None:
        with protect(training, tmp_path / "url", scaler=scaler) as protected:
            step(training, scaler, 1.0)
            step(training, scaler, float("inf"))
            assert protected.step == 1
            assert scaler.get_scale() == 512.0
            step(training, scaler, 1.0)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    expected = training.tensors()
    again, other = Training(seed=4), torch.amp.GradScaler("cpu", init_scale=8.0)
    with protect(again, tmp_path / "url", scaler=other) as protected:
        assert protected.step == 2
        assert other.get_scale() == 512.0
        assert differing(again.tensors(), expected) == []


Forward = Callable[[torch.Tensor], torch.Tensor]


class Numbers(Dataset[torch.Tensor]):
    def __len__(self) -> int:
        return 200

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.full((8,), index / 100)


class Recipe:
    """All that changes around a step: scaler, scheduler, average after it, a shuffled loader, dropout before it."""

    def __init__(self, seed: int, width: int = 8) -> None:
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(8, width), nn.Dropout(0.3), nn.Linear(width, width))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1)
        self.others: dict[str, Any] = {
            "scheduler": torch.optim.lr_scheduler.StepLR(self.optimizer, 2, 0.5),
            "scaler": torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=3),
            "loader": StatefulDataLoader(Numbers(), batch_size=4, shuffle=True),
            "average": torch.optim.swa_utils.AveragedModel(self.model),
            "progress": {"loss": 0.0},
        }

    def train(self, steps: int, forward: Forward | None = None, *, interrupted: bool = False) -> list[Any]:
        """What each step was trained on and with, and what it left. An interruption comes in the middle of the next."""
        batches, scaler, did = iter(self.others["loader"]), self.others["scaler"], []
        for _ in range(steps):
            batch = next(batches)
            self.optimizer.zero_grad()
            loss = (forward or self.model)(batch).square().mean()
            scaler.scale(loss).backward()
            self.others["progress"]["loss"] += loss.item()
            scaler.step(self.optimizer)
            scaler.update()
            self.others["scheduler"].step()
            self.others["average"].update_parameters(self.model)
            average = sum(parameter.double().sum().item() for parameter in self.others["average"].parameters())
            rate, tracker = self.optimizer.param_groups[0]["lr"], scaler._get_growth_tracker()
            did.append((batch[:, 0].tolist(), loss.item(), rate, scaler.get_scale(), tracker, average))
        if interrupted:
            (forward or self.model)(next(batches))
            raise KeyboardInterrupt
        return [*did, dict(self.others["progress"])]


def by_the_model(recipe: Recipe) -> None:
    return None


def past_the_model(recipe: Recipe) -> Forward:
    """Its parts are called, so nobody sees the step begin before the optimizer's."""
    first, drop, last = recipe.model
    return lambda batch: last(drop(first(batch)))


def by_the_compiled_model(recipe: Recipe) -> None:
    """The compiler sees what is hooked to the model."""
    recipe.model.compile(backend="eager")


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")  # torchdata calls it
@pytest.mark.parametrize("forward_of", [by_the_model, past_the_model, by_the_compiled_model])
@pytest.mark.parametrize("steps", [1, 5])
def test_a_protected_job_goes_on_bit_for_bit_with_what_changes_after_the_step(
    forward_of: Callable[[Recipe], Any], steps: int, agents: Agents, tmp_path: Path
) -> None:
    def protect_it(recipe: Recipe) -> Protected:
        policy = Policy(durable_every=0)
        return resilient.protect(recipe.model, recipe.optimizer, str(tmp_path / "url"), policy=policy, **recipe.others)

    expected = Recipe(1).train(8)

    def interrupted() -> None:
        recipe = Recipe(1)
        with protect_it(recipe):
            recipe.train(steps, forward_of(recipe), interrupted=True)

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    again = Recipe(2)
    with protect_it(again) as protected:
        assert protected.step == steps
        assert again.train(8 - steps, forward_of(again)) == expected[steps:]
        assert protected.checkpointer.statistics.saves == 8 - steps - 1, "the last step waits for the next to begin"


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")
def test_a_save_that_is_begun_by_the_optimizer_itself_is_over_before_anything_changes(
    agents: Agents, tmp_path: Path
) -> None:
    recipe = Recipe(1, width=1500)  # 27 MB
    with protect(recipe, tmp_path / "url", **recipe.others) as protected:
        recipe.train(6, past_the_model(recipe))
        assert protected.close() == []
        assert protected.checkpointer.statistics.failures == 0


@pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning")  # the compiler imports what torch deprecates
def test_a_compiled_step_of_the_optimizer_is_fenced_and_saved_as_any_other(agents: Agents, tmp_path: Path) -> None:
    def trained(training: Training) -> dict[str, torch.Tensor]:
        torch.compiler.reset()
        step = torch.compile(training.optimizer.step, backend="eager")
        for _ in range(5):
            training.model(torch.randn(2, training.width)).square().mean().backward()
            step()
            training.optimizer.zero_grad()
        return training.tensors()

    expected, training = trained(Training(width=600)), Training(width=600)
    with protect(training, tmp_path / "url") as protected:
        assert differing(trained(training), expected) == []
        assert protected.step == protected.checkpointer.statistics.saves == 5
        assert protected.close() == []
        assert protected.checkpointer.statistics.failures == 0


def test_a_capture_may_last_over_the_micro_steps_of_an_accumulation(checkpointer: Make, tmp_path: Path) -> None:
    training, calm = Training(width=256), Training(width=256)

    def step(training: Training) -> None:
        for _ in range(4):
            (training.model(torch.randn(2, training.width)).square().mean() / 4).backward()
        training.optimizer.step()
        training.optimizer.zero_grad()

    for _ in range(6):
        step(calm)
    expected = calm.tensors()
    torch.manual_seed(0)
    training = Training(width=256)
    saving = checkpointer(tmp_path / "url", training.state, durable_every=0)
    for number in range(1, 5):
        step(training)
        handle = saving.save(number)
    handle.durable("memory").result(LONG_S)
    saving.close(keep_memory=True)
    again = Training(width=256, seed=6)
    assert checkpointer(tmp_path / "url", again.state, durable_every=0).restore() == 4
    for _ in range(2):
        step(again)
    assert differing(again.tensors(), expected) == []


class TwoOptimizers(Training):
    """A network and its critic, each with an optimizer, stepped one after the other."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(width=256, seed=seed)
        self.critic = nn.Linear(256, 1)
        self.second = torch.optim.SGD(self.critic.parameters(), lr=0.1, momentum=0.9)

    @property
    def state(self) -> dict[str, object]:
        return {**super().state, "critic": self.critic, "second": self.second}

    def step(self, wrapped: nn.Module | None = None) -> None:
        super().step(wrapped)
        self.critic(torch.randn(2, 256)).square().mean().backward()
        self.second.step()
        self.second.zero_grad()

    def tensors(self) -> dict[str, torch.Tensor]:
        found = super().tensors()
        for name, tensor in self.critic.state_dict().items():
            found[f"critic.{name}"] = tensor.clone()
        for number, parameter in enumerate(self.critic.parameters()):
            held = self.second.state.get(parameter, {})
            found[f"second.{number}"] = held.get("momentum_buffer", torch.zeros(0)).clone()
        return found


class ByClosure(Training):
    """LBFGS evaluates its closure several times within one step."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(width=16, seed=seed)
        self.optimizer = torch.optim.LBFGS(self.model.parameters(), lr=0.1, max_iter=4, history_size=3)

    def step(self, wrapped: nn.Module | None = None) -> None:
        x = torch.randn(2, self.width)

        def closure() -> Any:
            self.optimizer.zero_grad()
            loss = self.model(x).square().mean()
            loss.backward()
            return loss

        self.optimizer.step(closure)


@pytest.mark.parametrize("make", [TwoOptimizers, ByClosure])
def test_other_kinds_of_optimizers_go_on_with_the_same_bits(
    make: Callable[..., Training], checkpointer: Make, tmp_path: Path
) -> None:
    training = make()
    saving = checkpointer(tmp_path / "url", training.state, durable_every=0)
    handles = training.run(1, 5, saving)
    assert [handle.durable("memory").result(LONG_S) for handle in handles] == [1, 2, 3, 4, 5]
    saving.close(keep_memory=True)
    again = make(seed=9)
    loading = checkpointer(tmp_path / "url", again.state, durable_every=0)
    assert loading.restore() == 5
    again.run(6, 8, loading)
    assert differing(again.tensors(), undisturbed(8, make)) == []


def test_close_ends_the_agent_and_removes_its_folder(
    checkpointer: Make, agents: Agents, tmp_path: Path, eventually: Callable[..., None]
) -> None:
    training = Training()
    saving = checkpointer(tmp_path / "url", training.state, durable_every=1)
    training.run(1, 3, saving)
    assert saving.close() == []
    assert saving.close() == []
    eventually(lambda: agents.pids() == [], "the agent has ended")
    assert [path for path in agents.runtime_dir.rglob("*") if path.is_file()] == []
    assert not (tmp_path / "url" / "claim.json").exists()
    with pytest.raises(resilient.ResilientError, match="closed"):
        saving.save(4)


def test_a_forked_process_that_ends_without_close_says_nothing_and_its_memory_is_there(
    trainers: Trainers, checkpointer: Make, tmp_path: Path
) -> None:
    child = trainers.start("leave_open", url=str(tmp_path / "url"))
    child.value()
    assert child.log == ""
    again = Training(width=512, layers=4, seed=5)
    step = checkpointer(tmp_path / "url", again.state, durable_every=0).restore()
    assert step in (2, 3)
    expected = Training(width=512, layers=4)
    expected.run(1, step)
    assert differing(again.tensors(), expected.tensors()) == []


def test_an_interpreter_that_ends_without_close_neither_hangs_nor_complains(agents: Agents, tmp_path: Path) -> None:
    checkout = str(Path(__file__).resolve().parents[2])
    program = "import sys; sys.path.append(sys.argv[1]); from tests.bad_days.jobs import *; leave_open(sys.argv[2])"
    command = [sys.executable, "-c", program, checkout, str(tmp_path / "url")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
