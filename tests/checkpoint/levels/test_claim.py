"""Who may write to a URL: taking, keeping, losing and giving back a claim, against a clock of the test's own."""

import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from resilient.checkpoint.levels.claim import Claim
from resilient.checkpoint.levels.process import this_process
from resilient.checkpoint.levels.store import MemoryStore, Store
from resilient.errors import NotACheckpoint, UrlInUse
from tests.conformance.store_contract import get, put

NAME = "claim.json"


class FakeClock:
    """Time passes in `sleep` only; `during_sleep` is called in each."""

    def __init__(self) -> None:
        self.now = 0.0
        self.during_sleep: Callable[[], object] = lambda: None

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float, /) -> None:
        self.now += seconds
        self.during_sleep()


@pytest.fixture
def store() -> Store:
    return MemoryStore()


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


def held(store: Store) -> dict[str, Any]:
    text: dict[str, Any] = json.loads(get(store, NAME))
    return text


def make_foreign(store: Store, **process: Any) -> None:
    """Turn the claim that is there into one of another place."""
    claim = held(store)
    claim["process"].update(process)
    put(store, NAME, json.dumps(claim).encode())


def test_a_free_url_is_taken_at_once_kept_and_given_back(store: Store, clock: FakeClock) -> None:
    claim = Claim(store, "run-1", clock=clock)
    claim.take()
    assert held(store)["run_id"] == "run-1"
    assert held(store)["process"]["pid"] == this_process().pid
    claim.beat()
    claim.beat()
    assert held(store)["beat"] == 2
    claim.release()
    claim.release()
    assert store.list() == []
    assert clock.now == 0


def test_a_restart_of_a_run_whose_node_has_died_takes_over_after_a_beat(store: Store, clock: FakeClock) -> None:
    Claim(store, "run-1", clock=clock).take()
    make_foreign(store, host="elsewhere")
    Claim(store, "run-1", clock=clock).take()
    assert held(store)["process"]["host"] == this_process().host
    assert 10 < clock.now <= 12


def test_a_restart_of_a_run_whose_rank_0_has_left_takes_over_at_once(store: Store, clock: FakeClock) -> None:
    first = Claim(store, "run-1", clock=clock)
    first.take()
    make_foreign(store, host="elsewhere")
    assert first.beat(rank_0=False)
    make_foreign(store, host="elsewhere")
    Claim(store, "run-1", clock=clock).take()
    assert clock.now == 0
    assert not first.beat(rank_0=False)


def test_a_second_job_of_a_run_that_trains_is_refused_within_a_beat(store: Store, clock: FakeClock) -> None:
    first = Claim(store, "run-1", clock=clock)
    first.take()
    make_foreign(store, host="elsewhere")

    def beat_when_due() -> None:
        if clock.now >= 10:
            put(store, NAME, json.dumps({**held(store), "beat": 1}).encode())

    clock.during_sleep = beat_when_due
    with pytest.raises(UrlInUse, match=r"'run-1' .* on elsewhere\) lives.*second job with the same run id"):
        Claim(store, "run-1", clock=clock).take()
    assert clock.now <= 12
    assert first.beat(), "the first job was disturbed"


def test_rank_0_that_leaves_while_its_successor_waits_lets_it_in(store: Store, clock: FakeClock) -> None:
    first = Claim(store, "run-1", clock=clock)
    first.take()
    make_foreign(store, host="elsewhere")

    def leave() -> None:
        put(store, NAME, json.dumps({**held(store), "beat": 1, "rank_0": False}).encode())

    clock.during_sleep = leave
    Claim(store, "run-1", clock=clock).take()
    assert clock.now <= 1


@pytest.mark.parametrize(("launch", "waits"), [("one", False), ("two", True), (None, True)])
def test_a_later_life_of_the_same_launch_need_not_wait_for_a_node_that_is_lost(
    store: Store, clock: FakeClock, launch: str | None, waits: bool
) -> None:
    Claim(store, "run-1", launch="one", clock=clock).take()
    make_foreign(store, host="elsewhere")
    Claim(store, "run-1", launch=launch, clock=clock).take()
    assert (clock.now > 0) == waits


