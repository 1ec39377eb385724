"""A level's writing thread: order, failures, and writes that hang, with a clock that the tests move."""

import threading
from collections.abc import Callable, Iterator

import pytest

from resilient.checkpoint.agent.writer import MAX_ABANDONED, MAX_QUEUED, Cancelled, Job, LevelWriter
from resilient.errors import DamagedImage, ResilientError

Cancelling = Callable[[], bool]


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Bench:
    """A writer and what became of its jobs."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.writer = LevelWriter("durable", 10.0, self.clock)
        self.gate = threading.Event()
        self.begun: dict[str, threading.Event] = {}
        self.ended: dict[str, threading.Event] = {}
        self.outcome: dict[str, ResilientError | None] = {}
        self.published: list[str] = []

    def submit(self, name: str, run: Callable[[Cancelling], None] = lambda _: None) -> Job:
        begun, ended = self.begun.setdefault(name, threading.Event()), threading.Event()
        self.ended[name] = ended

        def work(is_cancelled: Cancelling) -> None:
            begun.set()
            run(is_cancelled)
            self.published.append(name)

        def done(error: ResilientError | None) -> None:
            assert name not in self.outcome, "done was called twice"
            self.outcome[name] = error
            ended.set()

        job = Job(name=name, run=work, done=done)
        self.writer.submit(job)
        return job

    def hang(self, name: str) -> Job:
        """A job that blocks until the gate opens, and then does what a good writer does."""

        def block(is_cancelled: Cancelling) -> None:
            assert self.gate.wait(30)
            if is_cancelled():
                raise Cancelled

        job = self.submit(name, block)
        assert self.begun[name].wait(10)
        return job

    def wait(self, name: str) -> ResilientError | None:
        assert self.ended[name].wait(10)
        return self.outcome[name]

    def threads(self) -> int:
        return sum(thread.name == "write-durable" for thread in threading.enumerate())


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench()
    yield made
    made.gate.set()
    made.writer.stop()
    for thread in threading.enumerate():
        if thread.name == "write-durable":
            thread.join(10)


def test_jobs_run_one_after_the_other_in_order(bench: Bench) -> None:
    names = [f"job {number}" for number in range(20)]
    for name in names:
        bench.submit(name)
    assert [bench.wait(name) for name in names] == [None] * 20
    assert bench.published == names
    assert bench.threads() == 1


def test_a_failure_of_the_library_passes_and_any_other_becomes_one_that_names_the_job(bench: Bench) -> None:
    def fail(error: Exception) -> Callable[[Cancelling], None]:
        def run(_: Cancelling) -> None:
            raise error

        return run

    bench.submit("damaged", fail(DamagedImage("bad block")))
    bench.submit("strange", fail(RuntimeError("what a store of others may raise")))
    assert isinstance(bench.wait("damaged"), DamagedImage)
    assert "strange: RuntimeError: what a store" in str(bench.wait("strange"))
    bench.submit("next")
    assert bench.wait("next") is None


def test_a_write_that_hangs_fails_when_its_time_is_over_and_the_next_one_goes_on(bench: Bench) -> None:
    bench.hang("stuck")
    bench.submit("next")
    bench.clock.now = 9.9
    bench.writer.check()
    assert "stuck" not in bench.outcome
    bench.clock.now = 10.0
    bench.writer.check()
    assert "took more than 10 s" in str(bench.outcome["stuck"])
    assert bench.wait("next") is None


def test_a_stuck_write_that_comes_back_publishes_nothing_and_its_thread_ends(
    bench: Bench, eventually: Callable[..., None]
) -> None:
    bench.hang("stuck")
    bench.clock.now = 10.0
    bench.writer.check()
    bench.submit("next")
    bench.wait("next")
    bench.gate.set()
    eventually(lambda: bench.threads() == 1, "the abandoned thread has ended")
    assert bench.published == ["next"]


def test_threads_that_hang_are_bounded_and_then_every_job_fails_at_once(bench: Bench) -> None:
    for number in range(MAX_ABANDONED):
        bench.hang(f"stuck {number}")
        if number == MAX_ABANDONED - 1:
            bench.submit("queued")
        bench.clock.now += 10.0
        bench.writer.check()
    assert "the level is down" in str(bench.outcome["queued"])
    for number in range(20):
        bench.submit(f"refused {number}")
        assert "the level is down" in str(bench.outcome[f"refused {number}"])
    assert bench.threads() <= MAX_ABANDONED
    assert bench.writer.pending == 0


def test_a_level_that_was_down_is_used_again_when_a_stuck_write_ends(
    bench: Bench, eventually: Callable[..., None]
) -> None:
    for number in range(MAX_ABANDONED):
        bench.hang(f"stuck {number}")
        bench.clock.now += 10.0
        bench.writer.check()
    bench.gate.set()
    eventually(lambda: bench.threads() == 0, "the stuck threads have ended")
    bench.submit("again")
    assert bench.wait("again") is None


def test_the_same_image_is_not_written_while_an_earlier_try_of_it_hangs(bench: Bench) -> None:
    bench.hang("rank 0 step 5")
    bench.clock.now = 10.0
    bench.writer.check()
    del bench.outcome["rank 0 step 5"]
    bench.submit("rank 0 step 5")
    assert "an earlier try of the same write hangs" in str(bench.outcome["rank 0 step 5"])


def test_the_queue_is_bounded(bench: Bench) -> None:
    bench.hang("running")
    for number in range(MAX_QUEUED):
        bench.submit(f"queued {number}")
    bench.submit("one too many")
    assert "too slow" in str(bench.outcome["one too many"])


def test_a_cancelled_job_that_waits_is_not_begun(bench: Bench) -> None:
    bench.hang("running")
    job = bench.submit("cancelled")
    job.cancel()
    bench.gate.set()
    assert "was given up" in str(bench.wait("cancelled"))
    assert not bench.begun["cancelled"].is_set()
