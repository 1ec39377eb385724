"""Calls that cannot be meant are answered by name and change nothing; steps may be integers of any type."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from resilient.checkpoint.checkpointer import Checkpointer
from resilient.errors import PolicyError, StateError, UsageError
from resilient.policy import Policy
from tests.checkpoint.jobs import Job, checkpointing

pytestmark = pytest.mark.usefixtures("runtime_dir")
LONG_S = 30.0


@pytest.mark.parametrize("step", [3.0, "3", None, torch.ones(2), -1, 1 << 62], ids=repr)
def test_what_is_no_step_is_refused_and_the_next_save_is_none_the_worse(step: Any, tmp_path: Path) -> None:
    with checkpointing(tmp_path, Job({"model": nn.Linear(2, 2)}, lambda: None)) as checkpointer:
        with pytest.raises(UsageError, match=r"^save\(.*a step is a "):
            checkpointer.save(step)
        assert checkpointer.save(1).durable("durable").result(LONG_S) == 1


@pytest.mark.parametrize("step", [np.int64(4), torch.tensor(4), True, (1 << 62) - 1], ids=repr)
def test_a_step_may_be_an_integer_of_any_type(step: Any, tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    with checkpointing(tmp_path, Job({"model": model}, lambda: None)) as checkpointer:
        handle = checkpointer.save(step)
        assert type(handle.step) is int
        assert handle.durable("durable").result(LONG_S) == int(step)
    with checkpointing(tmp_path, Job({"model": nn.Linear(2, 2)}, lambda: None)) as checkpointer:
        assert checkpointer.restore() == int(step)


@pytest.mark.parametrize("url", [None, "", 7], ids=repr)
def test_what_is_no_url_is_refused(url: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=r"^url = .* is no place for snapshots"):
        Checkpointer(url, {"model": nn.Linear(2, 2)})
    assert list(tmp_path.iterdir()) == []


def test_a_state_that_is_no_mapping_and_a_policy_that_is_none_are_refused(tmp_path: Path) -> None:
    state: Any = nn.Linear(2, 2)
    with pytest.raises(StateError, match="state must map names"):
        Checkpointer(str(tmp_path), state)
    policy: Any = {"durable_every": 1}
    with pytest.raises(PolicyError, match="a policy is wanted, not a dict"):
        Checkpointer(str(tmp_path), {"model": state}, policy)


def test_a_local_level_in_the_folder_of_the_durable_one_is_refused_by_whatever_name(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "url")
    for local in ("url", "link", "url/../link"):
        with pytest.raises(PolicyError, match=r"^local = .* is the folder of the durable level"):
            Checkpointer(f"file://{tmp_path}/url", {"model": nn.Linear(2, 2)}, Policy(local=str(tmp_path / local)))
    assert not (tmp_path / "url").exists()


@pytest.mark.parametrize("names", [["notes.txt"], [".metadata", "__0_0.distcp"], ["step_00000007/model.pt"]], ids=str)
def test_a_folder_that_holds_something_else_is_named_and_left_as_it_is(
    names: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("somebody else's")
    with (
        caplog.at_level(logging.WARNING, "resilient"),
        checkpointing(tmp_path, Job({"model": nn.Linear(2, 2)}, lambda: None)) as checkpointer,
    ):
        assert checkpointer.restore() is None
        for step in range(1, 12):
            checkpointer.save(step).durable("durable").result(LONG_S)
    assert repr(names[-1].split("/")[0]) in caplog.text
    assert "resilient convert" in caplog.text
    assert [(tmp_path / name).read_text() for name in names] == ["somebody else's"] * len(names)


def test_a_new_folder_and_one_that_only_a_run_without_snapshots_used_cause_no_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "resilient"):
        for _ in range(2):
            with checkpointing(tmp_path / "url", Job({"model": nn.Linear(2, 2)}, lambda: None)) as checkpointer:
                assert checkpointer.restore() is None
    assert caplog.text == ""