def test_a_claim_of_an_older_version_says_nothing_of_rank_0_and_is_watched(store: Store, clock: FakeClock) -> None:
    Claim(store, "run-1", clock=clock).take()
    make_foreign(store, host="elsewhere")
    put(store, NAME, json.dumps({k: v for k, v in held(store).items() if k not in ("rank_0", "launch")}).encode())
    Claim(store, "run-1", clock=clock).take()
    assert 10 < clock.now <= 12


def test_a_claim_that_another_run_took_is_lost_though_rank_0_has_left(store: Store, clock: FakeClock) -> None:
    first = Claim(store, "run-1", clock=clock)
    first.take()
    make_foreign(store, host="elsewhere")
    Claim(store, "run-2", clock=clock).take()
    with pytest.raises(UrlInUse, match="run-2.*took it over"):
        first.beat(rank_0=False)


def test_the_claim_of_a_process_that_died_on_this_host_is_taken_over_at_once(store: Store, clock: FakeClock) -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    Claim(store, "run-1", clock=clock).take()
    make_foreign(store, pid=process.pid, started=1)
    Claim(store, "run-2", clock=clock).take()
    assert held(store)["run_id"] == "run-2"
    assert clock.now == 0


def test_a_job_that_is_alive_keeps_its_url(store: Store, clock: FakeClock) -> None:
    first = Claim(store, "run-1", clock=clock)
    first.take()
    clock.during_sleep = first.beat
    with pytest.raises(UrlInUse, match="run-1.*stop that job, or give this one another URL") as caught:
        Claim(store, "run-2", clock=clock).take()
    assert str(this_process().pid) in str(caught.value)
    assert this_process().host in str(caught.value)
    assert clock.now <= 10
    first.beat()


@pytest.mark.parametrize("place", [{"host": "elsewhere"}, {"boot_id": "another"}])
def test_a_dead_job_of_another_host_is_taken_over_after_stale_s_and_not_before(
    store: Store, clock: FakeClock, place: dict[str, str]
) -> None:
    Claim(store, "run-1", clock=clock).take()
    make_foreign(store, pid=2**22 + 1, started=1, **place)
    Claim(store, "run-2", clock=clock, stale_s=60).take()
    assert held(store)["run_id"] == "run-2"
    assert clock.now == 60


def test_a_job_that_ends_while_another_waits_lets_it_in(store: Store, clock: FakeClock) -> None:
    first = Claim(store, "run-1", clock=clock)
    first.take()
    clock.during_sleep = first.release
    Claim(store, "run-2", clock=clock).take()
    assert held(store)["run_id"] == "run-2"
    assert clock.now < 60


def test_a_job_whose_trainers_have_just_left_is_waited_for(store: Store, clock: FakeClock) -> None:
    first = Claim(store, "run-1", clock=clock)
    first.take()

    def end() -> None:
        if clock.now <= 2:  # it says that they have left, and again while it writes what is pending
            first.beat(rank_0=False)
        else:
            first.release()

    clock.during_sleep = end
    Claim(store, "run-2", clock=clock).take()
    assert held(store)["run_id"] == "run-2"
    assert 2 < clock.now < 10


def test_a_job_that_goes_on_writing_without_trainers_keeps_its_url(store: Store, clock: FakeClock) -> None:
    first = Claim(store, "run-1", clock=clock)
    first.take()
    clock.during_sleep = lambda: first.beat(rank_0=False)
    with pytest.raises(UrlInUse, match="run-1"):
        Claim(store, "run-2", clock=clock, stale_s=60).take()
    assert clock.now == 60
    first.beat()


def test_of_two_that_wait_for_the_same_stale_claim_one_gets_it(store: Store, clock: FakeClock) -> None:
    Claim(store, "run-1", clock=clock).take()
    make_foreign(store, host="elsewhere")
    second, third = Claim(store, "run-2", clock=clock), Claim(store, "run-3", clock=FakeClock())

    def third_is_quicker() -> None:
        clock.during_sleep = lambda: None
        third.take()

    clock.during_sleep = third_is_quicker
    with pytest.raises(UrlInUse, match="run-3"):
        second.take()
    third.beat()


