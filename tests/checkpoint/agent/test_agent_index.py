"""The agent of rank 0's node merges the records of a snapshot that has become durable; nothing depends on it."""

from collections.abc import Callable, Iterable

from resilient.checkpoint.levels.index_io import make_index, read_index
from resilient.checkpoint.levels.store import MemoryStore
from resilient.checkpoint.names import catalog_name, complete_steps
from resilient.errors import LevelFailed
from resilient.policy import Policy
from tests.checkpoint.agent.conftest import DURABLE_URL, Served
from tests.checkpoint.agent.trainer import Trainer

SMALL = 1000


def save_durably(trainers: list[Trainer], step: int) -> None:
    for each in trainers:
        each.save(step, levels=["durable"], size=SMALL)
    for each in trainers:
        each.wait_for("complete", step, "durable")


def test_the_records_of_all_ranks_are_merged_when_they_are_durable(served: Served, durable: MemoryStore) -> None:
    served.start(url=DURABLE_URL)
    trainers = [Trainer(rank, 2, url=DURABLE_URL, policy=Policy(keep_last=2)) for rank in range(2)]
    for each in trainers:
        each.plan(SMALL)
    for step in (1, 2, 3):
        save_durably(trainers, step)
        assert trainers[0].client.flush(20) == []  # it waits for this, too
        index = read_index(durable, step, 2)
        assert index.text() == make_index(durable, step, range(2), 2).text()
        assert index.is_complete


def test_the_index_goes_with_its_snapshot(
    served: Served, durable: MemoryStore, eventually: Callable[..., None]
) -> None:
    served.start(url=DURABLE_URL)
    trainer = Trainer(url=DURABLE_URL, policy=Policy(keep_last=1))
    trainer.plan(SMALL)
    for step in (1, 2):
        save_durably([trainer], step)
    eventually(lambda: complete_steps(durable.list()) == {2: 1}, "step 1 is gone")
    eventually(lambda: not any(name.startswith("step_00000001") for name in durable.list()), "all of it")
    assert catalog_name(2) in durable.list()


class WithoutIndexes(MemoryStore):
    """A place that keeps all but what is called `catalog.json`."""

    def write(self, name: str, chunks: Iterable[memoryview], *, exclusive: bool = False) -> None:
        if name.endswith("catalog.json"):
            raise LevelFailed("there is no room for it")
        super().write(name, chunks, exclusive=exclusive)


def test_a_snapshot_counts_as_much_without(served: Served) -> None:
    served.stores[DURABLE_URL] = store = WithoutIndexes(DURABLE_URL)
    served.start(url=DURABLE_URL)
    trainer = Trainer(url=DURABLE_URL)
    trainer.plan(SMALL)
    save_durably([trainer], 1)
    assert trainer.client.flush(20) == []
    assert complete_steps(store.list()) == {1: 1}
    assert catalog_name(1) not in store.list()
