"""Modules with every kind of tensor and wrapper come back bit for bit, from memory and from disk."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import parametrizations

from resilient.checkpoint.dtypes import safetensors_dtype
from resilient.checkpoint.leaves import walk
from resilient.errors import StateError, TornCapture
from tests.checkpoint.jobs import Job, assert_restores, checkpointing, differences, facts, train

pytestmark = pytest.mark.usefixtures("runtime_dir")


def storable() -> list[torch.dtype]:
    found = []
    for dtype in {one for one in vars(torch).values() if isinstance(one, torch.dtype)}:
        try:
            safetensors_dtype(dtype)
        except StateError:
            continue
        found.append(dtype)
    return sorted(found, key=str)


def of_any_bits(dtype: torch.dtype, *shape: int) -> Tensor:
    """A tensor whose bytes are random, NaNs and all; a bool's are 0 or 1."""
    nbytes = torch.empty(shape, dtype=dtype).nbytes
    raw = torch.randint(0, 2 if dtype is torch.bool else 256, (nbytes,), dtype=torch.uint8)
    return raw.view(dtype).view(shape)


def holding(**buffers: Tensor) -> nn.Module:
    module = nn.Module()
    for name, tensor in buffers.items():
        module.register_buffer(name, tensor)
    return module


def frozen(make_module: Any) -> Job:
    return Job({"model": make_module()}, lambda: None)


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
def test_every_dtype_comes_back(tmp_path: Path) -> None:
    def make() -> nn.Module:
        module = nn.Module()
        for dtype in storable():
            name = str(dtype).replace("torch.", "of_")
            module.register_buffer(name, of_any_bits(dtype, 7, 3))
            module.register_buffer(f"{name}_scalar", of_any_bits(dtype))
            module.register_parameter(f"{name}_frozen", nn.Parameter(of_any_bits(dtype, 5), requires_grad=False))
        return module

    assert len(storable()) >= 22
    assert_restores(lambda: frozen(make), tmp_path, steps=1, more=0)


def layouts() -> dict[str, Tensor]:
    base = torch.randn(6, 8)
    return {
        "scalar": torch.randn(()),
        "empty": torch.empty(0, 3),
        "empty_inside": torch.empty(4, 0, 2),
        "turned": torch.randn(5, 7).t(),
        "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "every_other": base[:, ::2],
        "expanded": torch.randn(3, 1).expand(3, 5),
        "windows": torch.randn(10).as_strided((4, 4), (2, 1)),
        "offset": torch.randn(100)[37:63],
        "odd": torch.randn(9)[1:].to(torch.float16)[1:],
        "wide_turned": of_any_bits(torch.complex128, 3, 4).t(),
        "low_turned": of_any_bits(torch.float8_e4m3fn, 3, 4).t(),
    }


def test_every_layout_comes_back(tmp_path: Path) -> None:
    def make() -> nn.Module:
        module = holding(**layouts())
        for name, tensor in layouts().items():
            if name not in ("expanded", "windows"):
                module.register_parameter(f"p_{name}", nn.Parameter(tensor, requires_grad=False))
        return module

    torch.manual_seed(1)
    saved = make()
    with checkpointing(tmp_path, Job({"model": saved}, lambda: None)) as checkpointer:
        checkpointer.save(1).durable("durable").result(30)
    torch.manual_seed(2)
    fresh = make()
    with checkpointing(tmp_path, Job({"model": fresh}, lambda: None)) as checkpointer:
        checkpointer.restore()
    after = [*fresh.named_buffers(), *fresh.named_parameters()]
    for name, tensor in [*saved.named_buffers(), *saved.named_parameters()]:
        if name in ("expanded", "windows"):  # elements that shared memory have got their own: they may have any values
            assert torch.equal(dict(after)[name], tensor)
        else:
            assert differences(tensor, dict(after)[name], name) == []


def test_an_expanded_buffer_takes_values_that_are_not_all_the_same(tmp_path: Path) -> None:
    saved, fresh = holding(mask=torch.randn(3, 5)), holding(mask=torch.zeros(1).expand(3, 5))
    with checkpointing(tmp_path, Job({"model": saved}, lambda: None)) as checkpointer:
        checkpointer.save(1).durable("durable").result(30)
    with checkpointing(tmp_path, Job({"model": fresh}, lambda: None)) as checkpointer:
        checkpointer.restore()
    assert torch.equal(saved.get_buffer("mask"), fresh.get_buffer("mask"))


def test_optimizer_state_has_the_strides_it_had(tmp_path: Path) -> None:
    def make() -> Job:
        model: Any = nn.Conv2d(3, 8, 3)
        model.to(memory_format=torch.channels_last)
        model.turned = nn.Parameter(torch.randn(6, 5).t())
        optimizer = torch.optim.AdamW(model.parameters())

        def step() -> None:
            optimizer.zero_grad()
            (model(torch.randn(2, 3, 8, 8)).square().mean() + model.turned.square().sum()).backward()
            optimizer.step()

        return Job({"model": model, "optimizer": optimizer}, step)

    assert_restores(make, tmp_path)


class Statistics(nn.Module):
    """Buffers that change in forward, one of them no part of its state dict, and extra state."""

    cache: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.3))
        self.register_buffer("cache", torch.randn(4), persistent=False)
        self.register_buffer("nothing", None)
        self.register_parameter("no_bias", None)
        self.seen = int(torch.randint(100, ()))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x) + self.cache
        self.cache = 0.9 * self.cache + 0.1 * y.detach().mean(0)  # another tensor every time
        self.seen += 1
        return y

    def get_extra_state(self) -> Any:
        return {"seen": self.seen, "last": torch.full((2,), float(self.seen))}

    def set_extra_state(self, state: Any) -> None:
        self.seen = state["seen"]


