"""What may stand in a state, with the real classes of torch and torchdata, each through the codec and back."""

import collections
import gc
import math
import types
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import SGD, lr_scheduler

from resilient.checkpoint.objects import decode, encode
from resilient.checkpoint.stateful import Kind, ObjectState, check_state, classify
from resilient.errors import LayoutMismatch, StateError


def saved(item: ObjectState) -> object:
    """What a restore gets: through the codec, with tensors of its own."""
    encoded = encode(item.capture(), item.name)
    return decode(encoded.text, {path: tensor.detach().clone() for path, tensor in encoded.tensors.items()}, item.name)


# ------------------------------------------------------------------------------------------------ what it is


class Custom:
    def __init__(self) -> None:
        self.count = 0

    def state_dict(self) -> dict[str, int]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.count = state["count"]


class OnlySaves:
    def state_dict(self) -> dict[str, int]:
        return {}


def make_scheduler() -> lr_scheduler.StepLR:
    return lr_scheduler.StepLR(SGD([nn.Parameter(torch.zeros(1))], lr=0.1), 2)


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (nn.Linear(1, 1), Kind.MODULE),
        (nn.ModuleDict({}), Kind.MODULE),
        (nn.DataParallel(nn.Linear(1, 1)), Kind.MODULE),
        (SGD([nn.Parameter(torch.zeros(1))], lr=0.1), Kind.OPTIMIZER),
        (torch.zeros(1), Kind.TENSOR),
        (nn.Parameter(torch.zeros(1)), Kind.TENSOR),
        (torch.Generator(), Kind.GENERATOR),
        (make_scheduler(), Kind.OBJECT),
        (torch.amp.GradScaler("cpu"), Kind.OBJECT),
        (Custom(), Kind.OBJECT),
        ({"epoch": 1}, Kind.MAPPING),
        (collections.defaultdict(lambda: 1), Kind.MAPPING),
        (collections.UserDict({"a": 1}), Kind.MAPPING),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_may_stand_in_a_state_is_recognised(value: object, kind: Kind) -> None:
    assert classify("it", value) is kind


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "a NoneType; .*put it in a dictionary"),
        (3, r"an? int; .*state=\{'it': \{'value': ...\}\}"),
        ([1, 2], "a list; .*put it in a dictionary"),
        (Custom, "the class .*Custom; give an instance"),
        (OnlySaves(), r"OnlySaves; it has state_dict\(\) but no load_state_dict\(\): add it"),
        (lambda: 1, "the function .*lambda.*; give its class"),
        (object(), "a object; give its class"),
        (np.random.default_rng(0), "Generator; .*bit_generator.state"),
        (types.MappingProxyType({}), "mappingproxy; give its class"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_everything_else_is_refused_with_its_name_and_what_to_do(value: object, message: str) -> None:
    with pytest.raises(StateError, match=rf"state\['it'\] cannot be saved: it is .*{message}"):
        classify("it", value)


def test_the_state_itself_is_checked() -> None:
    with pytest.raises(StateError, match="must map names"):
        check_state([nn.Linear(1, 1)])  # type: ignore[arg-type]
    with pytest.raises(StateError, match="non-empty strings, not 3"):
        check_state({3: nn.Linear(1, 1)})  # type: ignore[dict-item]
    for name in ("$type", "a\nb", "\ud83d\ude00"):
        with pytest.raises(StateError, match="printable"):
            check_state({name: nn.Linear(1, 1)})
    with pytest.raises(StateError, match="non-empty"):
        check_state({"": nn.Linear(1, 1)})


def test_only_the_objects_of_a_state_are_wrapped() -> None:
    model = nn.Linear(1, 1)
    state = {"model": model, "optim": SGD(model.parameters(), lr=0.1), "t": torch.zeros(1), "c": Custom(), "m": {}}
    assert {name: item.kind for name, item in check_state(state).items()} == {"c": Kind.OBJECT, "m": Kind.MAPPING}
    with pytest.raises(StateError, match="piece by piece"):
        ObjectState("model", model)


def test_what_an_object_holds_is_checked_when_it_is_wrapped() -> None:
    class Holds(Custom):
        def state_dict(self) -> dict[str, Any]:
            return {"hooks": [print]}

    with pytest.raises(StateError, match="'mine/hooks/0' cannot be saved: .*print"):
        check_state({"mine": Holds()})
    with pytest.raises(StateError, match="'progress/log/f' cannot be saved: .*lambda"):
        check_state({"progress": {"log": {"f": lambda: 1}}})


# ------------------------------------------------------------------------------------------------ modules


@pytest.fixture
def one_process_group() -> Iterator[None]:
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_wrappers_are_taken_off_in_any_order(one_process_group: None) -> None:
    model = nn.Linear(2, 2)
    compiled: Any = torch.compile(model, backend="eager")
    parallel = nn.parallel.DistributedDataParallel(model)
    for wrapped in (
        model,
        compiled,
        parallel,
        torch.compile(parallel, backend="eager"),
        nn.parallel.DistributedDataParallel(compiled),
        nn.DataParallel(model),
    ):
        assert isinstance(wrapped, nn.Module)
        assert classify("model", wrapped) is Kind.MODULE


@pytest.mark.filterwarnings("ignore")
def test_fsdp2_is_taken_and_fsdp1_refused_by_name(one_process_group: None) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    sharded = nn.Linear(2, 2)
    fully_shard(sharded, mesh=init_device_mesh("cpu", (1,)))
    assert classify("model", sharded) is Kind.MODULE
    old = FullyShardedDataParallel(nn.Linear(2, 2), device_id=torch.device("cpu"))
    with pytest.raises(StateError, match=r"state\['model'\] cannot be saved: .*FSDP1.*fully_shard"):
        classify("model", old)
    with pytest.raises(StateError, match=r"'1' in state\['model'\] cannot be saved: .*FSDP1"):
        classify("model", nn.Sequential(nn.Linear(1, 1), old))


# ------------------------------------------------------------------------------------------------ torch's objects


class Warmup:
    def __init__(self, steps: int) -> None:
        self.steps = steps

    def __call__(self, step: int) -> float:
        return min(1.0, (step + 1) / self.steps)


SCHEDULERS: dict[str, Callable[[SGD], Any]] = {
    "StepLR": lambda optim: lr_scheduler.StepLR(optim, 3),
    "MultiStepLR": lambda optim: lr_scheduler.MultiStepLR(optim, [2, 5, 5]),
    "CosineAnnealingLR": lambda optim: lr_scheduler.CosineAnnealingLR(optim, 9),
    "CosineAnnealingWarmRestarts": lambda optim: lr_scheduler.CosineAnnealingWarmRestarts(optim, 3),
    "OneCycleLR": lambda optim: lr_scheduler.OneCycleLR(optim, max_lr=0.1, total_steps=20),
    "CyclicLR": lambda optim: lr_scheduler.CyclicLR(optim, 0.01, 0.1, step_size_up=3),
    "LambdaLR, function": lambda optim: lr_scheduler.LambdaLR(optim, lambda step: 0.9**step),
    "LambdaLR, object": lambda optim: lr_scheduler.LambdaLR(optim, Warmup(4)),
    "ReduceLROnPlateau": lambda optim: lr_scheduler.ReduceLROnPlateau(optim, patience=1),
    "SequentialLR": lambda optim: lr_scheduler.SequentialLR(
        optim, [lr_scheduler.LinearLR(optim), lr_scheduler.ExponentialLR(optim, 0.9)], [4]
    ),
    "ChainedScheduler": lambda optim: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(optim), lr_scheduler.StepLR(optim, 2)]
    ),
}


