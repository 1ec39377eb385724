"""Several ranks: what happens to one is known to all, and two lives of a job never make one snapshot."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from resilient.checkpoint.names import record_name
from tests.bad_days.conftest import Agents, Trainers


def test_a_torn_capture_on_one_rank_is_known_on_the_other_and_the_next_step_is_whole(
    trainers: Trainers, tmp_path: Path
) -> None:
    first, second = (child.value() for child in trainers.ranks("tear", url=str(tmp_path / "url"), torn_rank=1))
    torn = [step for step, outcome in second.items() if outcome is not None]
    assert torn, "no change met a capture: the test shows nothing"
    for step in torn:
        assert int(step) % 2 == 1
        assert second[step][0] == "TornCapture"
        assert first[step][0] == "RankFailed"
        assert "rank 1" in first[step][1]
        assert "'model." in first[step][1]
    assert [step for step, outcome in first.items() if outcome is not None] == torn


@pytest.mark.parametrize("level", ["memory", "local", "durable"])
def test_a_step_of_which_two_lives_wrote_a_part_each_is_never_restored(
    level: str, trainers: Trainers, agents: Agents, tmp_path: Path
) -> None:
    policies: dict[str, dict[str, Any]] = {
        "memory": {"durable_every": 0},
        "local": {"durable_every": 0, "local": str(tmp_path / "local"), "local_keep_last": 4},
        "durable": {"durable_every": 1, "keep_last": 4},
    }
    common = {"url": str(tmp_path / "url"), "level": level, **policies[level]}

    def life(**arguments: Any) -> list[dict[str, Any]]:
        found = [child.value() for child in trainers.ranks("live", **common, **arguments)]
        if level != "memory":
            agents.signal(9)
        return found

    before = life(until=2)
    life(until=3, last_of=0)
    again = life(until=3, last_of=1, twist=1)
    assert [one["start"] for one in again] == [2, 2]
    after = life(until=0)
    assert [one["start"] for one in after] == [2, 2]
    assert [one["digest"] for one in after] == [one["done"] for one in before]


def test_a_url_that_is_a_file_is_refused_on_all_ranks(trainers: Trainers, tmp_path: Path) -> None:
    (tmp_path / "url").write_text("my thesis")
    for child in trainers.ranks("refuse", url=str(tmp_path / "url")):
        value = child.value()
        assert value["error"] in ("NotACheckpoint", "LevelFailed"), value
        assert "is a file" in value["message"]
    assert (tmp_path / "url").read_text() == "my thesis"


def newer_format(record: Path) -> None:
    record.write_text(record.read_text().replace('"version":1', '"version":2'))


def foreign(record: Path) -> None:
    record.write_text(json.dumps({"name": "somebody else's"}))


@pytest.mark.parametrize(
    ("change", "error", "changed_rank"), [(newer_format, "NewerFormat", 0), (foreign, "NotACheckpoint", 1)]
)
def test_what_only_somebody_can_decide_is_raised_on_all_ranks_and_nothing_is_overwritten(
    change: Callable[[Path], None], error: str, changed_rank: int, trainers: Trainers, agents: Agents, tmp_path: Path
) -> None:
    url = tmp_path / "url"
    for child in trainers.ranks("live", url=str(url), until=2, durable_every=1, level="durable"):
        child.value()
    agents.signal(9)
    change(url / record_name(2, changed_rank, 2))
    there = {path: path.read_bytes() for path in url.rglob("rank_*")}
    for child in trainers.ranks("refuse", url=str(url), durable_every=1):
        value = child.value()
        assert (value["error"], value["untouched"]) == (error, True), value
        assert record_name(2, changed_rank, 2) in value["message"]
    assert {path: path.read_bytes() for path in url.rglob("rank_*")} == there


def test_a_snapshot_that_does_not_fit_one_rank_is_refused_on_all_and_overwrites_nothing(
    trainers: Trainers, tmp_path: Path
) -> None:
    url = str(tmp_path / "url")
    for child in trainers.ranks("live", url=url, until=2, durable_every=1, level="durable"):
        child.value()
    values = [child.value() for child in trainers.ranks("refuse", url=url, durable_every=1, odd_rank=1)]
    assert [(value["error"], value["untouched"]) for value in values] == [("LayoutMismatch", True)] * 2
    assert all("model." in value["message"] for value in values)


def test_a_failure_that_came_before_a_rank_saved_the_step_is_told_to_it_all_the_same(
    trainers: Trainers, tmp_path: Path
) -> None:
    first, second = (child.value() for child in trainers.ranks("late", url=str(tmp_path / "url")))
    assert second == "OverBudget"
    assert first == "RankFailed"
