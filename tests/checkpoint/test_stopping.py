"""Ranks that stop together: each is a thread here, and they share torch's in-process store."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch.distributed as dist

from resilient.checkpoint.stopping import PREEMPT, REGROUP, Answer, Decision, Stopping, decide, is_late
from resilient.checkpoint.world import World
from resilient.errors import PolicyError
from resilient.policy import Policy

_MANY = 10_000  # saves; nobody gets as far


@contextmanager
def ranks(count: int, **how: Any) -> Iterator[list[Stopping]]:
    store = dist.HashStore()
    made = [Stopping(World(rank=rank, world_size=count, nodes=("n",) * count), store, **how) for rank in range(count)]
    for one in made:
        one.renew("life")
        one.start()
    yield made
    for one in made:
        one.close()


def until_stopped(
    stopping: Stopping, before_save: Callable[[int], None] = lambda _: None
) -> tuple[int, Decision | None]:
    """Saves of the steps 10, 20, 30 and so on, each after a short while; which was the last, and why."""
    for save in range(1, _MANY):
        before_save(save)
        decision = stopping.enter(10 * save)
        if decision is not None:
            return save, decision
        stopping._ended.wait(0.001)  # a step
    return _MANY, None


def run(rows: list[Callable[[], tuple[int, Decision | None]]]) -> list[tuple[int, Decision | None]]:
    results: dict[int, tuple[int, Decision | None]] = {}

    def work(number: int, row: Callable[[], tuple[int, Decision | None]]) -> None:
        results[number] = row()

    threads = [threading.Thread(target=work, args=pair) for pair in enumerate(rows)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return [results[number] for number in range(len(rows))]


def test_the_stop_is_one_save_after_the_furthest_rank() -> None:
    decision = decide(PREEMPT, [Answer(saves=saves, step=saves, late=False) for saves in (7, 8, 7, 8)])
    assert (decision.kind, decision.last_save, decision.step) == (PREEMPT, 9, None)
    assert "rank 1 is the furthest" in decision.reason


def test_where_time_is_short_the_newest_step_that_all_have_begun_to_save_has_to_do() -> None:
    answers = [Answer(saves=8, step=80, late=False), Answer(saves=7, step=70, late=True)]
    decision = decide(PREEMPT, answers)
    assert (decision.last_save, decision.step) == (0, 70)
    assert "rank 1 sees no time" in decision.reason
    assert decide(REGROUP, answers).step is None, "nobody takes these machines away"
    assert decide(PREEMPT, [*answers, Answer(saves=0, step=None, late=True)]).step is None, "one has saved nothing yet"


def test_two_steps_and_a_flush_have_to_fit_into_what_is_left() -> None:
    assert not is_late(None, 1000.0, 1000.0)
    assert not is_late(60.0, 10.0, 39.0)
    assert is_late(60.0, 10.0, 41.0)
    assert not is_late(60.0, 14.0, None)
    assert is_late(60.0, 16.0, None)


@pytest.mark.parametrize("asking", [0, 2])
def test_all_ranks_stop_at_the_same_save_whoever_hears_the_notice(asking: int) -> None:
    with ranks(3) as made:

        def ask_at_30(save: int) -> None:
            if save == 30:
                made[asking].ask()

        def row(rank: int) -> Callable[[], tuple[int, Decision | None]]:
            return partial(until_stopped, made[rank], ask_at_30 if rank == asking else lambda _: None)

        found = run([row(rank) for rank in range(3)])
    assert len(set(found)) == 1
    save, decision = found[0]
    assert decision is not None
    assert (decision.kind, decision.last_save) == (PREEMPT, save)


def test_ranks_in_lockstep_are_never_further_apart_than_the_decision_allows() -> None:
    barrier = threading.Barrier(4)  # as the gradients' all-reduce: no rank is more than a step ahead
    with ranks(4) as made:

        def in_step(rank: int) -> Callable[[int], None]:
            def wait(save: int) -> None:
                if rank == save % 4 and save == 20:
                    made[rank].ask(REGROUP)
                barrier.wait(30)

            return wait

        found = run([partial(until_stopped, made[rank], in_step(rank)) for rank in range(4)])
    assert len(set(found)) == 1
    assert found[0][1] is not None
    assert found[0][1].kind == REGROUP


def test_a_rank_that_stands_still_holds_the_others_until_it_goes_on_but_not_the_decision() -> None:
    with ranks(2) as made:
        go_on = threading.Event()

        def slow(save: int) -> None:
            if save == 5:
                made[1].ask()
                go_on.wait(30)

        def quick() -> tuple[int, Decision | None]:
            found = until_stopped(made[0])  # decides although the other is in the middle of its step
            go_on.set()
            return found

        found = run([quick, lambda: until_stopped(made[1], slow)])
    assert found[0] == found[1]
    assert found[0][1] is not None


def test_ranks_without_time_begin_no_other_save_and_hear_of_it_in_mid_step() -> None:
    decided = threading.Event()
    taken: list[Decision] = []

    def on_decided(decision: Decision) -> None:
        taken.append(decision)
        if len(taken) == 2:
            decided.set()

    with ranks(2, grace_s=1e-3, on_decided=on_decided) as made:

        def long_step(save: int) -> None:
            if save == 8:
                made[1].ask()
                assert decided.wait(30), "nobody is told before the step has ended"

        found = run([partial(until_stopped, one, long_step) for one in made])
    assert [save for save, _ in found] == [8, 8]
    assert {decision.step for decision in taken} == {70}


def test_a_notice_before_the_ranks_start_anew_stops_them_afterwards() -> None:
    with ranks(2) as made:
        made[0].ask()
        for one in made:
            one.renew("next life")
        found = run([partial(until_stopped, one) for one in made])
    assert len(set(found)) == 1
    assert found[0][1] is not None


def test_a_single_rank_stops_too() -> None:
    with ranks(1) as (alone,):
        assert alone.enter(1) is None
        alone.ask()
        assert until_stopped(alone)[1] is not None


def test_a_signal_is_a_notice_and_goes_back_to_its_owner_afterwards() -> None:
    before = signal.getsignal(signal.SIGUSR1)
    alone = Stopping(World(rank=0, world_size=1, nodes=("n",)), dist.HashStore())
    alone.start([signal.SIGUSR1], [signal.SIGUSR2])
    os.kill(os.getpid(), signal.SIGUSR1)
    _, decision = until_stopped(alone)
    assert decision is not None
    assert decision.kind == PREEMPT
    alone.close()
    assert signal.getsignal(signal.SIGUSR1) is before


def test_the_policy_reads_signals_by_name() -> None:
    policy = Policy.from_environment(environment={"RESILIENT_PREEMPT_SIGNALS": "SIGUSR1, SIGTERM"})
    assert policy.signals("preempt_signals") == (signal.SIGUSR1, signal.SIGTERM)
    assert policy.signals("regroup_signals") == ()


@pytest.mark.parametrize("names", ["SIGKILL", "USR1", "", "SIGUSR1 SIGNOTHING"])
def test_signals_that_do_not_exist_or_cannot_be_caught_are_refused(names: str) -> None:
    with pytest.raises(PolicyError, match="preempt_signals"):
        Policy(preempt_signals=names)


def test_one_signal_cannot_mean_both() -> None:
    with pytest.raises(PolicyError, match="SIGUSR1 is in preempt_signals and in regroup_signals"):
        Policy(preempt_signals="SIGUSR1", regroup_signals="SIGUSR2 SIGUSR1")
