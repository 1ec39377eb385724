"""Single files of torch.save as a source and a sink: what is in them, whose optimizer state is whose, and back."""

import collections
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from resilient.checkpoint.catalog.catalog import Tensor as CatalogTensor
from resilient.checkpoint.formats.convert import convert
from resilient.checkpoint.formats.fetch import fetch
from resilient.checkpoint.formats.output import SinkOptions
from resilient.checkpoint.formats.registry import open_source
from resilient.checkpoint.formats.source import Reference, Source
from resilient.errors import DamagedImage, NotACheckpoint, UsageError
from tests.checkpoint.formats.made import made_source, open_made
from tests.checkpoint.formats.torch_jobs import OPTIMIZERS, Job, Network
from tests.checkpoint.formats.torch_made import bytes_of


def opened(path: Path, tree: Any, **options: Any) -> Source:
    torch.save(tree, path)
    return open_source(Reference(url=str(path), format="torch", **options))


def value(source: Source, tensor: CatalogTensor) -> bytes:
    data = bytearray(tensor.nbytes)
    fetch(source, tensor, memoryview(data))
    return bytes(data)


def written(source: Path, target: Path, **options: Any) -> Any:
    """What `torch.load` finds in a file that was converted."""
    report = convert(
        Reference(url=str(source), format="torch"), str(target), to="torch", options=SinkOptions(**options), workers=1
    )
    assert report.files == 1
    return torch.load(target, weights_only=True)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_training_goes_on_with_the_same_losses_after_a_conversion(tmp_path: Path, kind: str) -> None:
    job = Job(kind)
    job.train(3, seed=1)
    torch.save(job.state(), tmp_path / "a.pt")
    again = Job(kind)
    again.load(written(tmp_path / "a.pt", tmp_path / "b.pt"))
    assert again.train(3, seed=2) == job.train(3, seed=2)
    written(tmp_path / "b.pt", tmp_path / "c.pt")
    assert (tmp_path / "b.pt").read_bytes() == (tmp_path / "c.pt").read_bytes()


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_state_that_is_kept_by_number_gets_the_names_of_its_parameters(tmp_path: Path, kind: str) -> None:
    job = Job(kind)
    job.train(2, seed=1)
    source = opened(tmp_path / "a.pt", job.state())
    assert source.catalog.notes == []
    for name, parameter in job.model.named_parameters():
        states = source.catalog.states_of(f"model.{name}")
        held = {key: one for key, one in job.optimizer.state[parameter].items() if isinstance(one, Tensor)}
        assert {key: value(source, one) for key, one in states.items()} == {k: bytes_of(v) for k, v in held.items()}
    groups = source.catalog.groups["optimizer"]
    assert [group["lr"] for group in groups] == [group["lr"] for group in job.optimizer.param_groups]
    names = {parameter: f"model.{name}" for name, parameter in job.model.named_parameters()}
    assert [group["params"] for group in groups] == [
        [names[one] for one in group["params"]] for group in job.optimizer.param_groups
    ]


def test_state_that_fits_no_model_is_kept_under_numbers_with_a_note_and_loads_again(tmp_path: Path) -> None:
    job = Job("adamw")
    job.train(2, seed=1)
    torch.save({"optimizer": job.optimizer.state_dict(), "step": 2}, tmp_path / "a.pt")
    with open_source(Reference(url=str(tmp_path / "a.pt"), format="torch")) as source:
        assert "optimizer.state.optimizer.0.exp_avg" in source.catalog.tensors
        assert "no model is there" in source.catalog.notes[0]
    again = Job("adamw")
    again.model.load_state_dict(job.model.state_dict())
    again.optimizer.load_state_dict(written(tmp_path / "a.pt", tmp_path / "b.pt")["optimizer"])
    again.schedule.load_state_dict(job.schedule.state_dict())
    assert again.train(2, seed=3) == job.train(2, seed=3)


def some_trained(*frozen: str) -> dict[str, Any]:
    """The state of a model of which some parameters are frozen, and of an optimizer that numbers the others."""
    model = Network()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)
    optimizer = torch.optim.SGD([one for one in model.parameters() if one.requires_grad], lr=0.1, momentum=0.9)
    model(torch.arange(30)).square().sum().backward()
    optimizer.step()
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict()}


def test_frozen_parameters_are_left_out_where_the_shapes_leave_no_doubt(tmp_path: Path) -> None:
    source = opened(tmp_path / "a.pt", some_trained("table.weight"))
    assert source.catalog.notes == []
    names = {f"model.{name}" for name, _ in Network().named_parameters()}
    assert {one.parameter for one in source.catalog.of_kind("optimizer")} == names - {"model.table.weight"}


