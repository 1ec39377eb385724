"""What `resilient run` does when workers have ended: no process is started here."""

import signal

import pytest

from resilient.launch.run.decide import (
    MOST_FAILED_STARTS,
    PREEMPTED,
    REGROUP,
    Action,
    Budget,
    Facts,
    decide,
    how_it_ended,
    is_hung,
    start_patience_s,
)

BUDGET = Budget(restarts=2, progress_steps=10)
KILLED = {0: 1, 1: -signal.SIGKILL}


def failing_at(*steps: int | None) -> list[Action]:
    """What is decided at each of these failures in a row of lives."""
    budget, actions = BUDGET, []
    for step in steps:
        decision = decide(Facts(exits=KILLED, step=step, joined_before=True), budget)
        budget = decision.budget
        actions.append(decision.action)
    return actions


@pytest.mark.parametrize(
    ("exits", "action"),
    [
        ({0: 0, 1: 0}, Action.DONE),
        ({0: PREEMPTED, 1: PREEMPTED}, Action.PREEMPTED),
        ({0: PREEMPTED, 1: 0}, Action.PREEMPTED),
        ({0: REGROUP, 1: REGROUP}, Action.REGROUP),
        ({0: REGROUP, 1: 1}, Action.RESTART),
        ({0: PREEMPTED, 1: -9}, Action.RESTART),
        ({}, Action.RESTART),
    ],
)
def test_exit_codes_say_what_the_workers_meant(exits: dict[int, int], action: Action) -> None:
    assert decide(Facts(exits=exits), BUDGET).action is action


def test_a_job_that_fails_at_the_same_step_again_and_again_is_given_up() -> None:
    assert failing_at(5, 5, 5) == [Action.RESTART, Action.RESTART, Action.GIVE_UP]


def test_a_job_that_crawls_is_given_up_too() -> None:
    assert failing_at(5, 8, 11)[-1] is Action.GIVE_UP


def test_failures_far_apart_do_not_count_together() -> None:
    assert failing_at(5, 8, 20, 25, 31, 32, 41) == [Action.RESTART] * 7


def test_a_job_that_never_saves_is_given_up() -> None:
    assert failing_at(None, None, None) == [Action.RESTART, Action.RESTART, Action.GIVE_UP]


def test_a_job_that_saved_once_and_then_fails_before_its_first_save_is_given_up() -> None:
    assert failing_at(50, None, None) == [Action.RESTART, Action.RESTART, Action.GIVE_UP]


def test_without_restarts_the_first_failure_is_the_last() -> None:
    decision = decide(Facts(exits=KILLED, step=7), Budget(restarts=0, progress_steps=10))
    assert decision.action is Action.GIVE_UP
    assert "--max-restarts 0" in decision.reason


def test_lives_that_do_not_come_up_cost_no_restart_but_not_for_ever() -> None:
    budget = BUDGET
    for _ in range(MOST_FAILED_STARTS):
        decision = decide(Facts(exits=KILLED, joined=False, joined_before=True), budget)
        budget = decision.budget
        assert (decision.action, budget.failures) == (Action.RESTART, 0)
    assert decide(Facts(exits=KILLED, joined=False, joined_before=True), budget).budget.failures == 1


def test_a_script_that_never_joins_anybody_uses_up_its_restarts() -> None:
    assert decide(Facts(exits=KILLED, joined=False), BUDGET).budget.failures == 1


@pytest.mark.parametrize(
    ("stop", "joined", "before", "action"),
    [
        ("SIGTERM", True, False, Action.STOPPED),
        ("SIGTERM", False, True, Action.STOPPED),
        ("SIGTERM", False, False, Action.PREEMPTED),
        ("SIGINT", False, False, Action.STOPPED),
    ],
)
def test_workers_that_a_signal_ended_otherwise_are_not_started_again(
    stop: str, joined: bool, before: bool, action: Action
) -> None:
    facts = Facts(exits={0: -signal.SIGUSR1}, stop=stop, joined=joined, joined_before=before)
    assert decide(facts, BUDGET).action is action


def test_a_stop_by_agreement_is_one_whatever_signal_began_it() -> None:
    assert decide(Facts(exits={0: PREEMPTED}, stop="SIGTERM"), BUDGET).action is Action.PREEMPTED
    assert decide(Facts(exits={0: REGROUP}, stop="SIGTERM"), BUDGET).action is Action.STOPPED


def test_how_long_a_start_may_take_is_learned_from_the_first() -> None:
    assert start_patience_s(None) is None
    assert start_patience_s(0.5) == 60
    assert start_patience_s(30) == 300


def test_workers_count_as_hung_when_no_save_came_for_many_intervals_after_they_were_asked() -> None:
    assert not is_hung(since_save_s=500, since_asked_s=100, longest_interval_s=1)
    assert is_hung(since_save_s=500, since_asked_s=130, longest_interval_s=1)
    assert not is_hung(since_save_s=500, since_asked_s=500, longest_interval_s=60)


def test_an_end_is_put_in_words() -> None:
    assert how_it_ended(3) == "failed with exit code 3"
    assert how_it_ended(-9) == "was killed by SIGKILL"
    assert how_it_ended(-250) == "was killed by signal 250"
