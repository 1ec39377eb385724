"""Universal checkpoints: what is written is read again, opens without any class, and says what DeepSpeed looks for."""

import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from resilient.checkpoint.dtypes import torch_dtype
from resilient.checkpoint.formats.convert import convert
from resilient.checkpoint.formats.fetch import fetch
from resilient.checkpoint.formats.output import SinkOptions
from resilient.checkpoint.formats.registry import open_source
from resilient.checkpoint.formats.source import Reference, Source
from resilient.errors import DamagedImage, NotACheckpoint, UsageError
from tests.checkpoint.formats.deepspeed_made import write_zero_2, write_zero_3
from tests.checkpoint.formats.made import made_source, open_made

TENSORS = {
    "model.up.weight": torch.randn(5, 3),
    "model.up.bias": torch.randn(5).bfloat16(),
    "model.scale": torch.tensor(2.5),
    "model.frozen": torch.randn(4, 2).half(),
    "model.mean": torch.randn(6),
    "model.calls": torch.tensor(12345678901),
}
TRAINED = ("model.up.weight", "model.up.bias", "model.scale")
GROUPS = [
    {"lr": 0.1, "betas": [0.9, 0.99], "params": ["model.up.weight"]},
    {"lr": 0.2, "betas": [0.8, 0.98], "params": ["model.up.bias", "model.scale"]},
]


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """A checkpoint with everything, as a universal one."""
    target = tmp_path / "universal"
    reference = _made(tmp_path / "made")
    convert(reference, str(target), to="deepspeed-universal", workers=1, open_source=open_made)
    return target


def test_all_comes_back_from_what_was_written(written: Path) -> None:
    with open_source(Reference(url=str(written))) as source:
        assert source.catalog.format == "deepspeed-universal"
        assert source.catalog.step == 7
        assert source.catalog.aliases == {"model.tied": "model.up.weight"}
        for name, value in TENSORS.items():
            expected = value.float() if name in TRAINED else value  # the masters stand for them
            assert torch.equal(_whole(source, name), expected), name
        for parameter, states in STATES.items():
            for state, value in states.items():
                assert torch.equal(_whole(source, f"optimizer.state.{parameter}.{state}"), value), (parameter, state)
        assert {tensor.fqn for tensor in source.catalog.of_kind("buffer")} == {"mean", "calls"}
        assert source.catalog.groups["optimizer"] == GROUPS
        assert source.objects()["lr_scheduler"] == {"last_epoch": 7}
        assert source.objects()["client_state"] == {"rng": [1, 2], "seen": 9}


def test_every_file_opens_without_any_class(written: Path) -> None:
    files = list(written.rglob("*.pt"))
    assert len(files) > 10
    for path in files:
        torch.load(path, weights_only=True)
    assert (written / "latest_universal").read_text() == "global_step7_universal"


def test_both_loaders_of_deepspeed_find_what_they_look_for(written: Path) -> None:
    tag = written / "global_step7_universal"
    optimizer = torch.load(tag / "zero/optimizer_state.pt", weights_only=True)
    assert optimizer["ds_version"]
    assert optimizer["param_groups"][1]["params"] == ["up.bias", "scale"]
    assert optimizer["optimizer_state_dict"]["state"][0]["step"].item() == 7
    assert optimizer["optimizer_state_dict"]["param_groups"] == optimizer["param_groups"]
    found = torch.load(tag / "zero/up.weight/exp_avg.pt", weights_only=True)
    assert (found["param"].dtype, found["param"].shape, found["cat_dim"]) == (torch.float32, (5, 3), 0)
    assert sorted(path.name for path in (tag / "zero/up.weight").iterdir()) == ["exp_avg.pt", "fp32.pt", "step.pt"]
    for name in ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt"):
        states = torch.load(tag / name, weights_only=True)
        assert (states["global_steps"], states["dp_world_size"], states["mp_world_size"]) == (7, 1, 1)
        assert [list(group) for group in states["param_shapes"]] == [["up.weight"], ["up.bias", "scale"]]


