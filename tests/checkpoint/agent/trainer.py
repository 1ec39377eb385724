"""A trainer as the agent sees it: a client, the events that it got, and images made of seeded bytes.

Run as a script it is a trainer in a process of its own, which saves until it is killed (see `test_process.py`).
"""

import json
import random
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

from resilient.checkpoint.agent.client import AgentClient, Hello, Slot
from resilient.checkpoint.levels.store import MemoryStore
from resilient.errors import AgentLost
from resilient.policy import Policy

IMAGE_BYTES = (9 << 20) + 123  # two whole blocks and a rest


def image_of(rank: int, step: int, size: int = IMAGE_BYTES) -> bytes:
    return random.Random(f"{rank} {step}").randbytes(size)


class Trainer:
    """One rank. All of them are closed at the end of a test (`conftest.py`)."""

    all: ClassVar[list["Trainer"]] = []

    def __init__(
        self,
        rank: int = 0,
        world_size: int = 1,
        node_ranks: Sequence[int] | None = None,
        *,
        run_id: str = "run",
        url: str | None = None,
        policy: Policy | None = None,
        timeout_s: float = 30.0,
        reads: bool = False,
    ) -> None:
        self.rank = rank
        self.events: list[dict[str, Any]] = []
        self.lost: list[AgentLost] = []
        self._changed = threading.Condition()
        hello = Hello(
            run_id=run_id,
            url=url,
            rank=rank,
            world_size=world_size,
            node_ranks=tuple(range(world_size) if node_ranks is None else node_ranks),
            policy=policy or Policy(),
            reads=reads,
        )
        self.client = AgentClient.connect(hello, self._on_event, self._on_lost, timeout_s)
        self.all.append(self)

    def _on_event(self, event: dict[str, Any]) -> None:
        with self._changed:
            self.events.append(event)
            self._changed.notify_all()

    def _on_lost(self, error: AgentLost) -> None:
        with self._changed:
            self.lost.append(error)
            self._changed.notify_all()

    def plan(self, size: int = IMAGE_BYTES, slots: int = 2, budget: int | None = None) -> list[Slot]:
        return self.client.register_plan(
            plan_digest="plan",
            capacity=size,
            slots=slots,
            budget_bytes=slots * size if budget is None else budget,
            pieces_text='[{"name":"weight"}]',
            software={"torch": "0"},
        )

    def fill(self, step: int, size: int = IMAGE_BYTES) -> Slot:
        slot = self.client.take_free_slot(20)
        assert slot is not None, f"rank {self.rank} got no slot for step {step}"
        self.client.begin(slot, step)
        image = image_of(self.rank, step, size)
        half = size // 2
        slot.view[:half] = image[:half]
        self.client.filled(slot, step, half)
        slot.view[half:size] = image[half:]
        self.client.filled(slot, step, size)
        return slot

    def save(self, step: int, levels: Sequence[str] = (), size: int = IMAGE_BYTES) -> None:
        self.client.seal(self.fill(step, size), step, size, levels)

    def wait_for(self, event: str, step: int, level: str | None = None, timeout_s: float = 20.0) -> dict[str, Any]:
        """The event, when it has come."""

        def found() -> dict[str, Any] | None:
            for each in self.events:
                if (each["event"], each["step"]) == (event, step) and level in (None, each.get("level")):
                    return each
            return None

        with self._changed:
            assert self._changed.wait_for(found, timeout_s), f"no {event} {level} {step} in {self.events}"
            result = found()
            assert result is not None
            return result

    def wait_lost(self) -> AgentLost:
        with self._changed:
            assert self._changed.wait_for(lambda: self.lost, 20), "the trainer did not notice"
            return self.lost[0]

    def image(self, rank: int, step: int) -> bytes:
        with self.client.map_image(rank, step) as mapped:
            return bytes(mapped.view)

    def vanish(self) -> None:
        """End the connection as a dying process does: no goodbye."""
        self.client._connection.hang_up()


def both_saved(size: int) -> tuple[Trainer, Trainer]:
    """The two ranks of a job, each of which has saved step 1; not waited for."""
    ranks = Trainer(0, 2), Trainer(1, 2)
    for each in ranks:
        each.plan(size)
        each.save(1, size=size)
    return ranks


def main() -> None:
    """Save the steps that are named, say what happened on stdout, then wait to be killed."""
    rank, world_size, sealed, half_filled = (int(argument) for argument in sys.argv[1:5])
    trainer = Trainer(rank, world_size)
    trainer.plan(slots=3)
    for step in range(1, sealed + 1):
        trainer.save(step)
        trainer.wait_for("sealed", step)
    if half_filled:
        trainer.fill(half_filled)
    print(json.dumps({"agent": trainer.client.status()["pid"]}), flush=True)
    while True:
        time.sleep(60)


class GatedStore(MemoryStore):
    """Images wait for a gate to open; `fail` makes each write of one fail."""

    def __init__(self, gate: threading.Event, url: str) -> None:
        super().__init__(url)
        self.gate = gate
        self.begun = 0
        self.fail: Exception | None = None

    def write(self, name: str, chunks: Iterable[memoryview], *, exclusive: bool = False) -> None:
        if name.endswith(".safetensors"):
            self.begun += 1
            assert self.gate.wait(60)
            if self.fail is not None:
                raise self.fail
        super().write(name, chunks, exclusive=exclusive)


if __name__ == "__main__":
    main()