class Job:
    """An optimizer with a scheduler; `rates` are the learning rates of its next steps."""

    def __init__(self, make: Callable[[SGD], Any]) -> None:
        self.optimizer = SGD([nn.Parameter(torch.zeros(1))], lr=0.1, momentum=0.9)
        self.scheduler = make(self.optimizer)

    def rates(self, count: int) -> list[float]:
        found = []
        for _ in range(count):
            self.optimizer.step()
            plateau = isinstance(self.scheduler, lr_scheduler.ReduceLROnPlateau)
            self.scheduler.step(*([1.0] if plateau else []))
            found.append(self.optimizer.param_groups[0]["lr"])
        return found


@pytest.mark.filterwarnings("ignore:The epoch parameter")
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_restored_scheduler_goes_on_with_the_same_rates(name: str) -> None:
    job, again = Job(SCHEDULERS[name]), Job(SCHEDULERS[name])
    job.rates(5)
    again.rates(1)
    value = saved(ObjectState("scheduler", job.scheduler))
    group = {key: held for key, held in job.optimizer.param_groups[0].items() if key != "params"}
    expected = job.rates(6)
    again.optimizer.param_groups[0].update(group)
    restored = ObjectState("scheduler", again.scheduler)
    restored.apply(value)
    assert again.rates(6) == expected


