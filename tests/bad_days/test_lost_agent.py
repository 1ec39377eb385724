"""The agent dies or hangs: training goes on, the handle says so, and the next save has an agent again."""

import os
import select
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from resilient.errors import AgentLost, ResilientError, SnapshotSkipped
from tests.bad_days.conftest import Agents, Make, Trainers
from tests.bad_days.training import Training, differing, undisturbed

LONG_S = 30.0


def test_an_agent_killed_while_idle_costs_its_images_and_the_next_save_starts_another(
    checkpointer: Make, agents: Agents, tmp_path: Path
) -> None:
    training = Training()
    saving = checkpointer(tmp_path / "url", training.state, durable_every=0)
    training.run(1, 2, saving)[-1].durable("memory").result(LONG_S)
    first = agents.one()
    agents.signal(signal.SIGKILL)
    for handle in training.run(3, 4, saving):  # the first may still be handed to the dead one
        handle.durable("memory").exception(LONG_S)
    training.run(5, 5, saving)[-1].durable("memory").result(LONG_S)
    assert agents.one() != first
    assert saving.close() == []
    assert differing(training.tensors(), undisturbed(5)) == []


def test_an_agent_killed_in_mid_capture_fails_that_handle_with_agent_lost_and_nothing_else(
    checkpointer: Make, agents: Agents, tmp_path: Path, eventually: Callable[..., None]
) -> None:
    training = Training(width=512, layers=8)  # 25 MB
    saving = checkpointer(tmp_path / "url", training.state, durable_every=0)
    handles = training.run(1, 2, saving)
    handles[-1].durable("memory").result(LONG_S)
    descriptors = len(list(Path("/proc/self/fd").iterdir()))
    lost = 0
    for step, delay_s in zip((3, 6, 9), (0.0, 0.002, 0.005), strict=True):
        agent = os.pidfd_open(agents.one())
        (handle,) = training.run(step, step, saving)
        select.select([agent], [], [], delay_s)  # the moment of the kill
        signal.pidfd_send_signal(agent, signal.SIGKILL)
        os.close(agent)
        error = handle.durable("memory").exception(LONG_S)
        assert error is None or isinstance(error, AgentLost), error
        lost += error is not None
        saving.save(step + 1).durable("memory").exception(LONG_S)  # may still go to the dead one
        saving.save(step + 2).durable("memory").result(LONG_S)
    assert lost >= 1, "no kill fell into a capture: the test shows nothing"
    eventually(lambda: len(list(Path("/proc/self/fd").iterdir())) <= descriptors, "descriptors of dead agents closed")
    mapped = Path("/proc/self/maps").read_text().count("resilient-rank")
    assert 1 <= mapped <= 2 * 2, "memory of dead agents is still mapped"


def test_an_agent_killed_while_it_writes_fails_that_level_and_a_later_step_is_written(
    checkpointer: Make, agents: Agents, tmp_path: Path, eventually: Callable[..., None]
) -> None:
    training = Training(width=512, layers=8)
    url = tmp_path / "url"
    saving = checkpointer(url, training.state, durable_every=1)
    for step in range(1, 3):
        (handle,) = training.run(step, step, saving)
        handle.durable("memory").exception(LONG_S)
        agents.signal(signal.SIGKILL)
        error = handle.durable("durable").exception(LONG_S)
        assert error is None or isinstance(error, AgentLost), error
    training.run(4, 4, saving)[0].durable("durable").exception(LONG_S)
    training.run(5, 5, saving)[0].durable("durable").result(LONG_S)
    assert saving.close() == []
    eventually(lambda: agents.pids() == [], "the agent has ended, its deletions done")
    left = [path.name for path in url.rglob("*") if path.name.startswith(".") and path.name.endswith(".part")]
    assert left == [], "half-written files of dead agents are still there"