def test_parameters_without_masters_and_states_get_masters_alone(tmp_path: Path) -> None:
    reference = made_source(tmp_path / "made", {"model.a": torch.randn(3, 2).half(), "model.b": torch.randn(2)})
    convert(reference, str(tmp_path / "out"), to="deepspeed-universal", workers=1, open_source=open_made)
    with open_source(Reference(url=str(tmp_path / "out"))) as source, open_made(reference) as made:
        for name in ("model.a", "model.b"):
            assert torch.equal(_whole(source, name), _whole(made, name).float())
        assert len(source.catalog.of_kind("optimizer")) == 2


def test_a_specification_says_how_tensor_parallel_ranks_may_cut(tmp_path: Path) -> None:
    made = made_source(tmp_path / "made", {"model.out.weight": torch.randn(4, 6), "model.fused": torch.randn(8, 2)})
    spec = (
        '[mesh]\naxes = ["tp"]\n[[cut]]\npattern = "out.weight"\nsharded = { dim = 1, over = "tp" }\n'
        '[[cut]]\npattern = "fused"\nsharded = { dim = 0, over = "tp" }\nsub_parameters = { dim = 0, widths = [1, 1] }'
    )
    reference = Reference(url=made.url, format=made.format, spec=spec)
    convert(reference, str(tmp_path / "out"), to="deepspeed-universal", workers=1, open_source=open_made)
    zero = tmp_path / "out/global_step7_universal/zero"
    assert torch.load(zero / "out.weight/fp32.pt", weights_only=True)["cat_dim"] == 1
    assert torch.load(zero / "fused/fp32.pt", weights_only=True)["param_n_sub_params"] == 2


def test_what_the_job_said_of_its_cuts_is_passed_on(tmp_path: Path) -> None:
    info = {"universal_checkpoint_version": 0.4, "parameter_with_row_parallelism_patterns": ["out"]}
    tensors = {"model.out.weight": torch.randn(4, 6), "model.up.weight": torch.randn(8, 2)}
    made = made_source(tmp_path / "made", tensors, objects={"engine": {"universal_checkpoint_info": info}})
    convert(made, str(tmp_path / "out"), to="deepspeed-universal", workers=1, open_source=open_made)
    tag = tmp_path / "out/global_step7_universal"
    assert torch.load(tag / "zero/out.weight/fp32.pt", weights_only=True)["cat_dim"] == 1
    assert torch.load(tag / "zero/up.weight/fp32.pt", weights_only=True)["cat_dim"] == 0
    states = torch.load(tag / "mp_rank_00_model_states.pt", weights_only=True)
    assert states["universal_checkpoint_info"] == info


@pytest.mark.parametrize(
    ("tensors", "told"),
    [
        ({"model.a/b": torch.ones(1)}, "cannot be the name of a folder"),
        ({"model.a": torch.ones(1), "critic.a": torch.ones(1)}, "2 items with model tensors"),
        ({"model.optimizer_state.pt": torch.ones(1)}, "cannot be the name of a folder"),
    ],
)
def test_what_the_format_cannot_say_is_refused(tmp_path: Path, tensors: dict[str, torch.Tensor], told: str) -> None:
    reference = made_source(tmp_path / "made", tensors)
    with pytest.raises(UsageError, match=told):
        convert(reference, str(tmp_path / "out"), to="deepspeed-universal", workers=1, open_source=open_made)
    assert not (tmp_path / "out").exists()


def test_frozen_parameters_and_buffers_take_the_dtype_that_is_asked_for(tmp_path: Path) -> None:
    reference, options = _made(tmp_path / "made"), SinkOptions(dtype="bfloat16")
    target = str(tmp_path / "out")
    convert(reference, target, to="deepspeed-universal", options=options, workers=1, open_source=open_made)
    with open_source(Reference(url=target)) as source:
        assert source.catalog.tensors["model.frozen"].dtype == "bfloat16"
        assert source.catalog.tensors["model.calls"].dtype == "int64"
        assert source.catalog.tensors["model.up.weight"].dtype == "float32"