def test_a_scheduler_that_is_a_callable_object_keeps_that_objects_fields() -> None:
    job, again = Job(SCHEDULERS["LambdaLR, object"]), Job(SCHEDULERS["LambdaLR, object"])
    again.scheduler.lr_lambdas[0].steps = 99
    ObjectState("scheduler", again.scheduler).apply(saved(ObjectState("scheduler", job.scheduler)))
    assert again.scheduler.lr_lambdas[0].steps == 4


def test_a_restored_scaler_has_the_same_scale() -> None:
    scaler, again = torch.amp.GradScaler("cpu", init_scale=8.0), torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(1))
    scaler.update(4.0)
    ObjectState("scaler", again).apply(saved(ObjectState("scaler", scaler)))
    assert again.get_scale() == 4.0
    off = torch.amp.GradScaler("cpu", enabled=False)
    ObjectState("scaler", off).apply(saved(ObjectState("scaler", off)))


def test_a_restored_generator_goes_on_with_the_same_numbers() -> None:
    generator = torch.Generator().manual_seed(5)
    torch.rand(3, generator=generator)
    value = saved(ObjectState("generator", generator))
    expected = torch.rand(3, generator=generator)
    again = torch.Generator()
    ObjectState("generator", again).apply(value)
    assert torch.equal(torch.rand(3, generator=again), expected)


def test_a_restored_object_does_not_share_its_state_with_what_it_was_restored_from() -> None:
    class Keeps:
        def __init__(self) -> None:
            self.state: dict[str, list[int]] = {"seen": []}

        def state_dict(self) -> dict[str, list[int]]:
            return self.state

        def load_state_dict(self, state: dict[str, list[int]]) -> None:
            self.state = state

    value = {"seen": [1]}
    keeps = Keeps()
    ObjectState("keeps", keeps).apply(value)
    keeps.state["seen"].append(2)
    assert value == {"seen": [1]}


# ------------------------------------------------------------------------------------------------ data loader


class Numbers(torch.utils.data.Dataset[int]):
    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> int:
        return index


class Stream(torch.utils.data.IterableDataset[int]):
    """A stream with a position of its own, shared out among the workers."""

    def __init__(self) -> None:
        self.at = 0

    def __iter__(self) -> Iterator[int]:
        worker = torch.utils.data.get_worker_info()
        number, of = (worker.id, worker.num_workers) if worker else (0, 1)
        while self.at < 12:
            self.at += 1
            yield self.at * of + number

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]


def batches(loader: Any) -> list[list[int]]:
    return [batch.tolist() for batch in loader]


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")
@pytest.mark.filterwarnings("ignore:This process")
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("dataset", [Numbers, Stream])
def test_a_data_loader_goes_on_in_the_middle_of_an_epoch(dataset: type, workers: int) -> None:
    from torchdata.stateful_dataloader import StatefulDataLoader

    def make(seed: int) -> Any:
        generator = torch.Generator().manual_seed(seed)
        return StatefulDataLoader(
            dataset(), batch_size=3, shuffle=dataset is Numbers, num_workers=workers, generator=generator
        )

    loader = make(1)
    item = ObjectState("loader", loader)
    running = iter(loader)
    first = [next(running).tolist() for _ in range(3)]
    value = saved(item)
    rest = [batch.tolist() for batch in running]
    again = make(2)
    ObjectState("loader", again).apply(value)
    assert batches(again) == rest
    assert not set(map(tuple, first)) & set(map(tuple, rest))
    del running, loader, again, item
    gc.collect()  # ends the workers


