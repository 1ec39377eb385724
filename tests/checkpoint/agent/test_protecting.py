"""What an agent says of other nodes before it knows any, and how its threads ask its loop."""

import threading
from collections.abc import Iterator

import pytest

from resilient.checkpoint.agent.images import Images
from resilient.checkpoint.agent.loop import Loop
from resilient.checkpoint.agent.protecting import Protecting
from resilient.checkpoint.agent.snapshots import Snapshots
from resilient.errors import LevelFailed, OverBudget
from tests.checkpoint.agent.conftest import Served
from tests.checkpoint.agent.trainer import Trainer

SMALL = 1000


class Host:
    """Hears nothing."""

    run_id = "run"

    def announce(self, tells: object) -> None: ...
    def tell_all(self, event: object) -> None: ...
    def settle(self) -> None: ...
    def send(self, rank: int, message: object, fds: object = ()) -> None: ...
    def on_sealed(self, slot: object, record: object, levels: object) -> None: ...
    def on_whole(self, snapshot: object, records: object) -> None: ...


@pytest.fixture
def protecting() -> Iterator[Protecting]:
    """On a loop that turns in a thread."""
    loop, ended, snapshots = Loop(), threading.Event(), Snapshots()

    def turn() -> None:
        while not ended.is_set():
            loop.turn(0.05)

    thread = threading.Thread(target=turn)
    thread.start()
    yield Protecting(Host(), loop, Images(Host(), loop, snapshots), snapshots)
    ended.set()
    thread.join()
    loop.close()


def test_an_agent_without_peers_says_so(served: Served) -> None:
    served.start()
    trainer = Trainer()
    trainer.plan(SMALL)
    assert trainer.client.token() is None
    assert trainer.client.recoverable() == []
    with pytest.raises(LevelFailed, match="has not been told of its peers"):
        trainer.client.recover(1, 20)
    with pytest.raises(LevelFailed, match="does not listen for its peers yet"):
        trainer.client.join([("a", "127.0.0.1", 1), ("b", "127.0.0.1", 2)], [[0, 1]], 1)


def test_parity_that_is_due_at_an_agent_without_peers_fails_and_nothing_else_does(served: Served) -> None:
    served.start()
    trainer = Trainer()
    trainer.plan(SMALL)
    trainer.save(1, levels=["parity"], size=SMALL)
    assert "not been told of its peers" in trainer.wait_for("failed", 1, "parity")["error"]
    trainer.wait_for("complete", 1, "memory")


def test_what_a_call_on_the_loop_raises_is_raised_in_the_thread_that_waits(protecting: Protecting) -> None:
    def fail() -> None:
        raise OverBudget("there is no room")

    assert protecting._on_loop(lambda: 5) == 5
    with pytest.raises(OverBudget, match="there is no room"):
        protecting._on_loop(fail)


def test_a_mistake_in_a_thread_is_told_to_whoever_waits_for_its_answer(
    protecting: Protecting, caplog: pytest.LogCaptureFixture
) -> None:
    told: list[Exception] = []
    answered = threading.Event()

    def failed(error: Exception) -> None:
        told.append(error)
        answered.set()

    protecting._in_thread("asking", lambda: 1 // 0, lambda result: None, failed)
    assert answered.wait(20)
    assert isinstance(told[0], LevelFailed)
    assert "ZeroDivisionError" in str(told[0])
    assert "asking" in caplog.text
