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


def test_a_snapshot_of_version_1_still_restores(tmp_path: Path, runtime_dir: Path) -> None:
    shutil.copytree(GOLDEN / "snapshot_version_1", tmp_path / "run")
    state, model = job(1)
    with resilient.Checkpointer(str(tmp_path / "run"), state) as checkpointer:
        assert checkpointer.restore() == 3
    expected, reference = job(3)
    for name, tensor in reference.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    assert state["notes"] == expected["notes"]
    optimizer = state["optimizer"]
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.4)
    assert {int(held["step"]) for held in optimizer.state.values()} == {3}


def test_an_image_of_version_1_opens_without_us() -> None:
    (image,) = (GOLDEN / "snapshot_version_1").rglob("*.safetensors")
    tensors = safetensors.torch.load_file(image)
    assert torch.equal(tensors["model.0.weight"], job(3)[1].state_dict()["0.weight"])


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
