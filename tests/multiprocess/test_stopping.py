"""Real ranks that are told to stop: one of them hears it, all stop after the same step, and come back there."""

import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from resilient import Checkpointer, Policy
from tests.multiprocess import distributed_jobs as jobs
from tests.multiprocess import stopping_jobs as stopping
from tests.multiprocess.ranks import run, scratch

pytestmark = pytest.mark.usefixtures("runtime_dir")

SAFE, REGROUP = 75, 76


@pytest.fixture
def folder() -> str:
    made = scratch("facts")
    made.mkdir()
    return str(made)


@pytest.mark.parametrize("nodes", [("a", "a", "a"), ("a", "b", "b")], ids=["one node", "two nodes"])
def test_a_signal_to_one_rank_makes_one_step_durable_on_all(
    tmp_path: Path, folder: str, nodes: tuple[str, ...]
) -> None:
    url = str(tmp_path / "run")
    ends = run(stopping.stopped_by, 3, jobs.ddp, url, folder, signal.SIGUSR1, 1, nodes=nodes)
    assert len(set(ends)) == 1
    step, code = ends[0]
    assert step > 7
    assert code == SAFE
    assert len(list(Path(url, f"step_{step:08}").glob("*.safetensors"))) == 3
    # The machines are gone, and their agents with all memory; others start the job again.
    found = run(stopping.come_back, 3, jobs.ddp, url, folder, nodes=("x", "y", "z"))
    assert found == [(step, ["durable"], [])] * 3


def test_a_job_that_is_regrouped_goes_on_from_memory(tmp_path: Path, folder: str) -> None:
    url = str(tmp_path / "run")
    ends = run(stopping.stopped_by, 2, jobs.fsdp, url, folder, signal.SIGUSR2, 0)
    step, code = ends[0]
    assert ends[1] == ends[0]
    assert code == REGROUP
    assert not list(Path(url).glob("step_*"))
    assert run(stopping.come_back, 2, jobs.fsdp, url, folder) == [(step, ["memory"], [])] * 2


@pytest.mark.parametrize("nodes", [("a", "a"), ("a", "b")], ids=["one node", "two nodes"])
def test_where_a_step_is_longer_than_the_grace_the_one_before_is_made_durable(
    tmp_path: Path, folder: str, nodes: tuple[str, ...]
) -> None:
    url = str(tmp_path / "run")
    ends = run(stopping.stopped_in_a_long_step, 2, jobs.fsdp, url, folder, nodes=nodes)
    assert ends == [(5, SAFE)] * 2
    found = run(stopping.come_back, 2, jobs.fsdp, url, folder, nodes=("x", "y"))
    assert found == [(5, ["durable"], [])] * 2


@pytest.mark.parametrize(("durable", "code"), [(True, SAFE), (False, REGROUP)])
def test_a_program_can_ask_for_it_by_itself(tmp_path: Path, durable: bool, code: int) -> None:
    ends = run(stopping.ask_for_it, 2, jobs.ddp, str(tmp_path / "run"), durable)
    assert len(set(ends)) == 1
    assert ends[0][1] == code
    assert ends[0][0] % 10 == 0


def test_a_grace_time_shorter_than_the_measured_flush_is_warned_of_in_advance_and_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, eventually: Callable[..., None]
) -> None:
    policy = Policy(durable_every=1, grace_s=0.001)  # no disk is as fast as that
    with Checkpointer(str(tmp_path / "run"), {"weights": torch.zeros(1 << 18)}, policy) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step).durable("durable").result(60)
        eventually(lambda: "but grace_s is 0.001: a preemption may cost steps" in caplog.text, "the warning", 30)
        checkpointer.close()
    assert caplog.text.count("but grace_s is") == 1


def test_a_step_that_cannot_be_made_durable_is_told_of_and_the_job_ends_all_the_same(tmp_path: Path) -> None:
    url = tmp_path / "run"
    ends = run(stopping.stop_into_a_url_that_fails, 2, jobs.ddp, str(url))
    assert len({step for step, _ in ends}) == 1
    assert all("is not safe at level durable" in told for _, told in ends)
    url.unlink()
    shutil.rmtree(f"{url}-away")