@pytest.mark.parametrize("stage", [2, 3])
def test_one_conversion_of_zero_serves_all_stages(tmp_path: Path, stage: int) -> None:
    groups = [{"a": torch.randn(5, 3), "b": torch.randn(7)}, {"c": torch.randn(9)}]
    (write_zero_2 if stage == 2 else write_zero_3)(tmp_path / "global_step5", groups, 3)
    convert(Reference(url=str(tmp_path)), str(tmp_path.parent / f"to{stage}"), to="deepspeed-universal", workers=1)
    with open_source(Reference(url=str(tmp_path.parent / f"to{stage}"))) as source:
        for group in groups:
            for name, master in group.items():
                assert torch.equal(_whole(source, f"optimizer.state.model.{name}.fp32"), master)
                assert torch.equal(_whole(source, f"optimizer.state.model.{name}.momentum"), master * 2 + 1)


def test_a_checkpoint_of_very_many_files_needs_few_open_at_once(tmp_path: Path) -> None:
    reference = made_source(tmp_path / "made", {f"model.{number}": torch.ones(1) for number in range(400)}, cuts=0)
    convert(reference, str(tmp_path / "out"), to="deepspeed-universal", workers=1, open_source=open_made)
    with open_source(Reference(url=str(tmp_path / "out"))) as source:
        assert 0 < _open_below(tmp_path / "out") < 300
        assert all(_whole(source, f"model.{number}").item() == 1 for number in range(400))
    assert _open_below(tmp_path / "out") == 0


def _open_below(folder: Path) -> int:
    return sum(os.path.realpath(f"/proc/self/fd/{fd}").startswith(str(folder)) for fd in os.listdir("/proc/self/fd"))


def test_a_missing_parameter_is_named(written: Path) -> None:
    (written / "global_step7_universal/zero/up.bias/fp32.pt").unlink()
    with pytest.raises(DamagedImage, match="1 of 3 parameters are missing, first up.bias"):
        open_source(Reference(url=str(written)))


@pytest.mark.parametrize("file", ["zero/up.bias/fp32.pt", "zero/optimizer_state.pt", "mp_rank_00_model_states.pt"])
def test_a_truncated_file_is_named(written: Path, file: str) -> None:
    path = written / "global_step7_universal" / file
    path.write_bytes(path.read_bytes()[: random.Random(file).randrange(path.stat().st_size)])
    with pytest.raises((DamagedImage, NotACheckpoint), match=file):
        open_source(Reference(url=str(written)))


@pytest.mark.parametrize(
    ("value", "told"),
    [({"param": torch.ones(4)}, "has the shape \\(4,\\)"), ({"other": 1}, "holds no tensor"), ("text", "no tensor")],
)
def test_states_that_are_none_are_refused(written: Path, value: Any, told: str) -> None:
    torch.save(value, written / "global_step7_universal/zero/up.bias/fp32.pt")
    with pytest.raises(DamagedImage, match=told):
        open_source(Reference(url=str(written)))


def test_a_pickle_that_runs_code_is_refused(written: Path, tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"param": Hostile()}, written / "global_step7_universal/zero/up.bias/fp32.pt")
    with pytest.raises(NotACheckpoint, match="mkdir"):
        open_source(Reference(url=str(written)))
    assert not (tmp_path / "ran").exists()


def _states() -> dict[str, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    found = {}
    for name in TRAINED:
        shape = TENSORS[name].shape
        states = {"exp_avg": torch.randn(shape, generator=generator), "step": torch.tensor(7.0)}
        found[name] = {"fp32": TENSORS[name].float(), **states}
    found["model.up.bias"]["row"] = torch.randn(2, 1)  # of another shape than the parameter: no loader knows it
    return found


STATES = _states()


def _made(folder: Path) -> Reference:
    return made_source(
        folder,
        TENSORS,
        buffers=("model.mean", "model.calls"),
        states=STATES,
        groups={"optimizer": GROUPS},
        aliases={"model.tied": "model.up.weight"},
        objects={"lr_scheduler": {"last_epoch": 7}, "rng": [1, 2], "client_state": {"seen": 9}},
    )


def _whole(source: Source, name: str) -> torch.Tensor:
    tensor = source.catalog.tensors[name]
    data = bytearray(tensor.nbytes)
    fetch(source, tensor, memoryview(data))
    return torch.frombuffer(data, dtype=torch_dtype(tensor.dtype)).view(tensor.shape)