def test_state_that_might_be_of_one_parameter_or_another_is_given_to_none(tmp_path: Path) -> None:
    source = opened(tmp_path / "a.pt", some_trained("norm.bias"))  # which has the shape of its neighbours
    assert {one.parameter for one in source.catalog.of_kind("optimizer")} == {f"optimizer.{n}" for n in range(6)}
    assert "no model is there whose parameters they fit" in source.catalog.notes[0]
    states = {0: {"m": torch.ones(3)}, 1: {"m": torch.ones(2)}}
    optimizer = {"state": states, "param_groups": [{"params": [0, 1]}]}
    tree = {"net": {"a": torch.ones(2), "b": torch.ones(3)}, "optimizer": optimizer}
    assert opened(tmp_path / "b.pt", tree).catalog.states_of("net.a") == {}


def test_a_state_dict_alone_is_the_model_tied_and_with_its_buffers(tmp_path: Path) -> None:
    model = Network()
    source = opened(tmp_path / "model.bin", model.state_dict())
    kinds = {name.removeprefix("model."): one.kind for name, one in source.catalog.tensors.items()}
    assert {name for name, kind in kinds.items() if kind == "buffer"} == {name for name, _ in model.named_buffers()}
    assert source.catalog.aliases == {"model.head.weight": "model.table.weight"}
    for name, tensor in model.state_dict().items():
        if name != "head.weight":
            assert value(source, source.catalog.tensors[f"model.{name}"]) == bytes_of(tensor)
    found = written(tmp_path / "model.bin", tmp_path / "b.pt")
    assert found["head.weight"].data_ptr() == found["table.weight"].data_ptr()
    Network().load_state_dict(found)


def test_optimizer_state_that_is_kept_by_name_is_read_nested_and_flattened(tmp_path: Path) -> None:
    average = torch.ones(2, 3)
    nested = {"state": {"w": {"exp_avg": average}}, "param_groups": [{"lr": 0.1, "params": ["w"]}]}
    flat = {"state.w.exp_avg": average, "param_groups.w.lr": 0.1}
    for number, optimizer in enumerate((nested, flat)):
        tree = {"app": {"net": {"w": torch.zeros(2, 3)}, "optim": optimizer}}
        catalog = opened(tmp_path / f"{number}.pt", tree).catalog
        tensor = catalog.tensors["app.optim.state.app.net.w.exp_avg"]
        assert (tensor.item, tensor.parameter, tensor.state) == ("app.optim", "app.net.w", "exp_avg")
        assert catalog.groups == {"app.optim": [{"lr": 0.1, "params": ["app.net.w"]}]}
    assert written(tmp_path / "1.pt", tmp_path / "c.pt")["app"]["optim"]["param_groups"][0]["param_names"] == ["w"]


def test_views_of_any_strides_are_read_and_written_contiguous(tmp_path: Path) -> None:
    base = torch.arange(60.0).reshape(3, 4, 5)
    views = {"turned": base.permute(2, 0, 1), "column": base[:, 1], "expanded": base[0, 0].expand(4, 5), "one": base}
    source = opened(tmp_path / "a.pt", views)
    for name, view in views.items():
        assert value(source, source.catalog.tensors[f"model.{name}"]) == bytes_of(view), name
    found = written(tmp_path / "a.pt", tmp_path / "b.pt")
    assert all(torch.equal(found[name], view) and found[name].is_contiguous() for name, view in views.items())


def test_what_is_no_model_and_no_optimizer_comes_back_as_it_was(tmp_path: Path) -> None:
    rest = {
        "step": 7,
        "rng": {"cpu": torch.get_rng_state(), "cuda": []},
        "history": [1.5, None, ("a", {"b": torch.tensor([1, 2])})],
        "config": collections.OrderedDict(width=3),
        5: "a number for a key",
        "empty": {},
    }
    large = torch.randn(600, 600)
    source = opened(tmp_path / "a.pt", {"model": {"w": torch.ones(2)}, "large": large, **rest})
    objects = source.objects()
    assert source.catalog.step == 7
    assert source.catalog.tensors["large"].kind == "tensor"
    assert torch.equal(objects["rng"]["cpu"], rest["rng"]["cpu"])  # type: ignore[index]
    assert (objects["history"][:2], objects["config"], objects["empty"]) == ([1.5, None], {"width": 3}, {})
    found = written(tmp_path / "a.pt", tmp_path / "b.pt")
    assert list(found["history"][2][1]["b"]) == [1, 2]
    assert torch.equal(found["large"], large)
    assert set(found) == {"model", "large", *map(str, rest)}


def test_several_models_and_optimizers_are_items_and_lists_of_them_come_back_as_lists(tmp_path: Path) -> None:
    states = [{"state": {0: {"m": torch.ones(2)}}, "param_groups": [{"lr": lr, "params": [0]}]} for lr in (0.1, 0.2)]
    tree = {"state_dict": {"w": torch.zeros(2)}, "optimizer_states": states, "teacher": {"w": torch.ones(2)}}
    source = opened(tmp_path / "a.ckpt", tree)
    assert list(source.catalog.groups) == ["optimizer_states.0", "optimizer_states.1"]
    assert [one.item for one in source.catalog.of_kind("parameter")] == ["state_dict", "teacher"]
    found = written(tmp_path / "a.ckpt", tmp_path / "b.pt")
    assert [one["param_groups"][0]["lr"] for one in found["optimizer_states"]] == [0.1, 0.2]
    assert torch.equal(found["teacher"]["w"], torch.ones(2))