def test_a_taker_that_is_overtaken_between_writing_and_reading_back_gives_way(clock: FakeClock) -> None:
    class Overtaken(MemoryStore):
        """Just after the first exclusive write, another taker's delete and write come in."""

        overtaken = False

        def write(self, name: str, chunks: Any, *, exclusive: bool = False) -> None:
            super().write(name, chunks, exclusive=exclusive)
            if exclusive and not self.overtaken:
                self.overtaken = True
                self.delete([NAME])
                other.take()

    store = Overtaken()
    other = Claim(store, "run-2", clock=clock)
    clock.during_sleep = lambda: other.beat()
    with pytest.raises(UrlInUse, match="run-2"):
        Claim(store, "run-1", clock=clock).take()
    other.beat()


def test_a_dead_claim_that_another_was_quicker_to_take_over_is_left_to_it(clock: FakeClock) -> None:
    class Overtaken(MemoryStore):
        """Just before the second look at the claim, another taker is done."""

        looks = 0

        def read(self, name: str, offset: int, into: memoryview) -> None:
            if name == NAME:
                self.looks += 1
            if self.looks == 2:
                other.take()
            super().read(name, offset, into)

    store = Overtaken()
    first, other = Claim(store, "run-1", clock=clock), Claim(store, "run-2", clock=clock)
    put(store, NAME, claim_of_a_dead_process(clock))
    clock.during_sleep = other.beat
    with pytest.raises(UrlInUse, match="run-2"):
        first.take()
    other.beat()


def test_a_claim_whose_length_changes_while_it_is_read_is_read_again(clock: FakeClock) -> None:
    class Changing(MemoryStore):
        """The holder beats between the look at the length and the read, from 9 to 10 and back."""

        def read(self, name: str, offset: int, into: memoryview) -> None:
            if changes:
                put(self, NAME, changes.pop())
            super().read(name, offset, into)

    store = Changing()
    changes: list[bytes] = []
    claim = Claim(store, "run-1", clock=clock)
    claim.take()
    short = get(store, NAME)
    changes += [short, short.replace(b'"beat": 0', b'"beat": 10')]
    claim.beat()
    assert held(store)["beat"] == 1


def claim_of_a_dead_process(clock: FakeClock) -> bytes:
    store = MemoryStore()
    Claim(store, "run-0", clock=clock).take()
    make_foreign(store, started=1)
    return get(store, NAME)


def test_a_job_whose_claim_was_taken_over_learns_it_at_its_next_beat(store: Store, clock: FakeClock) -> None:
    first, second = Claim(store, "run-1", clock=clock), Claim(store, "run-2", clock=clock)
    first.take()
    second.take()  # the first one does not beat: it was stopped for a while
    with pytest.raises(UrlInUse, match="run-2.*took it over"):
        first.beat()
    first.release()
    assert held(store)["run_id"] == "run-2"


def test_a_claim_that_was_removed_by_hand_is_put_back(store: Store, clock: FakeClock) -> None:
    claim = Claim(store, "run-1", clock=clock)
    claim.take()
    store.delete([NAME])
    claim.beat()
    assert held(store)["beat"] == 1


@pytest.mark.parametrize(
    "text",
    [b"", b"not json", b"\xff\xfe", b"[]", b"{}", b'{"format":"other"}', b'{"format":"resilient-claim","run_id":"x"}'],
)
def test_a_file_that_is_no_claim_is_left_as_it_is(store: Store, clock: FakeClock, text: bytes) -> None:
    put(store, NAME, text)
    with pytest.raises(NotACheckpoint, match="claim.json is no claim"):
        Claim(store, "run-1", clock=clock).take()
    assert get(store, NAME) == text


def test_times_that_contradict_each_other_are_refused(store: Store) -> None:
    with pytest.raises(ValueError, match="below stale_s"):
        Claim(store, "run-1", heartbeat_s=60, stale_s=60)
