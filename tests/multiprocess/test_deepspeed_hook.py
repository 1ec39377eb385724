"""Real DeepSpeed with checkpoints of ours: killed at any step it goes on bit for bit, at any size and ZeRO stage."""

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from resilient.checkpoint.formats.registry import open_source
from resilient.checkpoint.formats.source import Reference
from tests.multiprocess import deepspeed_hook_jobs as jobs
from tests.multiprocess.deepspeed_hook_jobs import Resumed, Way
from tests.multiprocess.deepspeed_jobs import SAVED_AT, Live
from tests.multiprocess.ranks import run
from tests.multiprocess.test_deepspeed_formats import _check_equal, _check_same, _whole

pytestmark = pytest.mark.timeout(400)  # the fixtures run many jobs at once

Eventually = Callable[..., None]

WAYS = [
    Way(stage=0, dtype="bfloat16"),
    Way(stage=1, dtype="bfloat16"),
    Way(stage=2, dtype="float32", optimizer="rmsprop"),
    Way(stage=3, dtype="bfloat16"),
    Way(stage=3, dtype="float32", optimizer="sgd"),
    *(Way(stage=stage, dtype="float16") for stage in range(4)),
    Way(stage=0, dtype="float16", optimizer="fused"),
    Way(stage=1, dtype="bfloat16", optimizer="adamw.accumulated"),
    Way(stage=2, dtype="bfloat16", blocks=jobs.OFFLOAD),
    Way(stage=3, dtype="bfloat16", blocks=jobs.OFFLOAD_ALL),
]
BY_NAME = {way.name: way for way in WAYS}
PLAIN = Way(stage=0, dtype="float32", optimizer="rmsprop")
OTHERS = [
    (BY_NAME["zero1-bfloat16-adamw"], BY_NAME["zero3-bfloat16-adamw"]),
    (BY_NAME["zero3-bfloat16-adamw"], BY_NAME["zero0-bfloat16-adamw"]),
    (BY_NAME["zero0-bfloat16-adamw"], BY_NAME["zero2-bfloat16-adamw-offload"]),
    (BY_NAME["zero2-float32-rmsprop"], PLAIN),
    (BY_NAME["zero0-float16-fused"], BY_NAME["zero3-float16-adamw"]),
    (BY_NAME["zero1-float16-adamw"], BY_NAME["zero0-float16-fused"]),
]
OF_ONE = [(way, BY_NAME["zero3-bfloat16-adamw"] if way.name == "zero1-bfloat16-adamw" else way) for way in WAYS]


@dataclass(frozen=True, slots=True)
class Outcome:
    """Where the killed job has saved, and what became of loading it."""

    folder: Path
    same: Mapping[str, list[Resumed]]
    other: list[list[Resumed]]
    of_one: list[list[Resumed]]

    def live(self, way: Way, step: int = SAVED_AT) -> Live:
        found: Live = torch.load(self.folder / way.name / f"live_{step}.pt", weights_only=True)
        return found

    def after(self, way: Way) -> Any:
        return torch.load(self.folder / way.name / "after.pt", weights_only=True)


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Outcome]:
    """All that needs ranks, in three worlds: to import DeepSpeed takes longer than all the rest."""
    folder = tmp_path_factory.mktemp("hook")
    sockets = tempfile.mkdtemp(prefix="rs-")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RESILIENT_RUNTIME_DIR", sockets)
        assert run(jobs.train_and_die, 2, str(folder), WAYS, deadline_s=240) == [None, None]
        same = run(jobs.resume_all, 2, str(folder), [*((way, way) for way in WAYS), *OTHERS], True, deadline_s=240)
        of_one = run(jobs.resume_all, 1, str(folder), OF_ONE, False, deadline_s=240)
        yield Outcome(
            folder,
            {way.name: [rank[number] for rank in same] for number, way in enumerate(WAYS)},
            [[rank[len(WAYS) + number] for rank in same] for number in range(len(OTHERS))],
            [[rank[number] for rank in of_one] for number in range(len(OF_ONE))],
        )
    shutil.rmtree(sockets, ignore_errors=True)


@pytest.mark.parametrize("name", BY_NAME)
def test_a_snapshot_of_each_step_is_what_the_engine_held_before_the_next(outcome: Outcome, name: str) -> None:
    for step in range(1, SAVED_AT + 1):
        with open_source(Reference(url=str(outcome.folder / name / "run"), step=step)) as source:
            _check_same(source, outcome.live(BY_NAME[name], step))
            assert source.catalog.aliases == {"model.head.weight": "model.embed.weight"}
            first, second = source.catalog.groups["optimizer"]
            assert (first["weight_decay"], second["weight_decay"]) == (0.1, 0.0)
            assert all(name.endswith("bias") for name in second["params"])
            assert source.objects()["client_state"] == {"note": name, "seen": step - 1}