def test_extra_state_of_modules_goes_with_the_model(tmp_path: Path) -> None:
    tree = {"model": {"w": torch.ones(2), "inner._extra_state": {"scale": 3}}}
    source = opened(tmp_path / "a.pt", tree)
    assert source.objects()["model"] == {"inner._extra_state": {"scale": 3}}
    assert written(tmp_path / "a.pt", tmp_path / "b.pt")["inner._extra_state"] == {"scale": 3}


def test_any_source_becomes_a_file_with_its_dtype_and_its_master_weights(tmp_path: Path) -> None:
    weight, bias = torch.randn(40, 30).bfloat16(), torch.randn(30).bfloat16()
    master = weight.float() + 0.001
    reference = made_source(
        tmp_path / "made",
        {"model.weight": weight, "model.bias": bias},
        states={"model.weight": {"fp32": master}},
        groups={"optimizer": [{"lr": 0.5, "params": ["model.weight", "model.bias"]}]},
    )
    options = SinkOptions(dtype="float32")
    convert(reference, str(tmp_path / "a.pt"), to="torch", options=options, workers=1, open_source=open_made)
    found = torch.load(tmp_path / "a.pt", weights_only=True)
    assert torch.equal(found["model"]["weight"], master)
    assert torch.equal(found["model"]["bias"], bias.float())
    assert found["optimizer"]["param_groups"] == [{"lr": 0.5, "params": [0, 1], "param_names": ["weight", "bias"]}]


def test_verify_names_the_tensors_whose_bytes_have_changed(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    source = opened(path, {"model": {"first": torch.ones(100), "second": torch.ones(200)}})
    seen: list[int] = []
    assert list(source.verify(seen.append)) == []
    assert sum(seen) == 1200
    at = int(source.catalog.tensors["model.second"].pieces.rows[0, 1])
    with path.open("r+b") as file:
        file.seek(at + 5)
        file.write(b"\xff")
    (finding,) = source.verify(lambda nbytes: None)
    assert finding.tensors == ("model.second",)
    assert "checksum" in finding.problem


def test_a_folder_with_one_such_file_is_one_and_with_two_is_not(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "a.pt")
    assert open_source(Reference(url=str(tmp_path))).catalog.format == "torch"
    torch.save({"w": torch.ones(2)}, tmp_path / "b.pt")
    with pytest.raises(NotACheckpoint):
        open_source(Reference(url=str(tmp_path)))
    with pytest.raises(NotACheckpoint, match="name the one to read"):
        open_source(Reference(url=str(tmp_path), format="torch"))


def test_a_model_in_shards_with_an_index_is_read_as_one(tmp_path: Path) -> None:
    shards = {
        "pytorch_model-1.bin": {"a": torch.ones(3)},
        "pytorch_model-2.bin": {"b": torch.zeros(2), "c": torch.ones(2)},
    }
    for name, tensors in shards.items():
        torch.save(tensors, tmp_path / name)
    weights = {key: name for name, tensors in shards.items() for key in tensors}
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weights}))
    with open_source(Reference(url=str(tmp_path))) as source:
        assert source.catalog.format == "torch"
        for tensors in shards.values():
            for name, tensor in tensors.items():
                assert value(source, source.catalog.tensors[f"model.{name}"]) == bytes_of(tensor)
        with (tmp_path / "pytorch_model-2.bin").open("r+b") as file:
            file.seek(int(source.catalog.tensors["model.c"].pieces.rows[0, 1]))
            file.write(b"x")
        assert [finding.tensors for finding in source.verify(lambda nbytes: None)] == [("model.c",)]
    for key, name in (("d", "pytorch_model-1.bin"), ("a", "../a.bin"), ("a", "none.bin")):
        index.write_text(json.dumps({"weight_map": weights | {key: name}}))
        with pytest.raises(DamagedImage, match="index"):
            open_source(Reference(url=str(tmp_path), format="torch"))


class Stranger:
    """Something that only its own program knows."""


def test_objects_of_strangers_are_read_only_on_request_and_never_written(tmp_path: Path) -> None:
    torch.save({"model": {"w": torch.ones(2)}, "config": Stranger()}, tmp_path / "a.pt")
    url = str(tmp_path / "a.pt")
    with pytest.raises(NotACheckpoint, match=r"Stranger.*--trust-pickle"):
        open_source(Reference(url=url, format="torch"))
    assert isinstance(open_source(Reference(url=url, format="torch", trust_pickle=True)).objects()["config"], Stranger)
    with pytest.raises(UsageError, match="config is a .*Stranger"):
        convert(Reference(url=url, format="torch", trust_pickle=True), str(tmp_path / "b.pt"), to="torch", workers=1)
    assert not (tmp_path / "b.pt").exists()


def test_a_tree_that_contains_itself_is_refused(tmp_path: Path) -> None:
    inside: dict[str, Any] = {"w": 1}
    inside["again"] = inside
    with pytest.raises(DamagedImage, match="contains itself"):
        opened(tmp_path / "a.pt", inside)
