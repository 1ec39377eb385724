"""Ranks that stop together: each is a thread here, and they share torch's in-process store."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import pytest
import torch.distributed as dist

from resilient.checkpoint.stopping import PREEMPT, REGROUP, Stopping, decide
from resilient.checkpoint.world import World
from resilient.errors import PolicyError
from resilient.policy import Policy

_MANY = 10_000  # saves; nobody gets as far


@contextmanager
def ranks(count: int) -> Iterator[list[Stopping]]:
    store = dist.HashStore() if count > 1 else None
    made = [Stopping(World(rank=rank, world_size=count, nodes=("n",) * count), store) for rank in range(count)]
    for one in made:
        one.renew("life")
        one.start()
    yield made
    for one in made:
        one.close()


def until_stopped(stopping: Stopping, before_save: Callable[[int], None] = lambda _: None) -> tuple[int, str | None]:
    for save in range(1, _MANY):
        before_save(save)
        kind = stopping.enter()
        if kind is not None:
            return save, kind
        stopping._ended.wait(0.001)  # a step
    return _MANY, None


def run(rows: list[Callable[[], tuple[int, str | None]]]) -> list[tuple[int, str | None]]:
    results: dict[int, tuple[int, str | None]] = {}

    def work(number: int, row: Callable[[], tuple[int, str | None]]) -> None:
        results[number] = row()

    threads = [threading.Thread(target=work, args=pair) for pair in enumerate(rows)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return [results[number] for number in range(len(rows))]


def test_the_stop_is_one_save_after_the_furthest_rank() -> None:
    decision = decide(PREEMPT, [7, 8, 7, 8])
    assert (decision.kind, decision.last_save) == (PREEMPT, 9)
    assert "[1, 3]" in decision.reason


@pytest.mark.parametrize("asking", [0, 2])
def test_all_ranks_stop_at_the_same_save_whoever_hears_the_notice(asking: int) -> None:
    with ranks(3) as made:

        def ask_at_30(save: int) -> None:
            if save == 30:
                made[asking].ask()

        def row(rank: int) -> Callable[[], tuple[int, str | None]]:
            return lambda: until_stopped(made[rank], ask_at_30 if rank == asking else lambda _: None)

        found = run([row(rank) for rank in range(3)])
    assert {kind for _, kind in found} == {PREEMPT}
    assert len({save for save, _ in found}) == 1
    assert found[0][0] > 30 or asking != 0


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
    assert found[0][1] == REGROUP


def test_a_rank_that_stands_still_holds_the_others_until_it_goes_on_but_not_the_decision() -> None:
    with ranks(2) as made:
        go_on = threading.Event()

        def slow(save: int) -> None:
            if save == 5:
                made[1].ask()
                go_on.wait(30)

        def quick() -> tuple[int, str | None]:
            found = until_stopped(made[0])  # decides although the other is in the middle of its step
            go_on.set()
            return found

        (quick_save, quick_kind), (slow_save, slow_kind) = run([quick, lambda: until_stopped(made[1], slow)])
    assert (quick_kind, slow_kind) == (PREEMPT, PREEMPT)
    assert quick_save == slow_save


def test_a_notice_before_the_ranks_start_anew_stops_them_afterwards() -> None:
    with ranks(2) as made:
        made[0].ask()
        for one in made:
            one.renew("next life")
        found = run([partial(until_stopped, one) for one in made])
    assert len(set(found)) == 1
    assert found[0][1] == PREEMPT


def test_a_single_rank_stops_at_its_next_save() -> None:
    with ranks(1) as (alone,):
        assert alone.enter() is None
        alone.ask()
        assert alone.enter() == PREEMPT


def test_a_signal_is_a_notice_and_goes_back_to_its_owner_afterwards() -> None:
    before = signal.getsignal(signal.SIGUSR1)
    alone = Stopping(World(rank=0, world_size=1, nodes=("n",)), None)
    alone.start([signal.SIGUSR1], [signal.SIGUSR2])
    os.kill(os.getpid(), signal.SIGUSR1)
    assert alone.enter() == PREEMPT
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
