"""Agents that run in a thread of the test, with stores and a clock of the test's choice."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from resilient.checkpoint.agent.address import address_of
from resilient.checkpoint.agent.server import Agent
from resilient.checkpoint.levels.store import MemoryStore, Store
from tests.checkpoint.agent.trainer import Trainer

LOCAL_URL, DURABLE_URL = "memory://local", "memory://durable"


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Served:
    """Agents in threads; all ended by the fixture."""

    def __init__(self) -> None:
        self.stores: dict[str, Store] = {}
        self.clock = Clock()
        self._agents: list[tuple[Agent, threading.Thread]] = []

    def start(self, run_id: str = "run", url: str | None = None) -> Agent:
        """An agent whose levels are `stores` by URL, and whose clock is `clock`."""
        agent = Agent(address_of(run_id, url), open_store=lambda name, _: self.stores[name], clock=self.clock)
        ready = threading.Event()
        thread = threading.Thread(target=agent.run, args=(ready.set,), name="agent", daemon=True)
        thread.start()
        assert ready.wait(20)
        self._agents.append((agent, thread))
        return agent

    def wait_ended(self) -> None:
        for _, thread in self._agents:
            thread.join(20)
            assert not thread.is_alive(), "the agent did not end"

    def stop(self) -> None:
        self.clock.now += 1e6
        for agent, _ in self._agents:
            agent.stop()
        self.wait_ended()


@pytest.fixture(autouse=True)
def no_trainer_outlives_its_test() -> Iterator[None]:
    yield
    while Trainer.all:
        trainer = Trainer.all.pop()
        trainer.vanish()
        trainer.client.close(keep=True)


@pytest.fixture
def served(runtime_dir: Path) -> Iterator[Served]:
    made = Served()
    yield made
    made.stop()


@pytest.fixture
def local(served: Served) -> MemoryStore:
    return served.stores.setdefault(LOCAL_URL, MemoryStore(LOCAL_URL))  # type: ignore[return-value]


@pytest.fixture
def durable(served: Served) -> MemoryStore:
    return served.stores.setdefault(DURABLE_URL, MemoryStore(DURABLE_URL))  # type: ignore[return-value]
