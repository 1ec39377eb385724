"""Conversions: every element arrives, whatever the partition; dtypes and patterns do what they say.

What goes into them is made (`made.py`); what comes out is read with the safetensors library, not with our source.
Targets: test_convert_target.py; processes: test_convert_workers.py; conversions that are killed: tests/crash.
"""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from resilient.checkpoint.formats.output import SinkOptions
from resilient.checkpoint.formats.select import select
from resilient.checkpoint.formats.source import Reference, Source
from resilient.errors import UsageError
from tests.checkpoint.formats.conversions import to_safetensors, written
from tests.checkpoint.formats.made import MadeSource, made_source, open_made, raw_bytes

DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.int16, torch.bool, torch.float8_e4m3fn)


def values(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Random bytes as a tensor: NaN patterns, infinities and all."""
    count = torch.Size(shape).numel() * torch.empty(0, dtype=dtype).element_size()
    data = torch.randint(0, 2 if dtype == torch.bool else 256, (count,), generator=torch.Generator().manual_seed(seed))
    return data.to(torch.uint8).view(dtype).reshape(shape) if count else torch.empty(shape, dtype=dtype)


@st.composite
def checkpoints(draw: st.DrawFn) -> dict[str, torch.Tensor]:
    """Tensors of up to 3 dimensions, also with nothing in them."""
    count, found = draw(st.integers(1, 4)), {}
    for number in range(count):
        shape = tuple(draw(st.lists(st.integers(0, 24), max_size=3)))
        found[f"model.w{number}"] = values(shape, draw(st.sampled_from(DTYPES)), draw(st.integers(0, 1000)))
    return found


@settings(deadline=None, max_examples=60)  # each waits for the disk
@given(tensors=checkpoints(), seed=st.integers(0, 2**32), shard_bytes=st.sampled_from((64, 5000, 1 << 30)))
def test_every_element_of_any_partition_arrives_and_is_read_once(
    tensors: dict[str, torch.Tensor], seed: int, shard_bytes: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("any")
    opened: list[MadeSource] = []

    def opener(reference: Reference) -> Source:
        opened.append(open_made(reference))
        return opened[-1]

    reference = made_source(folder / "source", tensors, seed=seed)
    to_safetensors(reference, folder / "out", options=SinkOptions(shard_bytes=shard_bytes), open_source=opener)

    found = written(folder / "out")
    assert sorted(found) == sorted(name.removeprefix("model.") for name in tensors)
    for name, value in tensors.items():
        same = found[name.removeprefix("model.")]
        assert (same.dtype, same.shape, raw_bytes(same)) == (value.dtype, value.shape, raw_bytes(value))
    needed = sum(value.nbytes for value in tensors.values())
    assert sum(source.read_bytes for source in opened) <= 1.05 * needed


def test_progress_adds_up_to_the_total(tmp_path: Path) -> None:
    reference = made_source(tmp_path / "source", {"model.a": torch.ones(30, 30), "model.b": torch.ones(7)})
    told: list[int] = []
    totals: list[int] = []
    report = to_safetensors(reference, tmp_path / "out", progress=told.append, total=totals.append)
    assert totals == [sum(told)] == [report.nbytes] == [(tmp_path / "out" / "model.safetensors").stat().st_size]


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16", "float8_e5m2", "float8_e4m3fn"])
def test_floating_point_values_are_converted_and_nothing_else(tmp_path: Path, dtype: str) -> None:
    tensors = {
        "model.single": torch.randn(50, 40, generator=torch.Generator().manual_seed(1)),
        "model.half": torch.linspace(-2, 2, 100).bfloat16(),
        "model.count": torch.arange(10),
        "model.flags": torch.tensor([True, False]),
    }
    reference = made_source(tmp_path / "source", tensors, buffers={"model.count"})
    report = to_safetensors(reference, tmp_path / "out", options=SinkOptions(dtype=dtype))
    found = written(tmp_path / "out")
    to = getattr(torch, dtype)
    for name in ("single", "half"):
        assert raw_bytes(found[name]) == raw_bytes(tensors[f"model.{name}"].to(to))
    assert torch.equal(found["count"], tensors["model.count"])
    assert torch.equal(found["flags"], tensors["model.flags"])
    assert report.beyond == {}


def test_values_beyond_the_range_become_its_ends_and_are_counted(tmp_path: Path) -> None:
    value = torch.tensor([1e6, -1e9, 65504.0, float("inf"), float("-inf"), float("nan"), 1.0])
    reference = made_source(tmp_path / "source", {"model.big": value, "model.small": torch.ones(3)})
    report = to_safetensors(reference, tmp_path / "out", options=SinkOptions(dtype="float16"))
    found = written(tmp_path / "out")["big"].tolist()
    assert found[:5] == [65504.0, -65504.0, 65504.0, float("inf"), float("-inf")]
    assert found[5] != found[5]
    assert found[6] == 1.0
    assert report.beyond == {"model.big": 2}


def test_where_a_dtype_has_no_infinity_one_becomes_nan(tmp_path: Path) -> None:
    value = torch.tensor([1e6, -1e6, float("inf"), float("nan"), 2.0])
    reference = made_source(tmp_path / "source", {"model.big": value})
    report = to_safetensors(reference, tmp_path / "out", options=SinkOptions(dtype="float8_e4m3fn"))
    found = written(tmp_path / "out")["big"].float()
    assert found[[0, 1, 4]].tolist() == [448.0, -448.0, 2.0]
    assert found[2:4].isnan().all()
    assert report.beyond == {"model.big": 2}


def test_patterns_select_by_name_by_fqn_and_by_parameter(tmp_path: Path) -> None:
    tensors = {f"model.{name}.weight": torch.ones(2) for name in ("a", "b", "c")}
    reference = made_source(tmp_path / "source", tensors)
    to_safetensors(reference, tmp_path / "out", select=["model.a.*", "c.wei??t"])
    assert sorted(written(tmp_path / "out")) == ["a.weight", "c.weight"]


def test_the_optimizers_state_goes_with_its_parameter_and_groups_lose_what_is_not_selected(tmp_path: Path) -> None:
    tensors = {f"model.{name}": torch.ones(2) for name in ("a", "b", "c")}
    groups = [{"params": ["model.a", "model.b", "model.tied"], "lr": 1.0}, {"params": ["model.c"], "lr": 2.0}]
    reference = made_source(
        tmp_path / "source",
        tensors,
        states={name: {"exp_avg": value} for name, value in tensors.items()},
        groups={"optimizer": groups},
        aliases={"model.tied": "model.a"},
    )
    with open_made(reference) as source:
        part = select(source.catalog, ["a"])
        assert list(part.tensors) == ["model.a", "optimizer.state.model.a.exp_avg"]
        assert part.groups == {
            "optimizer": [{"params": ["model.a", "model.tied"], "lr": 1.0}, {"params": [], "lr": 2.0}]
        }
        assert select(source.catalog, ["optimizer.*"]).groups["optimizer"][0]["params"] == []
        assert select(source.catalog, []).groups == {"optimizer": groups}


def test_a_pattern_that_matches_nothing_is_refused(tmp_path: Path) -> None:
    reference = made_source(tmp_path / "source", {"model.a": torch.ones(2)})
    with pytest.raises(UsageError, match=r"no tensor matches the pattern 'model\.b'; names are like model\.a"):
        to_safetensors(reference, tmp_path / "out", select=["model.a", "model.b"])
    assert not (tmp_path / "out").exists()


def test_what_the_target_does_not_have_is_noted(tmp_path: Path) -> None:
    reference = made_source(
        tmp_path / "source", {"model.a": torch.ones(2)}, states={"model.a": {"exp_avg": torch.ones(2)}}
    )
    report = to_safetensors(reference, tmp_path / "out")
    assert report.notes == (
        "1 tensors of the source are not part of the target, such as optimizer.state.model.a.exp_avg",
    )
