"""The lines that the operator of `resilient run` reads."""

import json
from pathlib import Path
from typing import Any

import pytest

from resilient.launch.run.decide import Action, Budget, Decision
from resilient.launch.run.report import (
    End,
    Reporter,
    end_text,
    exit_code_of,
    levels_text,
    restored_text,
    running_text,
    steps_lost,
)

BUDGET = Budget(restarts=3, progress_steps=10)
FAILURE = {"node": "n2", "host": "h7", "rank": 3, "exit_code": -9, "message": ""}


def an_end(action: Action, reason: str = "because", **facts: Any) -> str:
    return end_text(End(life=2, decision=Decision(action=action, reason=reason, budget=BUDGET), **facts))


def test_the_end_of_a_life_is_told_with_rank_host_and_what_comes_next() -> None:
    text = an_end(Action.RESTART, "restart 1 of 3 without progress", step=8, failure=FAILURE)
    assert text == (
        "life 2 ended at step 8: rank 3 on n2 (host h7) was killed by SIGKILL; restart 1 of 3 without progress: "
        "starting again"
    )
    failure = {**FAILURE, "exit_code": 1, "host": "n2", "message": "ValueError: x"}
    assert an_end(Action.GIVE_UP, failure=failure, exit_code=1) == (
        "life 2 ended before its first save: rank 3 on n2 failed with exit code 1 (ValueError: x); because: giving up; "
        "nothing was restored, 0 steps lost in all (exit code 1)"
    )


def test_a_stop_names_the_step_that_is_safe_not_the_one_that_was_under_way() -> None:
    text = an_end(Action.PREEMPTED, step=9, safe=8, exit_code=75)
    assert text.startswith("the job stopped at step 9, and step 8 is safe: start the same command again to go on; ")
    unsafe = an_end(Action.PREEMPTED, step=9, safe=8, problems=["rank 1, durable: not in time"], exit_code=75)
    assert "but step 8 may not be safe (rank 1, durable: not in time)" in unsafe
    assert an_end(Action.REGROUP, step=9) == "life 2 stopped at step 9, to go on with other nodes"
    assert an_end(Action.STOPPED, step=9, exit_code=143).startswith("the job was stopped at step 9: because; ")


@pytest.mark.parametrize("action", [Action.DONE, Action.PREEMPTED, Action.STOPPED, Action.GIVE_UP])
def test_every_last_line_says_what_was_restored_from_where_and_what_was_lost(action: Action) -> None:
    code = "" if action is Action.DONE else " (exit code 9)"
    restored = {"life": 1, "step": 7, "levels": "memory (2 ranks) and parity (1 rank)"}
    text = an_end(action, step=9, restored=restored, lost_steps=1, exit_code=9)
    known = "; life 1 began at step 7 from memory (2 ranks) and parity (1 rank), 1 step lost in all"
    assert text.endswith(known + code)
    nothing = "; nothing was restored, 2 steps lost in all"
    assert an_end(action, step=9, lost_steps=2, exit_code=9).endswith(nothing + code)


def test_a_good_end_says_after_how_many_lives() -> None:
    assert an_end(Action.DONE, step=9).startswith("the job ended well at step 9 after 3 lives; ")
    assert an_end(Action.DONE).startswith("the job ended well after 3 lives; ")


def test_trouble_of_a_node_is_told_in_its_words() -> None:
    failure = {"node": "n1", "host": "n1", "what": "has workers that did not join"}
    assert "n1 has workers that did not join" in an_end(Action.RESTART, failure=failure)


def test_what_was_restored_is_told_with_level_seconds_and_loss() -> None:
    restored = {"step": 7, "levels": {"0": "memory", "1": "memory", "2": "parity"}, "seconds": 0.25}
    assert levels_text(restored) == "memory (2 ranks) and parity (1 rank)"
    assert restored_text(restored, 9) == f"restored step 7 from {levels_text(restored)} in 0.25 s, 2 steps lost"
    assert restored_text({"step": None}, 9) == "nothing to restore, it begins at the start, 9 steps lost"
    assert restored_text({"step": None}, None) == "nothing to restore, it begins at the start"
    assert steps_lost(restored, 5) == 0


def test_a_new_life_says_who_is_in_it() -> None:
    text = running_text(1, 4, ["n1", "n3"], ["n2"], ["n3"], "restored", ", 4.0 s after the failure")
    assert text == "life 1 runs on 4 ranks of 2 nodes, without n2, with n3: restored, 4.0 s after the failure"


@pytest.mark.parametrize(
    ("action", "stop", "code"),
    [
        (Action.DONE, None, 0),
        (Action.PREEMPTED, 15, 75),
        (Action.GIVE_UP, None, 1),
        (Action.STOPPED, 2, 130),
        (Action.STOPPED, None, 143),
        (Action.RESTART, None, None),
        (Action.REGROUP, None, None),
    ],
)
def test_exit_codes_are_those_that_launchers_expect(action: Action, stop: int | None, code: int | None) -> None:
    assert exit_code_of(action, stop) == code


def test_a_quiet_node_tells_only_what_is_its_own_but_logs_all(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reporter = Reporter("n2", tmp_path)
    reporter.speaks = False
    reporter.tell("running", "not said", {"life": 1})
    reporter.tell("restart", "said", {"life": 1}, own=True)
    assert capsys.readouterr().err == "resilient: said\n"
    logged = [json.loads(line) for line in (tmp_path / "resilient-n2.jsonl").read_text().splitlines()]
    assert [(told["event"], told["life"], told["node"]) for told in logged] == [
        ("running", 1, "n2"),
        ("restart", 1, "n2"),
    ]


def test_a_log_that_cannot_be_written_is_said_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reporter = Reporter("n1", tmp_path / "absent")
    for _ in range(2):
        reporter.tell("running", "on", {})
    assert capsys.readouterr().err.count("cannot be written") == 1
