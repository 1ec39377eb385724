"""Little memory, and a long time: a clear refusal, and nothing that grows."""

import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from resilient.errors import OverBudget
from tests.bad_days.conftest import Agents, Make
from tests.bad_days.training import Training, differing, undisturbed

LONG_S = 30.0


def test_a_memory_budget_that_is_too_small_fails_each_handle_by_name_and_training_goes_on(
    checkpointer: Make, tmp_path: Path
) -> None:
    training = Training()
    saving = checkpointer(tmp_path / "url", training.state, durable_every=2, memory_budget=50_000)
    handles = training.run(1, 3, saving)
    for handle in handles:
        with pytest.raises(OverBudget, match=r"memory_budget"):
            handle.captured.result(LONG_S)
        assert isinstance(handle.durable("memory").exception(LONG_S), OverBudget)
    assert isinstance(handles[1].durable("durable").exception(LONG_S), OverBudget)
    assert differing(training.tensors(), undisturbed(3)) == []
    assert any("memory_budget" in problem for problem in saving.close())


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.parametrize("width", [32, 320], ids=["small images", "images in huge pages"])
def test_a_thousand_saves_leave_memory_descriptors_threads_and_shared_memory_as_they_were(
    width: int, checkpointer: Make, agents: Agents, tmp_path: Path, eventually: Callable[..., None]
) -> None:
    training = Training(width)
    saving = checkpointer(
        tmp_path / "url", training.state, durable_every=100, local=str(tmp_path / "local"), local_every=50
    )
    shared = set(os.listdir("/dev/shm"))

    def figures(first: int, last: int) -> tuple[dict[str, int], int, int]:
        handle = training.run(first, last, saving)[-1]
        assert handle.durable("durable").result(LONG_S) == last
        status = saving._link.client().status()
        counted = {key: len(status[key]) if key == "slots" else status[key] for key in ("slots", "bytes", "snapshots")}
        counted["agent's descriptors"] = status["fds"]
        counted["agent's threads"] = status["threads"]
        counted["descriptors"] = len(os.listdir("/proc/self/fd"))
        counted["threads"] = threading.active_count()
        return counted, status["resident_bytes"], resident_bytes()

    begin, agent_begin, own_begin = figures(1, 200)
    end, agent_end, own_end = figures(201, 1200)
    grown = {key: (begin[key], end[key]) for key in begin if end[key] > begin[key] + 2}
    assert grown == {}
    assert agent_end - agent_begin < 4 << 20
    assert own_end - own_begin < 8 << 20
    assert set(os.listdir("/dev/shm")) <= shared
    assert saving.close() == []
    assert saving.statistics.failures == 0
    eventually(lambda: agents.pids() == [], "the agent has ended, its deletions done")
    assert len(list((tmp_path / "url").glob("step_*"))) == 2
    assert len(list((tmp_path / "local").glob("step_*"))) == 2
