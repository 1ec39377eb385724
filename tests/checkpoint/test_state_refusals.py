"""What cannot be saved is refused by name when the Checkpointer is made; what does not fit, before anything changes."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, distribute_tensor

from resilient.checkpoint.checkpointer import Checkpointer
from resilient.errors import LayoutMismatch, StateError
from tests.checkpoint.jobs import Job, checkpointing, differences, facts

pytestmark = pytest.mark.usefixtures("runtime_dir")


def with_buffer(tensor: Tensor) -> dict[str, Any]:
    model = nn.Module()
    model.inner = nn.Module()
    model.inner.register_buffer("odd", tensor)
    return {"model": model}


def with_extra_state(value: object) -> dict[str, Any]:
    class Extra(nn.Module):
        def get_extra_state(self) -> Any:
            return value

    return {"model": nn.Sequential(Extra())}


class Wrapped(torch.Tensor):
    pass


def of_an_optimizer(**defaults: Any) -> dict[str, Any]:
    model = nn.Linear(2, 2)
    return {"model": model, "optimizer": torch.optim.SGD([{"params": model.parameters(), **defaults}])}


def two_of_one_name() -> dict[str, Any]:
    model = nn.Linear(2, 2)
    return {"model": model, "model.weight": torch.zeros(2)}


REFUSED: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "meta": (lambda: with_buffer(torch.empty(3, device="meta")), "model.inner.odd.*meta"),
    "sparse": (lambda: with_buffer(torch.eye(3).to_sparse()), "model.inner.odd.*sparse"),
    "sparse rows": (lambda: with_buffer(torch.eye(3).to_sparse_csr()), "model.inner.odd.*sparse"),
    "quantized": (
        lambda: with_buffer(torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)),
        "model.inner.odd.*quantized",
    ),
    "nested": (lambda: with_buffer(torch.nested.nested_tensor([torch.ones(1)], layout=torch.jagged)), "nested"),
    "conjugate": (lambda: with_buffer(torch.ones(2, dtype=torch.complex64).conj()), "model.inner.odd.*conj"),
    "subclass": (lambda: with_buffer(torch.ones(2).as_subclass(Wrapped)), "model.inner.odd.*Wrapped"),
    "lazy": (lambda: {"model": nn.Sequential(nn.LazyLinear(3))}, "model.0.weight.*not initialised"),
    "lazy buffer": (lambda: {"model": nn.LazyBatchNorm1d(affine=False)}, "model.running_mean.*not initialised"),
    "stray parameter": (lambda: {"o": torch.optim.SGD([nn.Parameter(torch.ones(2, 5))])}, r"'o'.*\(2, 5\).*no module"),
    "an object": (lambda: {"thing": object()}, "thing"),
    "an object inside": (lambda: {"thing": {"a": [object()]}}, "thing/a/0"),
    "a function in a group": (lambda: of_an_optimizer(schedule=lambda: 1), "optimizer/param_groups/0/schedule"),
    "extra state": (lambda: with_extra_state({"a": object()}), "state/model/0/a"),
    "no numbers": (lambda: {"model": nn.Linear(1, 1), "resilient.mine": torch.ones(1)}, "resilient.mine.*are ours"),
    "header": (lambda: {"__metadata__": torch.ones(1)}, "__metadata__.*are ours"),
    "two of one name": (two_of_one_name, "two tensors.*model.weight"),
}


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")  # from torch, about what is refused
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_saved_is_refused_by_name(name: str, tmp_path: Path) -> None:
    make, message = REFUSED[name]
    state = make()
    with pytest.raises(StateError, match=message):
        Checkpointer(str(tmp_path), state)


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("group")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_distributed_wrappers_that_hide_their_state_are_refused(tmp_path: Path) -> None:
    from torch.distributed.optim import PostLocalSGDOptimizer, ZeroRedundancyOptimizer  # warns when it is imported

    model = nn.Linear(2, 2)
    flat = nn.Module()
    flat.inner = FullyShardedDataParallel(nn.Linear(2, 2), device_id=torch.device("cpu"))
    with pytest.raises(StateError, match="inner' in .*FSDP1.*fully_shard"):
        Checkpointer(str(tmp_path), {"model": flat})
    zero = ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW)
    with pytest.raises(StateError, match="'zero'.*ZeroRedundancyOptimizer"):
        Checkpointer(str(tmp_path), {"model": model, "zero": zero})
    averager: Any = None
    local: Any = PostLocalSGDOptimizer(torch.optim.SGD(model.parameters()), averager)
    with pytest.raises(StateError, match="'local'.*wraps another optimizer"):
        Checkpointer(str(tmp_path), {"model": model, "local": local})


@pytest.mark.usefixtures("group")
def test_distributed_tensors_that_cannot_be_rebuilt_are_refused(tmp_path: Path) -> None:
    mesh = init_device_mesh("cpu", (1,))
    whole = distribute_tensor(torch.ones(2), mesh, [Replicate()])
    with pytest.raises(StateError, match="'sum'.*partial"):
        Checkpointer(str(tmp_path), {"sum": DTensor.from_local(torch.ones(2), mesh, [Partial()])})
    with pytest.raises(StateError, match="table/a.*DTensor"):
        Checkpointer(str(tmp_path), {"table": {"a": whole}})
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters())
    optimizer.state[model.weight]["average"] = whole
    with pytest.raises(StateError, match="optimizer.state.model.weight.average.*another way than its parameter"):
        Checkpointer(str(tmp_path), {"model": model, "optimizer": optimizer})


@pytest.mark.usefixtures("group")
def test_a_sharded_model_that_an_evaluation_left_whole_is_saved_sharded(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 3))
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters())
    with checkpointing(tmp_path, Job({"model": model, "optimizer": optimizer}, lambda: None)) as checkpointer:
        with torch.no_grad():
            model(torch.randn(2, 3))
        checkpointer.save(1).durable("durable").result(30)
        saved = facts({"model": model})["model"]
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
            model(torch.randn(2, 3))
        checkpointer.restore()
        assert differences(saved, facts({"model": model})["model"]) == []


def trained(*sizes: int, item: str = "model") -> Job:
    model = nn.Sequential(*[nn.Linear(3, size) for size in sizes])
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    return Job({item: model, "optimizer": optimizer}, lambda: None)


def tied() -> Job:
    job = trained(3, 3)
    job.state["model"][1].weight = job.state["model"][0].weight
    job.state.pop("optimizer")
    return job


def no_optimizer() -> Job:
    job = trained(3, 3)
    return Job({"model": job.state["model"], "optimizer": {"a": 1}}, lambda: None)


MISFITS: dict[str, tuple[Callable[[], Job], Callable[[], Job], str]] = {
    "another shape": (lambda: trained(3, 4), lambda: trained(3, 5), "'model.1.weight'.*4, 3.*5, 3"),
    "more layers now": (lambda: trained(3), lambda: trained(3, 3), "no tensor 'model.1.weight'"),
    "more layers then": (lambda: trained(3, 3), lambda: trained(3), "has tensor 'model.1.weight'"),
    "another name": (lambda: trained(3), lambda: trained(3, item="net"), "'model.0.weight'"),
    "tied now": (lambda: trained(3, 3), tied, "'model.1.weight' is one with 'model.0.weight'"),
    "tied then": (tied, lambda: trained(3, 3), "no tensor 'model.1.weight'"),
    "no optimizer then": (no_optimizer, lambda: trained(3, 3), "'optimizer'.* is an optimizer"),
}


@pytest.mark.parametrize("name", MISFITS)
def test_the_snapshot_of_another_model_is_refused_by_name_and_overwrites_nothing(name: str, tmp_path: Path) -> None:
    make_saved, make_other, message = MISFITS[name]
    with checkpointing(tmp_path, make_saved()) as checkpointer:
        checkpointer.save(1).durable("durable").result(30)
    other = make_other()
    before = facts(other.state)
    with checkpointing(tmp_path, other) as checkpointer:
        with pytest.raises(LayoutMismatch, match=message):
            checkpointer.restore()
        assert differences(before, facts(other.state)) == []


def test_an_optimizer_that_the_snapshot_does_not_have_keeps_its_state(tmp_path: Path) -> None:
    saved, other = trained(3), trained(3)
    saved.state.pop("optimizer")
    with checkpointing(tmp_path, saved) as checkpointer:
        checkpointer.save(1).durable("durable").result(30)
    before = facts(other.state)["optimizer"]
    with checkpointing(tmp_path, other) as checkpointer:
        checkpointer.restore()
        assert checkpointer.last_restore is not None
        assert "nothing for 'optimizer'" in checkpointer.last_restore.notes[0]
    assert differences(before, facts(other.state)["optimizer"]) == []


def test_a_buffer_that_is_no_state_of_its_module_may_be_missing_or_have_another_shape(tmp_path: Path) -> None:
    def make(*shape: int) -> Job:
        model = nn.Linear(2, 2)
        if shape:
            model.register_buffer("cache", torch.randn(shape), persistent=False)
        return Job({"model": model}, lambda: None)

    saved = make(3)
    with checkpointing(tmp_path, saved) as checkpointer:
        checkpointer.save(1).durable("durable").result(30)
    for other in (make(), make(4)):
        before = dict(other.state["model"].named_buffers())
        with checkpointing(tmp_path, other) as checkpointer:
            assert checkpointer.restore() == 1
        assert torch.equal(other.state["model"].weight, saved.state["model"].weight)
        assert differences(before, dict(other.state["model"].named_buffers())) == []