@pytest.mark.parametrize("name", BY_NAME)
def test_a_killed_job_goes_on_from_memory_with_the_same_losses(outcome: Outcome, name: str) -> None:
    way, after = BY_NAME[name], outcome.after(BY_NAME[name])
    for one in outcome.same[name]:
        _check_resumed(outcome, way, one)
        assert one.levels == {0: "memory", 1: "memory"}
        assert one.client == {"note": name, "seen": SAVED_AT - 1}
        assert one.path == str(outcome.folder / name / "out" / f"global_step{SAVED_AT}")
        # In 16 bits the same run differs from time to time: kernels depend on where tensors lie.
        assert one.losses == (after["losses"] if "float32" in name else pytest.approx(after["losses"], rel=2e-3))
        assert one.facts == after["facts"]
        if way.dtype == "float16":  # a step was skipped before the last checkpoint, and another one after it
            loaded, later = one.facts["loaded"], one.facts["after"]
            assert (loaded["skipped"], later["skipped"]) == (1, 2)
            assert later["scale"] < loaded["scale"]


@pytest.mark.parametrize("number", range(len(OTHERS)), ids=[f"{a.name}-to-{b.name}" for a, b in OTHERS])
def test_another_stage_loads_the_same_state_without_a_conversion(outcome: Outcome, number: int) -> None:
    for one in outcome.other[number]:
        _check_resumed(outcome, OTHERS[number][0], one)


@pytest.mark.parametrize("number", range(len(OF_ONE)), ids=[f"{a.name}-to-{b.name}" for a, b in OF_ONE])
def test_another_number_of_ranks_loads_the_same_state(outcome: Outcome, number: int) -> None:
    for one in outcome.of_one[number]:
        _check_resumed(outcome, OF_ONE[number][0], one)
        assert set(one.levels) == {0, 1}


def test_the_folder_names_the_last_step_that_is_durable(outcome: Outcome) -> None:
    for name in BY_NAME:
        out = outcome.folder / name / "out"
        assert sorted(one.name for one in out.iterdir() if one.is_dir()) == [
            f"global_step{step}" for step in range(1, SAVED_AT + 1)
        ]
        told = json.loads((out / f"global_step{SAVED_AT}" / "resilient.json").read_text())
        assert (told["step"], told["url"]) == (SAVED_AT, str(outcome.folder / name / "run"))
        assert (out / "latest").read_text() in [f"global_step{step}" for step in range(1, SAVED_AT + 1)]


def _check_resumed(outcome: Outcome, saved: Way, one: Resumed) -> None:
    """The state, hyperparameters and counters; `passing` is a buffer that need not be there."""
    for state, tensors in outcome.live(saved).items():
        if state in one.held:
            _check_equal(one.held[state], tensors)
    assert one.held.keys() == outcome.live(saved).keys()
    facts, skipped = one.facts["loaded"], len([step for step in saved.overflows if step < SAVED_AT])
    slower = 1 + (SAVED_AT - skipped) / 10
    assert facts["groups"] == [[pytest.approx(1e-2 / slower), 0.1], [pytest.approx(5e-3 / slower), 0.0]]
    assert (facts["steps"], facts["samples"], facts["skipped"]) == (SAVED_AT, 8 * SAVED_AT, skipped)
    assert facts["epoch"] == SAVED_AT - skipped


def test_a_step_that_follows_at_once_changes_nothing_that_is_being_saved(runtime_dir: Path, tmp_path: Path) -> None:
    found = run(jobs.step_at_once, 2, str(tmp_path), [0, 1, 2, 3], deadline_s=200)
    for stage in range(4):
        digests, problems = found[0][stage]
        assert problems == []
        for step, expected in enumerate(digests):
            with open_source(Reference(url=str(tmp_path / str(stage)), step=step)) as source:
                assert jobs.digest_of(_held(source, ("exp_avg", "exp_avg_sq") if step else ())) == expected


def _held(source: Any, states: tuple[str, ...]) -> Live:
    tensors = source.catalog.tensors
    names = [tensor.name for tensor in source.catalog.of_kind("parameter")]
    found: Live = {"model": {}}
    for state in ("fp32", *states):
        found[state] = {
            name.removeprefix("model."): _whole(source, tensors[f"optimizer.state.{name}.{state}"]) for name in names
        }
    return found
