"""DCP's reader and writer over our levels: `dcp.save`, `dcp.async_save` and `dcp.load` of real ranks."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from resilient.checkpoint.formats.registry import open_source
from resilient.checkpoint.formats.source import Reference
from resilient.errors import Preempted, UsageError
from resilient.launch.dcp import ResilientReader, ResilientWriter
from resilient.launch.dcp.reader import decide
from resilient.launch.dcp.steps import step_of
from resilient.policy import Policy
from tests.multiprocess import dcp_plugin_jobs as jobs
from tests.multiprocess.ranks import run

pytestmark = pytest.mark.usefixtures("runtime_dir")
OWN = "more.loader_"


@pytest.mark.parametrize(("kind", "ranks", "other", "others"), [("fsdp", 2, "fsdp", 3), ("hsdp", 4, "ddp", 2)])
def test_what_is_saved_at_once_behind_the_training_and_lazily_is_loaded_into_any_mesh(
    tmp_path: Path, kind: str, ranks: int, other: str, others: int
) -> None:
    url = str(tmp_path / "run")
    saved = run(jobs.save, ranks, url, kind)
    for rank, loaded in enumerate(run(jobs.load, ranks, url, kind, [None, 1, 2, 3])):  # the newest is in memory
        newest, *older = saved[rank][::-1]
        assert loaded == [newest, *older[::-1]]
    for loaded in run(jobs.load_model_only, others, url, other):
        assert loaded == {name: saved[0][3][name] for name in loaded}
        assert len(loaded) > 4
    with open_source(Reference(url=url, step=4)) as source:
        assert not [name for name in source.catalog.own if not name.startswith(OWN)], "replicas are stored once"


def test_a_snapshot_of_a_checkpointer_is_loaded_with_its_optimizer_into_another_mesh(tmp_path: Path) -> None:
    for saved, loaded in run(jobs.checkpoint_and_load, 2, str(tmp_path), "fsdp", "ddp"):
        assert {name: loaded[name] for name in saved if name in loaded} == loaded
        assert any(name.endswith("exp_avg") for name in loaded)


def test_a_rank_that_is_killed_in_a_save_leaves_the_one_before(tmp_path: Path) -> None:
    assert run(jobs.die_in_a_save, 2, str(tmp_path)) == [None, None]
    for loaded in run(jobs.load, 2, str(tmp_path), "plain", [None]):
        assert loaded[0]["train.step"] == 1


def test_damage_and_a_step_that_is_not_there_are_refused_by_name_on_all_ranks(tmp_path: Path) -> None:
    for damaged, missing in run(jobs.fail_to_load, 2, str(tmp_path)):
        assert "rank_00001-of-00002.safetensors" in damaged
        assert "not as they were sealed" in damaged
        assert "has no complete step 7" in missing


@pytest.mark.parametrize(("what", "told"), [("code", "'dcp/hook' cannot be saved"), ("step", "which step it is")])
def test_what_cannot_be_saved_on_one_rank_is_told_on_all(tmp_path: Path, what: str, told: str) -> None:
    for message in run(jobs.refuse_to_save, 2, str(tmp_path), what):
        assert told in message
    assert not list(tmp_path.glob("step_*"))


@pytest.mark.filterwarnings("ignore:torch.distributed is")
def test_a_single_process_saves_and_loads_without_a_group(tmp_path: Path) -> None:
    state: dict[str, Any] = {
        "weight": torch.arange(6.0).view(2, 3),
        "half": torch.ones(3, dtype=torch.bfloat16),
        "step": 5,
    }
    writer = ResilientWriter(str(tmp_path), Policy(durable_every=1), until="memory")
    for step in (4, 5):
        dcp.save({**state, "step": step}, storage_writer=writer, checkpoint_id=str(step))
        _assert_loaded(tmp_path, state, step)  # from memory, while the writer goes on
    writer.close()
    _assert_loaded(tmp_path, state, 5)


@pytest.mark.filterwarnings("ignore:torch.distributed is")
def test_a_step_that_is_only_in_memory_is_loaded_from_there(tmp_path: Path) -> None:
    state = {"weight": torch.arange(6.0).view(2, 3), "half": torch.ones(3, dtype=torch.bfloat16), "step": 3}
    writer = ResilientWriter(str(tmp_path), Policy(durable_every=0, agent_idle_s=60))
    dcp.save(state, storage_writer=writer, checkpoint_id="3")
    assert not list(tmp_path.glob("step_*"))
    _assert_loaded(tmp_path, state, 3)
    writer.checkpointer().close(keep_memory=True)
    _assert_loaded(tmp_path, state, 3)


def _assert_loaded(url: Path, state: dict[str, Any], step: int) -> None:
    into: dict[str, Any] = {"weight": torch.zeros(3, 2).t(), "half": torch.zeros(3, dtype=torch.bfloat16), "step": 0}
    dcp.load(into, storage_reader=ResilientReader(str(url)))
    assert torch.equal(into["weight"], state["weight"])
    assert torch.equal(into["half"], state["half"])
    assert into["step"] == step


@pytest.mark.filterwarnings("ignore:torch.distributed is")
def test_a_checkpoint_that_dcp_wrote_itself_is_loaded_too_and_one_that_is_not_there_is_missed(tmp_path: Path) -> None:
    dcp.save({"model": {"weight": torch.arange(4.0)}, "step": 3}, checkpoint_id=str(tmp_path / "old"))
    into: dict[str, Any] = {"model": {"weight": torch.zeros(4)}, "step": 0}
    dcp.load(into, storage_reader=ResilientReader(str(tmp_path / "old")))
    assert (into["model"]["weight"].tolist(), into["step"]) == ([0.0, 1.0, 2.0, 3.0], 3)
    with pytest.raises(BaseException, match="nowhere"):
        dcp.load(into, storage_reader=ResilientReader(str(tmp_path / "nowhere")))


def _save_until_stopped(url: str, behind: bool) -> tuple[int | str | None, int]:
    writer = ResilientWriter(url, jobs.POLICY, until="memory")
    group: Any = dist.new_group(backend="gloo")
    if dist.get_rank() == 1:
        writer.checkpointer().request_stop()
    else:
        writer.checkpointer()
    try:
        for step in range(1, 2000):
            state = {"weight": torch.full((4,), float(step))}
            if behind:
                written: Any = dcp.async_save(
                    state, storage_writer=writer, checkpoint_id=str(step), process_group=group
                )
                written.result(60)
            else:
                dcp.save(state, storage_writer=writer, checkpoint_id=str(step))
            writer.exit_if_stopped()
    except Preempted as stopped:
        return stopped.code, stopped.step
    return None, 0


@pytest.mark.parametrize("behind", [False, True])
def test_a_request_to_stop_ends_all_ranks_after_the_same_checkpoint(tmp_path: Path, behind: bool) -> None:
    (code, step), other = run(_save_until_stopped, 2, str(tmp_path), behind)
    assert other == (code, step)
    assert code == Preempted.SAFE
    assert len(list((tmp_path / f"step_{step:08d}").glob("rank_*.json"))) == 2


def test_a_checkpoint_id_says_the_step() -> None:
    assert [step_of(one) for one in (3, "3", "step-30", "outputs/checkpoint/step_100/", Path("x/7"))] == [
        3,
        3,
        30,
        100,
        7,
    ]
    for wrong in (None, "", "newest", -1, True, 1.5):
        with pytest.raises(UsageError, match="which step"):
            step_of(wrong)
    with pytest.raises(UsageError, match="until"):
        ResilientWriter("/tmp/run", until="disk")
    with pytest.raises(UsageError, match="give the url"):
        ResilientReader("")


def test_the_newest_step_is_taken_from_memory_only_where_all_nodes_have_it() -> None:
    assert decide(None, [{4, 5}, {4, 5}], {4}).level == "memory"
    assert decide(None, [{4, 5}, {4}], {4}).step == 4
    assert decide(None, [{5}, set()], {4}) == decide(None, [set(), set()], {4})
    assert (decide(4, [{5}, {5}], {4}).level, decide(5, [{5}, {5}], {4}).level) == ("durable", "memory")
    assert decide(None, [set()], set()).level == "elsewhere"
