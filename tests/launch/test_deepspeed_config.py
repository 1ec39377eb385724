"""The block of a DeepSpeed configuration, the names in a program's folder, and the choice of what to load."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from resilient.errors import DamagedImage, PolicyError, UsageError
from resilient.launch.deepspeed.config import HookConfig, check_version, no_engine
from resilient.launch.deepspeed.folder import Looked, Notes, Tag, look
from resilient.launch.deepspeed.loading import choose

URL = "/snapshots/run"
Eventually = Callable[..., None]


def test_a_url_is_all_that_the_block_needs_and_every_checkpoint_is_then_durable() -> None:
    config = HookConfig.of({"resilient": {"url": URL}, "bf16": {"enabled": True}})
    assert (config.url, config.every_step, config.policy.durable_every) == (URL, False, 1)


def test_with_snapshots_at_every_step_the_policy_says_which_are_durable() -> None:
    config = HookConfig.of({"resilient": {"url": URL, "every_step": True}})
    assert (config.every_step, config.policy.durable_every) == (True, 100)
    told = HookConfig.of({"resilient": {"url": URL, "every_step": True, "policy": {"durable_every": 500}}})
    assert told.policy.durable_every == 500


@pytest.mark.parametrize(
    ("block", "said"),
    [
        ({}, "no url"),
        ({"url": ""}, "url ''"),
        ({"url": URL, "every_steps": True}, "unknown key 'every_steps', did you mean 'every_step'"),
        ({"url": URL, "polcy": {}}, "did you mean 'policy'"),
        ({"url": URL, "every_step": 1}, "every_step 1: give true or false"),
        ({"url": URL, "policy": 500}, "give an object"),
        (True, 'the block "resilient" of the DeepSpeed configuration is True'),
        (None, "is missing"),
    ],
)
def test_a_block_that_cannot_be_meant_is_refused_with_what_to_give_instead(block: Any, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        HookConfig.of({} if block is None else {"resilient": block})


def test_an_unknown_key_of_the_policy_is_named_with_the_nearest_one() -> None:
    with pytest.raises(PolicyError, match="durable_evry.*durable_every"):
        HookConfig.of({"resilient": {"url": URL, "policy": {"durable_evry": 5}}})


def test_a_version_that_is_not_tested_is_named_with_the_one_to_install() -> None:
    assert check_version("0.19.8") is None
    said = check_version("0.16.2") or ""
    assert "0.16.2" in said
    assert "pip install 'torch-resilient[deepspeed]'" in said


def test_an_engine_of_another_version_is_not_taken_for_something_else() -> None:
    error = no_engine("DeepSpeedEngine", ["_take_model_step"], "0.20.1")
    assert "it has no _take_model_step; DeepSpeed 0.20.1 is not tested" in str(error)
    assert str(no_engine("Linear", ["destroy"], "0.19.8")).endswith("it has no destroy")


def test_without_deepspeed_the_message_says_what_to_install() -> None:
    hidden = """
import sys
sys.modules["deepspeed"] = None
from resilient.launch.deepspeed import initialize
try:
    initialize(config={})
except Exception as error:
    print(type(error).__name__, error)
