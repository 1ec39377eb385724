"""Two jobs on one url: the second is refused, the first is unharmed, and a dead one stands in nobody's way."""

import time
from pathlib import Path

import pytest

from resilient.errors import LayoutMismatch, LevelFailed, NotACheckpoint, UrlInUse
from tests.bad_days.conftest import Agents, Make, Trainers
from tests.bad_days.training import Training, differing, undisturbed

LONG_S = 30.0


def test_a_second_job_is_refused_while_the_first_lives_and_the_first_is_unharmed(
    checkpointer: Make, tmp_path: Path
) -> None:
    training, other = Training(), Training()
    saving = checkpointer(tmp_path / "url", training.state, durable_every=1, run_id="first")
    assert training.run(1, 1, saving)[-1].durable("durable").result(LONG_S) == 1
    with pytest.raises(UrlInUse, match=r"'first'"):
        checkpointer(tmp_path / "url", other.state, durable_every=1, run_id="second")
    assert training.run(2, 2, saving)[-1].durable("durable").result(LONG_S) == 2
    assert saving.close() == []


def test_a_second_process_of_the_same_run_is_refused_while_the_first_lives(
    checkpointer: Make, trainers: Trainers, tmp_path: Path
) -> None:
    child = trainers.start("hold", url=str(tmp_path / "url"), durable_every=1)
    child.until_told("holding")
    with pytest.raises(UrlInUse, match=str(child.pid)):
        checkpointer(tmp_path / "url", Training().state, durable_every=1)
    assert child.lives


def test_a_second_job_of_the_same_run_on_another_node_is_refused_and_succeeds_the_first_once_that_is_dead(
    checkpointer: Make, trainers: Trainers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, settings = tmp_path / "url", {"durable_every": 1, "run_id": "same"}
    monkeypatch.setenv("RESILIENT_NODE", "first")
    child = trainers.start("hold", url=str(url), **settings)
    child.until_told("holding")
    monkeypatch.setenv("RESILIENT_NODE", "second")
    training = Training(seed=6)
    began = time.monotonic()
    with pytest.raises(UrlInUse, match=r"'same' .*second job with the same run id"):
        checkpointer(url, training.state, **settings)
    assert time.monotonic() - began < 20.0, "it took longer than a beat and a start"
    assert child.lives
    child.kill()
    began = time.monotonic()
    loading = checkpointer(url, training.state, **settings)
    assert time.monotonic() - began < 8.0, "nobody was to be waited for"
    assert loading.restore() == 1


@pytest.mark.parametrize("killed", ["trainer", "both"])
@pytest.mark.parametrize("run_id", ["first", "second"])
def test_a_killed_job_is_succeeded_at_once(
    killed: str, run_id: str, checkpointer: Make, trainers: Trainers, agents: Agents, tmp_path: Path
) -> None:
    child = trainers.start("hold", url=str(tmp_path / "url"), durable_every=1, run_id="first")
    child.until_told("holding")
    child.kill()
    if killed == "both":
        agents.signal(9)
    began = time.monotonic()
    training = Training(seed=6)
    loading = checkpointer(tmp_path / "url", training.state, durable_every=1, run_id=run_id)
    assert loading.restore() == 1
    assert time.monotonic() - began < 10.0
    assert loading.last_restore is not None
    own = (killed, run_id) == ("trainer", "first")
    assert loading.last_restore.levels == {0: "memory" if own else "durable"}, "another run's memory"
    assert training.run(2, 2, loading)[-1].durable("durable").result(LONG_S) == 2


def test_memory_goes_to_no_other_run_and_to_no_other_model(
    checkpointer: Make, trainers: Trainers, tmp_path: Path
) -> None:
    child = trainers.start("train", url=str(tmp_path / "url"), steps=10_000, durable_every=0, run_id="first")
    child.until_told("complete 3")
    child.kill()
    training = Training(seed=6)
    before = training.tensors()
    other_run = checkpointer(tmp_path / "url", training.state, durable_every=0, run_id="second")
    assert other_run.restore() is None
    assert differing(training.tensors(), before) == []
    other_run.close()
    larger = Training(width=48, seed=6)
    before = larger.tensors()
    other_model = checkpointer(tmp_path / "url", larger.state, durable_every=0, run_id="first")
    with pytest.raises(LayoutMismatch, match="'model.0.weight'"):
        other_model.restore()
    assert differing(larger.tensors(), before) == []
    other_model.close(keep_memory=True)
    again = Training(seed=8)
    loading = checkpointer(tmp_path / "url", again.state, durable_every=0, run_id="first")
    step = loading.restore()
    assert step is not None
    assert step >= 3, "the memory is gone, although it fits this job"
    assert differing(again.tensors(), undisturbed(step)) == []


def test_a_url_that_is_a_file_is_refused_and_left_as_it_is(checkpointer: Make, tmp_path: Path) -> None:
    (tmp_path / "url").write_text("my thesis")
    with pytest.raises((NotACheckpoint, LevelFailed), match="is a file"):
        checkpointer(tmp_path / "url", Training().state)
    assert (tmp_path / "url").read_text() == "my thesis"