# ------------------------------------------------------------------------------------------------ mappings


def test_a_mapping_is_restored_in_place_with_all_that_is_nested_in_it() -> None:
    weights = torch.zeros(2)
    history = [1.0, 2.0]
    inner = {"best": math.inf, "seen": {1, 2}}
    recent = collections.deque([1], maxlen=3)
    table = np.zeros(2)
    progress: dict[str, Any] = {"epoch": 3, "history": history, "inner": inner, "w": weights, "r": recent, "t": table}
    item = ObjectState("progress", progress)
    value = saved(item)
    history.append(3.0)
    inner.clear()
    recent.extend([7, 8, 9])
    weights += 1
    table += 1
    progress.update(epoch=9, extra=1)
    item.apply(value)
    assert progress == {**progress, "epoch": 3, "history": [1.0, 2.0]}
    assert list(progress) == ["epoch", "history", "inner", "w", "r", "t"]
    assert progress["history"] is history
    assert progress["inner"] is inner
    assert inner == {"best": math.inf, "seen": {1, 2}}
    assert progress["w"] is weights
    assert weights.tolist() == [0, 0]
    assert progress["r"] is recent
    assert list(recent) == [1]
    assert progress["t"] is table
    assert table.tolist() == [0, 0]


def test_objects_in_a_list_keep_their_place() -> None:
    rows: list[dict[str, int]] = [{"a": 1}, {"a": 2}]
    first = rows[0]
    state = {"rows": rows}
    item = ObjectState("it", state)
    value = saved(item)
    first["a"] = 5
    rows.pop()
    item.apply(value)
    assert rows == [{"a": 1}, {"a": 2}]
    assert rows[0] is first


def test_one_list_in_two_places_can_become_two() -> None:
    shared: list[int] = []
    state = {"a": shared, "b": shared}
    ObjectState("it", state).apply({"a": [1], "b": [2]})
    assert state == {"a": [1], "b": [2]}


def test_a_deque_of_another_length_is_replaced_and_not_cut() -> None:
    state = {"recent": collections.deque([1], maxlen=2)}
    ObjectState("it", state).apply({"recent": collections.deque([1, 2, 3], maxlen=3)})
    assert list(state["recent"]) == [1, 2, 3]


def test_a_captured_mapping_does_not_change_with_it() -> None:
    progress: dict[str, Any] = {"history": [1], "w": torch.zeros(1)}
    captured: Any = ObjectState("progress", progress).capture()
    progress["history"].append(2)
    progress["w"] += 1
    assert captured == {"history": [1], "w": torch.zeros(1)}


def test_a_loss_with_its_graph_can_stand_in_a_mapping() -> None:
    loss = (nn.Parameter(torch.ones(1)) * 2).sum()
    captured: Any = ObjectState("progress", {"loss": loss}).capture()
    assert captured["loss"].item() == 2.0
    assert not captured["loss"].requires_grad


def test_a_counter_and_a_users_mapping_are_restored_in_place() -> None:
    for made in (collections.Counter("aab"), collections.UserDict({"a": 2, "b": 1}), collections.defaultdict(int, a=2)):
        before = dict(made)
        item = ObjectState("it", made)
        value = saved(item)
        made["a"] = 7
        made["z"] = 1
        item.apply(value)
        assert dict(made) == before


def test_what_became_impossible_to_save_later_is_refused_by_name() -> None:
    progress: dict[str, Any] = {}
    item = ObjectState("progress", progress)
    progress["me"] = progress
    with pytest.raises(StateError, match="'progress/me"):
        item.capture()


@pytest.mark.parametrize(("live", "value"), [({"a": 1}, [1]), ({"a": 1}, None), (torch.Generator(), {"a": 1})])
def test_a_state_of_another_kind_is_refused_and_nothing_changed(live: Any, value: object) -> None:
    item = ObjectState("it", live)
    before = saved(item)
    with pytest.raises(LayoutMismatch, match=r"state\['it'\]"):
        item.apply(value)
    after = saved(item)
    assert torch.equal(before, after) if isinstance(before, torch.Tensor) else after == before  # type: ignore[arg-type]