"""
    done = subprocess.run([sys.executable, "-c", hidden], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.startswith("UsageError DeepSpeed cannot be imported")
    assert "pip install 'torch-resilient[deepspeed]'" in done.stdout


def test_naming_the_door_imports_neither_torch_nor_deepspeed() -> None:
    asked = "import resilient.launch.deepspeed, sys; print([m for m in ('torch', 'deepspeed') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "[]"


def test_something_that_is_no_engine_is_refused() -> None:
    from resilient.launch.deepspeed import attach

    with pytest.raises(UsageError, match=r"attach\(dict\): this is no engine"):
        attach({})


# ---- names in the program's folder


def test_latest_names_what_is_safe_and_a_tag_says_which_step_it_is(tmp_path: Path) -> None:
    folder = str(tmp_path / "out")
    notes = Notes(URL)
    first = notes.began(folder, "global_step10", 10, durable=True)
    second = notes.began(folder, "best", 20, durable=True)
    notes.safe(folder, "global_step10", 10, first)
    notes.close()
    seen = look(folder, None)
    assert seen.tags == {"global_step10": Tag(url=URL, step=10), "best": Tag(url=URL, step=20)}
    assert (tmp_path / "out/latest").read_text() == "global_step10"
    assert second > first


def test_latest_never_goes_back_to_an_older_one_that_was_slow(tmp_path: Path) -> None:
    notes = Notes(URL)
    numbers = [notes.began(str(tmp_path), f"global_step{step}", step, durable=True) for step in (10, 20)]
    for step, number in ((20, numbers[1]), (10, numbers[0])):
        notes.safe(str(tmp_path), f"global_step{step}", step, number)
    notes.close()
    assert (tmp_path / "latest").read_text() == "global_step20"


def test_of_snapshots_in_memory_alone_only_the_last_few_are_named(tmp_path: Path) -> None:
    notes = Notes(URL)
    notes.began(str(tmp_path), "global_step1", 1, durable=True)
    for step in range(2, 30):
        notes.began(str(tmp_path), f"global_step{step}", step, durable=False)
    notes.close()
    steps = sorted(one.step for one in look(str(tmp_path), None).tags.values())
    assert steps == [1, 26, 27, 28, 29]
    assert sorted(one.name for one in tmp_path.iterdir()) == sorted(f"global_step{step}" for step in steps)


def test_a_tag_of_ours_that_is_not_whole_is_named(tmp_path: Path) -> None:
    (tmp_path / "global_step3").mkdir()
    (tmp_path / "global_step3/resilient.json").write_text(json.dumps({"format": "resilient.tag", "step": 3}))
    with pytest.raises(DamagedImage, match="global_step3/resilient.json"):
        look(str(tmp_path), None)


def test_a_checkpoint_of_deepspeeds_own_is_seen_by_its_name_or_as_the_latest(tmp_path: Path) -> None:
    (tmp_path / "global_step7").mkdir()
    (tmp_path / "latest").write_text("global_step7\n")
    assert look(str(tmp_path), None) == Looked(foreign="global_step7")
    assert look(str(tmp_path), "global_step7").foreign == "global_step7"
    assert look(str(tmp_path), "global_step8").foreign is None
    assert look(str(tmp_path / "nowhere"), None) == Looked()


# ---- what is loaded

OURS = {"global_step10": Tag(url=URL, step=10), "best": Tag(url=URL, step=8)}


def test_without_a_tag_the_newest_of_the_snapshots_that_the_folder_names_is_loaded() -> None:
    chosen = choose("out", None, Looked(tags=OURS), URL, every_step=False)
    assert (chosen.steps, chosen.other_url) == (frozenset({8, 10}), None)


def test_with_snapshots_at_every_step_those_without_a_name_count_too() -> None:
    assert choose("out", None, Looked(tags=OURS), URL, every_step=True).steps is None


def test_a_folder_that_names_none_leaves_the_newest_of_the_run_and_then_deepspeeds_own() -> None:
    chosen = choose("out", None, Looked(foreign="global_step7"), URL, every_step=False)
    assert (chosen.steps, chosen.other_url) == (None, "out/global_step7")


def test_a_tag_stands_for_one_step() -> None:
    chosen = choose("out", "best", Looked(tags=OURS, foreign="global_step7"), URL, every_step=True)
    assert (chosen.steps, chosen.other_url) == (frozenset({8}), None)


def test_a_tag_of_another_url_is_loaded_from_there() -> None:
    looked = Looked(tags={"best": Tag(url="/elsewhere", step=8)})
    chosen = choose("out", "best", looked, URL, every_step=False)
    assert (chosen.steps, chosen.other_url, chosen.other_step) == (frozenset(), "/elsewhere", 8)


def test_a_tag_whose_folder_went_with_its_machine_is_found_by_its_step() -> None:
    assert choose("out", "global_step12", Looked(), URL, every_step=False).steps == frozenset({12})
    assert choose("out", "lost", Looked(), URL, every_step=False).steps == frozenset()
