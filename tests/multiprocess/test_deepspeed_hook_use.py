"""What programs do with an engine of DeepSpeed whose checkpoints are ours: names, options, bad input, preemption."""

import shutil
import tempfile

import pytest

from tests.multiprocess import deepspeed_hook_use_jobs as jobs
from tests.multiprocess.deepspeed_hook_use_jobs import Facts
from tests.multiprocess.ranks import run

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Facts]:
    """Of rank 0 of two; rank 1 has found the same."""
    sockets = tempfile.mkdtemp(prefix="rs-")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RESILIENT_RUNTIME_DIR", sockets)
        first, second = run(jobs.run_all, 2, str(tmp_path_factory.mktemp("use")), deadline_s=240)
    shutil.rmtree(sockets, ignore_errors=True)
    assert {name: one for name, one in second.items() if name != "refused"} == {
        name: one for name, one in first.items() if name != "refused"
    }
    found: dict[str, Facts] = first
    return found


def test_a_job_moves_over_from_deepspeeds_own_checkpoint_and_may_go_back_to_it(facts: dict[str, Facts]) -> None:
    found = facts["moves_over"]
    assert found["loaded"] == ["global_step2", {"by": "deepspeed"}]
    assert (found["same"], found["steps"]) == (True, 2)
    assert found["later"] == ["global_step3", {"by": "us"}]
    assert found["named"] == ["global_step2", {"by": "deepspeed"}]
    assert found["back"]


@pytest.mark.parametrize("stage", ["0", "1"])
def test_the_loss_scale_and_skipped_steps_move_over_too(facts: dict[str, Facts], stage: str) -> None:
    theirs, ours = facts["loss_scale_moves_over"][stage]
    assert ours == theirs
    assert (theirs[1], theirs[3]) == (1, 2)
    assert theirs[2] != theirs[0]


def test_latest_waits_until_the_snapshot_is_durable_on_all_nodes(facts: dict[str, Facts]) -> None:
    found = facts["a_rank_is_late"]
    assert found["parts"] == 1
    assert found["told"] == ["global_step1", "global_step1", "global_step2"]
    assert found["problems"] == []


def test_accelerate_trains_saves_and_goes_on(facts: dict[str, Facts]) -> None:
    found = facts["with_accelerate"]
    assert found["ends"] == [[None, 2], ["global_step2", 4]]


def test_the_weights_can_be_had_alone_and_the_schedule_left(facts: dict[str, Facts]) -> None:
    found = facts["weights_alone"]
    assert found["path"] == "global_step2"
    assert found["weights"]
    assert found["others"] == [0, 0, [0, 0]]
    assert found["schedule"] == [2, 0]


def test_snapshots_at_every_step_need_no_call_and_those_asked_for_are_durable(facts: dict[str, Facts]) -> None:
    found = facts["every_step"]
    assert found["saves"] == 5  # four by themselves, and step 2 once more with what the program wants to find again
    assert found["newest"] == ["global_step4", {"at": 2}]
    assert found["same"]
    assert found["latest"] == "global_step2"
    assert found["durable"] == ["step_00000002"]
    assert found["named"] == ["global_step2", {"at": 2}, "durable"]


def test_a_step_that_was_saved_by_itself_may_be_asked_for_again_at_once(facts: dict[str, Facts]) -> None:
    assert facts["asked_often"] == {"problems": [], "latest": "global_step12", "durable": list(range(1, 13))}


def test_one_step_may_have_several_names_and_destroy_waits_until_it_is_safe(facts: dict[str, Facts]) -> None:
    found = facts["names"]
    assert found["saves"] == 1
    assert found["latest"] == [False, "best"]
    assert found["best"] == "best"
    assert found["replaced"] == ["_take_model_step", "destroy", "load_checkpoint", "save_checkpoint"]
    assert found["after"] == []
    assert found["closed"] == "UsageError: save(2): the Checkpointer is closed"


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("untrained", "the engine has no optimizer"),
        ("without", 'UsageError: the block "resilient" of the DeepSpeed configuration is missing'),
        ("unknown", "unknown key 'every_steps', did you mean 'every_step'"),
        ("other", "no attribute 'real_dp_process_group'); DeepSpeed 0.99.1 is not tested with this library"),
        ("twice", "attached already"),
        ("taken", "this name is the engine's"),
        ("client", "StateError: 'client_state/job/file'"),
        ("folder", "save_dir must be a non-empty string"),
        ("custom", "load such a checkpoint before you attach"),
        ("precision", "is torch.float32 (5, 7) in the snapshot and torch.bfloat16 (5, 7) in this job"),
    ],
)
def test_bad_input_is_refused_by_name(facts: dict[str, Facts], what: str, said: str) -> None:
    assert said in facts["refused"][what]


def test_where_nothing_is_nothing_is_loaded_and_a_refused_engine_is_as_it_was(facts: dict[str, Facts]) -> None:
    assert facts["refused"]["nothing"] == (None, None)
    assert facts["refused"]["untouched"]


def test_a_job_that_is_to_stop_makes_its_step_durable_and_goes_on_there(facts: dict[str, Facts]) -> None:
    found = facts["preempted"]
    step, code = found["stopped"]
    assert code == 75
    assert found["durable"] == [step]
    assert (found["steps"], found["path"], found["same"]) == (step, f"global_step{step}", True)
    assert found["levels"] == {"memory"}
    assert found["called"][0] == found["called"][1]  # a stop at a call leaves its name