def trained(model: nn.Module, width: int = 4) -> Job:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)

    def step() -> None:
        optimizer.zero_grad()
        model(torch.randn(8, width)).square().mean().backward()
        optimizer.step()

    return Job({"model": model, "optimizer": optimizer}, step)


def test_buffers_persistent_or_not_extra_state_and_dropout_go_on(tmp_path: Path) -> None:
    assert_restores(lambda: trained(Statistics()), tmp_path)


def test_frozen_parameters_come_back_too(tmp_path: Path) -> None:
    def make() -> Job:
        model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4))
        model[0].requires_grad_(False)
        return trained(model)

    assert_restores(make, tmp_path)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 4)
        self.again = self.embed
        self.head = nn.Linear(4, 4)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.again(self.embed(x)))
        return y


def test_tied_weights_are_saved_once_and_stay_tied(tmp_path: Path) -> None:
    found = walk({"model": Tied()})
    assert [leaf.key for leaf in found.leaves] == ["model.embed.weight", "model.embed.bias", "model.head.bias"]
    assert found.aliases == {
        "model.again.weight": "model.embed.weight",
        "model.again.bias": "model.embed.bias",
        "model.head.weight": "model.embed.weight",
    }
    assert_restores(lambda: trained(Tied()), tmp_path)


def wrapped_in_all() -> nn.Module:
    model = Statistics()
    model.inner[0] = checkpoint_wrapper(nn.Sequential(checkpoint_wrapper(nn.Linear(4, 4))))
    compiled: Any = torch.compile(model, backend="eager")
    both: Any = torch.compile(nn.DataParallel(compiled), backend="eager")
    return both  # type: ignore[no-any-return]


def test_wrappers_leave_no_trace_in_names() -> None:
    plain = Statistics()
    plain.inner[0] = nn.Sequential(nn.Linear(4, 4))
    assert [one.key for one in walk({"m": wrapped_in_all()}).leaves] == [one.key for one in walk({"m": plain}).leaves]


def test_a_snapshot_of_a_wrapped_model_goes_into_a_plain_one(tmp_path: Path) -> None:
    wrapped = wrapped_in_all()
    plain: Any = Statistics()
    plain.inner[0] = nn.Sequential(nn.Linear(4, 4))
    with checkpointing(tmp_path, Job({"model": wrapped}, lambda: None)) as checkpointer:
        checkpointer.save(1).durable("durable").result(30)
    plain.seen = -1
    with checkpointing(tmp_path, Job({"model": plain}, lambda: None)) as checkpointer:
        checkpointer.restore()
    inner: Any = wrapped.get_submodule("_orig_mod.module._orig_mod")
    assert plain.seen == inner.seen
    assert torch.equal(plain.inner[0][0].weight, inner.inner[0][0]._checkpoint_wrapped_module.weight)
    assert torch.equal(plain.cache, inner.cache)


def test_parametrized_and_compiled_models_train_on(tmp_path: Path) -> None:
    def make() -> Job:
        layers = parametrizations.spectral_norm(nn.Linear(4, 4)), parametrizations.weight_norm(nn.Linear(4, 4))
        return trained(torch.compile(nn.Sequential(*layers), backend="eager"))  # type: ignore[arg-type]

    assert_restores(make, tmp_path)


class Large(nn.Module):
    """A buffer above 1 MiB that changes in forward, where small ones are copied at once."""

    large: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("large", torch.randn(1 << 19))

    def forward(self, x: Tensor) -> Tensor:
        self.large.mul_(0.5)
        y: Tensor = self.linear(x)
        return y


def test_a_large_buffer_that_changes_in_forward_fails_one_snapshot_by_name_and_is_copied_early_from_then_on(
    tmp_path: Path,
) -> None:
    job = trained(Large())
    model = job.state["model"]
    failed = []
    with checkpointing(tmp_path, job) as checkpointer:
        capture: Any = checkpointer
        for step in range(1, 30):
            handle = checkpointer.save(step)
            model.large.mul_(0.5)  # at once, as forward does
            checkpointer.fence()
            failed.append(handle.captured.exception(30))
            saved = model.large.clone() * 2
            if failed[-1] is None and step > 1 and capture._early:
                break
        torn = [error for error in failed if error is not None]
        assert len(torn) == 1
        assert isinstance(torn[0], TornCapture)
        assert torn[0].tensors == ("model.large",)
        handle.durable("durable").result(30)
        checkpointer.close(keep_memory=False)
    fresh = trained(Large())
    with checkpointing(tmp_path, fresh) as checkpointer:
        assert checkpointer.restore() == step
    assert torch.equal(fresh.state["model"].large, saved)


def test_a_tensor_and_a_dictionary_of_tensors_are_states_by_themselves(tmp_path: Path) -> None:
    def make() -> Job:
        average, table = torch.randn(3, 2), {"count": 0, "moments": [torch.randn(2), {"deep": torch.randn(())}]}

        def step() -> None:
            average.add_(torch.randn(3, 2))
            table["count"] += 1  # type: ignore[operator]
            table["moments"][0].mul_(2)  # type: ignore[index]

        return Job({"average": average, "table": table}, step)

    assert_restores(make, tmp_path)


def test_a_model_trained_for_long_is_saved_as_it_is_at_each_save(tmp_path: Path) -> None:
    job = trained(Statistics())
    with checkpointing(tmp_path, job) as checkpointer:
        for step in range(1, 6):
            train(job, 1)
            checkpointer.save(step).durable("durable").result(30)
            saved = facts({"model": job.state["model"]})
        train(job, 1)
        assert checkpointer.restore() == 5
        assert differences(saved["model"], facts({"model": job.state["model"]})["model"]) == []
        assert checkpointer.statistics.plans <= 5
