"""State that changes when it should not, and structure that changes when it may: right, or a clear failure."""

import gc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from resilient.errors import TornCapture
from tests.bad_days.conftest import Make
from tests.bad_days.training import Training, differing, undisturbed

LONG_S = 30.0


Change = Callable[[], object]


def by_data(training: Training) -> Change:
    parameters = list(training.model.parameters())
    return lambda: [parameter.data.mul_(1.5) for parameter in parameters]


def by_a_fused_optimizer_of_its_own(training: Training) -> Change:
    other = torch.optim.AdamW(training.model.parameters(), lr=0.0, fused=True)
    for parameter in training.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    other.step()  # makes its state, which takes longer than a capture, and changes nothing yet
    other.param_groups[0]["lr"] = 0.1
    return other.step


def by_a_sparse_write(training: Training) -> Change:
    flat = [parameter.detach().view(-1) for parameter in training.model.parameters()]
    return lambda: [values[13].add_(1.0) for values in flat]


def of_the_optimizer(training: Training) -> Change:
    averages = [held["exp_avg"] for held in training.optimizer.state.values()]
    return lambda: [average.data.add_(1.0) for average in averages]


@pytest.mark.parametrize("prepare", [by_data, by_a_fused_optimizer_of_its_own, by_a_sparse_write, of_the_optimizer])
def test_a_change_without_the_fence_fails_that_snapshot_by_name_or_comes_too_late_to_matter(
    prepare: Callable[[Training], Change], checkpointer: Make, tmp_path: Path
) -> None:
    training = Training(width=1024, layers=6)  # 75 MB
    saving = checkpointer(tmp_path / "url", training.state, durable_every=0)
    training.run(1, 1, saving)[-1].durable("memory").result(LONG_S)
    torn, step, whole = 0, 1, (1, training.tensors())
    while torn < 2 and step < 40:
        step += 1
        training.step()
        before = training.tensors()
        change = prepare(training)
        handle = saving.save(step)
        change()
        error = handle.captured.exception(LONG_S)
        if error is None:
            whole = (step, before)
            handle.durable("memory").result(LONG_S)
        else:
            assert isinstance(error, TornCapture), error
            assert error.tensors
            assert error.tensors[0].startswith(("model.", "optimizer.")), error.tensors
            torn += 1
        training.optimizer.zero_grad()
    assert torn >= 1, "no change met a capture: the test shows nothing"
    saving.close(keep_memory=True)
    again = Training(width=1024, layers=6, seed=4)
    assert checkpointer(tmp_path / "url", again.state, durable_every=0).restore() == whole[0]
    assert differing(again.tensors(), whole[1]) == []


class Replacing(torch.optim.SGD):
    """An optimizer that gives every tensor new memory at every step."""

    def step(self, closure: object = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    old = self.state[parameter].get("average", torch.zeros_like(parameter))
                    self.state[parameter]["average"] = old * 0.9 + parameter.grad
                    parameter.data = parameter.data - group["lr"] * self.state[parameter]["average"]


def replacing(seed: int = 0) -> Training:
    training = Training(width=256, seed=seed)
    training.optimizer = Replacing(training.model.parameters(), lr=0.1)
    return training


def test_an_optimizer_that_replaces_its_tensors_is_followed(checkpointer: Make, tmp_path: Path) -> None:
    expected = undisturbed(12, replacing)
    training = replacing()
    saving = checkpointer(tmp_path / "url", training.state, durable_every=0)
    handles = training.run(1, 8, saving)
    assert [handle.durable("memory").result(LONG_S) for handle in handles] == list(range(1, 9))
    saving.close(keep_memory=True)
    again = replacing(seed=3)
    loading = checkpointer(tmp_path / "url", again.state, durable_every=0)
    assert loading.restore() == 8
    again.run(9, 12, loading)
    assert differing(again.tensors(), expected) == []


def grow(training: Training) -> None:
    layer = nn.Linear(training.width, training.width)
    training.model.append(layer)
    training.optimizer.add_param_group({"params": list(layer.parameters()), "lr": 0.01})


def test_a_layer_and_a_group_that_appear_between_saves_are_saved_and_restored(
    checkpointer: Make, tmp_path: Path
) -> None:
    training = Training(width=64)
    saving = checkpointer(tmp_path / "url", training.state, durable_every=0)
    saving.save(0).durable("memory").result(LONG_S)  # no optimizer state yet
    training.run(1, 2, saving)
    saving.fence()
    grow(training)
    (*_, last) = training.run(3, 5, saving)
    assert last.durable("memory").result(LONG_S) == 5
    assert saving.statistics.plans == 3  # at first, with optimizer state, with the layer and its own
    saving.close(keep_memory=True)
    again = Training(width=64, seed=8)
    grow(again)
    assert checkpointer(tmp_path / "url", again.state, durable_every=0).restore() == 5
    assert differing(again.tensors(), training.tensors()) == []


@pytest.mark.parametrize("layers", [1, 4, 6, 8, 12])
def test_a_state_that_shrinks_or_grows_is_saved_at_once_and_keeps_to_its_new_budget(
    layers: int, checkpointer: Make, tmp_path: Path
) -> None:
    model = nn.ModuleList([nn.Linear(300, 300) for _ in range(8)])
    saving = checkpointer(tmp_path / "url", {"model": model}, durable_every=0, fence_timeout_s=5.0)
    for step in (1, 2, 3):
        saving.save(step).durable("memory").result(LONG_S)
    saving.fence()
    del model[layers:]
    model.extend([nn.Linear(300, 300) for _ in range(layers - len(model))])
    for step in (4, 5, 6):
        assert saving.save(step).durable("memory").result(LONG_S) == step
    image_bytes = saving._link.client().images()[-1].image_bytes
    assert saving._link.client().status()["bytes"] <= 2.1 * image_bytes + 2 * 65536
    saving.close(keep_memory=True)
    again = nn.ModuleList([nn.Linear(300, 300) for _ in range(layers)])
    assert checkpointer(tmp_path / "url", {"model": again}, durable_every=0).restore() == 6
    assert differing(dict(again.named_parameters()), dict(model.named_parameters())) == []


def test_buffers_of_an_earlier_structure_are_unmapped_without_waiting_for_the_garbage_collector(
    checkpointer: Make, tmp_path: Path
) -> None:
    model = nn.ModuleList([nn.Linear(300, 300) for _ in range(4)])
    saving = checkpointer(tmp_path / "url", {"model": model}, durable_every=0)
    gc.collect()
    gc.disable()
    try:
        for step in range(1, 13):
            saving.fence()
            if step % 2:
                model.extend([nn.Linear(300, 300) for _ in range(4)])
            else:
                del model[4:]
            assert saving.save(step).durable("memory").result(LONG_S) == step
        assert saving.statistics.plans == 12
        assert len(saving._link.client()._mappings) <= 3
    finally:
        gc.enable()
