"""Hugging Face's Trainer with a DeepSpeed configuration: killed, and resumed from its folder, it ends the same."""

from pathlib import Path
from typing import Any

import pytest

from tests.multiprocess import deepspeed_trainer_jobs as jobs
from tests.multiprocess.ranks import run

pytestmark = [pytest.mark.timeout(300), pytest.mark.usefixtures("runtime_dir")]


def _train(folder: Path, die_at: int | None, resume: bool) -> Any:
    return jobs.train(str(folder), 6, stage=2, die_at=die_at, resume=resume)


def test_a_trainer_that_was_killed_goes_on_from_its_newest_checkpoint(tmp_path: Path) -> None:
    [undisturbed] = run(_train, 1, tmp_path / "undisturbed", None, False, deadline_s=120)
    assert run(_train, 1, tmp_path / "killed", 5, False, deadline_s=120) == [None]
    [resumed] = run(_train, 1, tmp_path / "killed", None, True, deadline_s=120)
    assert resumed["restored"] == [4, "memory"]
    assert (resumed["step"], resumed["weights"]) == (6, undisturbed["weights"])
    assert undisturbed["latest"] == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
