"""Snapshots written by every earlier version of the library still load, bit for bit."""

import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch

import resilient
from resilient.errors import NewerFormat
from tests.golden.make_snapshot import job

GOLDEN = Path(__file__).parent


def stored_tensors() -> dict[str, torch.Tensor]:
    """What stands in the golden image, read without this library."""
    (image,) = (GOLDEN / "snapshot_version_1").rglob("*.safetensors")
    return safetensors.torch.load_file(image)


def test_a_snapshot_of_version_1_still_restores(tmp_path: Path, runtime_dir: Path) -> None:
    shutil.copytree(GOLDEN / "snapshot_version_1", tmp_path / "run")
    state, model = job(1)
    with resilient.Checkpointer(str(tmp_path / "run"), state) as checkpointer:
        assert checkpointer.restore() == 3
    saved = stored_tensors()
    for name, tensor in model.state_dict().items():
        known = saved[f"model.{name}"]
        assert torch.equal(tensor, torch.view_as_complex(known) if tensor.is_complex() else known), name
    assert state["notes"] == job(3)[0]["notes"]
    optimizer = state["optimizer"]
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.4)
    assert {int(held["step"]) for held in optimizer.state.values()} == {3}


def test_an_image_of_version_1_opens_without_us() -> None:
    tensors = stored_tensors()
    assert torch.equal(tensors["model.small"], torch.arange(7, dtype=torch.bfloat16))
    assert tensors["optimizer.state.model.0.weight.exp_avg"].shape == (5, 6)


def test_a_newer_version_is_refused_by_name_and_left_alone(tmp_path: Path, runtime_dir: Path) -> None:
    from resilient.checkpoint.digest import digest

    shutil.copytree(GOLDEN / "snapshot_version_1", tmp_path / "run")
    (record,) = (tmp_path / "run").rglob("*.json")
    rest = record.read_text().split("\n", 1)[1].replace('"version":1', '"version":2', 1)
    record.write_text(f'{{"digest":"{digest(rest.encode())}",\n{rest}')
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("step_*/*")}
    state, _ = job(1)
    with (
        resilient.Checkpointer(str(tmp_path / "run"), state) as checkpointer,
        pytest.raises(NewerFormat, match="version 2"),
    ):
        checkpointer.restore()
    assert {path: path.read_bytes() for path in before} == before