@pytest.mark.parametrize("level", ["local", "durable"])
def test_trainer_and_agent_killed_together_restore_from_disk(
    level: str, trainers: Trainers, agents: Agents, tmp_path: Path
) -> None:
    policy = {"durable_every": 1} if level == "durable" else {"durable_every": 0, "local": str(tmp_path / "local")}
    common = {"url": str(tmp_path / "url"), **policy}
    child = trainers.start("train", steps=10_000, await_level=level, **common)
    child.until_told(f"{level} 6")
    agents.signal(signal.SIGKILL)
    child.kill()
    safe = max(child.numbers(level))
    last = trainers.start("train", steps=safe + 5, **common)
    value = last.value()
    assert value["start"] >= safe
    assert last.told[0] == f"restored {value['start']} from {level}"
    assert value["digest"] == trainers.start("calm", steps=safe + 5, width=32, layers=2).value()


def test_an_agent_that_hangs_holds_the_training_up_once_and_wakes_up_harmless(
    checkpointer: Make, agents: Agents, tmp_path: Path
) -> None:
    training = Training()
    saving = checkpointer(tmp_path / "url", training.state, durable_every=0, fence_timeout_s=2.0)
    training.run(1, 2, saving)[-1].durable("memory").result(LONG_S)
    hanging = agents.one()
    agents.signal(signal.SIGSTOP)
    began = time.monotonic()
    handles = training.run(3, 12, saving)
    assert time.monotonic() - began < 2 * 2.0 + 3.0, "every step waited for the agent that hangs"
    with pytest.raises(SnapshotSkipped):
        handles[-1].captured.result(LONG_S)
    agents.signal(signal.SIGCONT)
    errors = [handle.durable("memory").exception(LONG_S) for handle in handles]
    assert all(error is None or isinstance(error, ResilientError) for error in errors)
    training.run(13, 13, saving)
    training.run(14, 14, saving)[-1].durable("memory").result(LONG_S)
    assert agents.one() == hanging
    assert differing(training.tensors(), undisturbed(14)) == []
    again = Training(seed=9)
    saving.close(keep_memory=True)
    other = checkpointer(tmp_path / "url", again.state, durable_every=0)
    assert other.restore() == 14
    assert differing(again.tensors(), undisturbed(14)) == []


def test_closing_does_not_wait_for_ever_for_an_agent_that_hangs(
    checkpointer: Make, agents: Agents, tmp_path: Path
) -> None:
    training = Training()
    saving = checkpointer(tmp_path / "url", training.state, durable_every=0, write_timeout_s=1.0, fence_timeout_s=1.0)
    training.run(1, 1, saving)
    agents.signal(signal.SIGSTOP)
    began = time.monotonic()
    assert any("still being written" in problem or "answer" in problem for problem in saving.close())
    assert time.monotonic() - began < 15.0


def test_a_node_on_which_no_agent_can_start_costs_little_and_is_tried_again(
    checkpointer: Make, agents: Agents, tmp_path: Path, eventually: Callable[..., None]
) -> None:
    training = Training()
    saving = checkpointer(tmp_path / "url", training.state, durable_every=0)
    training.run(1, 1, saving)[-1].durable("memory").result(LONG_S)
    agents.signal(signal.SIGKILL)
    (folder,) = agents.runtime_dir.iterdir()
    shutil.rmtree(folder)
    folder.write_text("in the way")
    began = time.monotonic()
    handles = training.run(2, 20, saving)
    assert all(isinstance(handle.durable("memory").exception(LONG_S), ResilientError) for handle in handles)
    assert time.monotonic() - began < 5.0
    folder.unlink()
    steps = iter(range(21, 10_000))

    def safe() -> bool:
        (handle,) = training.run(step := next(steps), step, saving)
        return handle.durable("memory").exception(LONG_S) is None

    eventually(safe, "a save finds an agent again")


def test_a_step_that_is_saved_again_settles_the_handle_of_the_first_attempt(checkpointer: Make, tmp_path: Path) -> None:
    training = Training(width=512, layers=8)
    saving = checkpointer(tmp_path / "url", training.state, durable_every=0)
    handles = [saving.save(step) for step in (7, 8, 7, 7)]
    assert handles[-1].durable("memory").result(LONG_S) == 7  # and no echo of an earlier attempt fails it
    errors = [handle.durable("memory").exception(LONG_S) for handle in handles[:-1]]
    assert all(error is None or isinstance(error, SnapshotSkipped) for error in errors)
