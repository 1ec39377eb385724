"""What nodes tell one another through the job's store; here the nodes are two boards in one process."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch.distributed as dist

from resilient.checkpoint.board import NodeBoard
from resilient.errors import AgentLost

Eventually = Callable[..., None]


class Heard:
    """What a board told its node's agent."""

    def __init__(self) -> None:
        self.completed: list[tuple[str, int, str | None]] = []
        self.failures: list[tuple[str, int, int | None, str]] = []

    def complete(self, level: str, step: int, life: str | None = None) -> None:
        self.completed.append((level, step, life))

    def failed(self, level: str, step: int, rank: int | None, reason: str) -> None:
        self.failures.append((level, step, rank, reason))


class Two:
    """Two nodes with a board each, in the same life."""

    def __init__(self) -> None:
        store = dist.HashStore()
        self.heard = [Heard(), Heard()]
        self.boards = [NodeBoard(store, nodes=2, number=number) for number in range(2)]
        for board, heard in zip(self.boards, self.heard, strict=True):
            board.bind(lambda heard=heard: heard)  # type: ignore[misc]
        self.renew("first")

    def renew(self, life: str) -> None:
        self.life = life
        for board in self.boards:
            board.renew(life)

    def has(self, node: int, step: int) -> None:
        self.boards[node].post({"event": "node", "level": "memory", "step": step, "life": self.life})

    def fails(self, node: int, step: int) -> None:
        event: dict[str, Any] = {"event": "failed", "level": "memory", "step": step, "rank": node, "error": "why"}
        self.boards[node].post(event)


@pytest.fixture
def two() -> Iterator[Two]:
    made = Two()
    yield made
    for board in made.boards:
        board.close()


def test_a_step_is_complete_when_every_node_has_it(two: Two, eventually: Eventually) -> None:
    two.has(0, 1)
    two.has(0, 2)
    two.has(1, 2)
    for heard in two.heard:
        eventually(lambda heard=heard: heard.completed == [("memory", 2, "first")], "step 2 is complete")


def test_a_node_that_says_twice_that_it_has_a_step_counts_once(two: Two, eventually: Eventually) -> None:
    for _ in range(2):
        two.has(0, 1)
    two.has(0, 2)
    two.has(1, 2)
    eventually(lambda: two.heard[0].completed, "what was said last is known")
    assert two.heard[0].completed == [("memory", 2, "first")]


def test_what_an_agent_could_not_be_told_is_told_to_the_next_one(two: Two, eventually: Eventually) -> None:
    heard = two.heard[1]
    lost: list[str] = []

    def told() -> Heard:
        if not lost:
            lost.append("once")
            raise AgentLost("it is gone")
        return heard

    two.boards[1].bind(told)
    two.has(0, 1)
    two.has(1, 1)
    eventually(lambda: heard.completed == [("memory", 1, "first")], "the second agent hears of it")
    assert lost == ["once"]


def test_a_failure_goes_round_once(two: Two, eventually: Eventually) -> None:
    two.fails(0, 1)
    eventually(lambda: two.heard[1].failures == [("memory", 1, 0, "why")], "the other node hears of it")
    two.fails(1, 1)
    two.has(0, 2)
    two.has(1, 2)
    eventually(lambda: two.heard[0].completed, "what came after the echo has come")
    assert two.heard[0].failures == []


def test_what_was_said_of_a_step_before_the_run_went_back_does_not_count_for_it_now(
    two: Two, eventually: Eventually
) -> None:
    two.has(0, 1)
    two.has(1, 1)
    two.fails(0, 2)
    eventually(lambda: two.heard[0].completed and two.heard[1].completed and two.heard[1].failures, "all is said")
    two.renew("second")
    two.has(0, 1)
    two.fails(0, 2)
    eventually(lambda: len(two.heard[1].failures) == 2, "the second failure of the step is heard too")
    assert len(two.heard[0].completed) == 1, "one node alone does not complete it"
    two.has(1, 1)
    eventually(lambda: two.heard[0].completed[-1] == ("memory", 1, "second"), "both have it again")
