"""The agent in a thread: what it writes to the local and the durable level, and what goes wrong there."""

import threading
from collections.abc import Callable

import pytest

from resilient.checkpoint.digest import damaged_blocks
from resilient.checkpoint.levels.image_io import read_image_range, read_record
from resilient.checkpoint.levels.store import MemoryStore
from resilient.checkpoint.names import complete_steps
from resilient.errors import LevelFailed
from resilient.policy import Policy
from tests.checkpoint.agent.conftest import DURABLE_URL, LOCAL_URL, Served
from tests.checkpoint.agent.trainer import GatedStore, Trainer, image_of

SMALL = 1000

Eventually = Callable[..., None]


# --- levels


def test_an_image_is_written_to_both_levels_and_its_slot_is_free_after_the_local_one(
    served: Served, local: MemoryStore
) -> None:
    gate = threading.Event()
    served.stores[DURABLE_URL] = durable = GatedStore(gate, DURABLE_URL)
    served.start(url=DURABLE_URL)
    trainer = Trainer(url=DURABLE_URL, policy=Policy(local=LOCAL_URL, local_keep_last=1))
    trainer.plan()
    trainer.save(1, levels=["local", "durable"])
    trainer.wait_for("complete", 1, "local")
    trainer.save(2)
    trainer.wait_for("complete", 2, "memory")
    assert trainer.client.take_free_slot(20) is not None, "the durable level reads the local file, not the slot"
    gate.set()
    trainer.wait_for("complete", 1, "durable")
    for store in (local, durable):
        record = read_record(store, 1, 0, 1)
        found = bytearray(record.image_bytes)
        read_image_range(store, record, 0, memoryview(found))
        assert found == image_of(0, 1)
        assert damaged_blocks(memoryview(found), record.blocks) == []


def test_a_level_that_fails_is_told_to_all_ranks_and_listed_by_flush(served: Served, durable: MemoryStore) -> None:
    gate = threading.Event()
    gate.set()
    served.stores[DURABLE_URL] = store = GatedStore(gate, DURABLE_URL)
    store.fail = LevelFailed("the disk is full")
    served.start(url=DURABLE_URL)
    trainer, other = Trainer(0, 2, url=DURABLE_URL), Trainer(1, 2, url=DURABLE_URL)
    for each in (trainer, other):
        each.plan(SMALL)
    trainer.save(1, levels=["durable"], size=SMALL)
    for each in (trainer, other):
        assert each.wait_for("failed", 1, "durable")["error"] == "the disk is full"
    assert trainer.client.flush(20) == ["the disk is full"]
    assert trainer.client.flush(20) == []
    other.save(1, size=SMALL)
    trainer.wait_for("complete", 1, "memory")


def test_when_the_local_disk_fails_the_durable_object_comes_from_memory(served: Served, durable: MemoryStore) -> None:
    gate = threading.Event()
    gate.set()
    served.stores[LOCAL_URL] = broken = GatedStore(gate, LOCAL_URL)
    broken.fail = OSError(28, "no space left")
    served.start(url=DURABLE_URL)
    trainer = Trainer(url=DURABLE_URL, policy=Policy(local=LOCAL_URL))
    trainer.plan()
    trainer.save(1, levels=["local", "durable"])
    trainer.wait_for("failed", 1, "local")
    trainer.wait_for("complete", 1, "durable")
    assert complete_steps(durable.list()) == {1: 1}


def test_a_damaged_local_file_is_not_sent_on(served: Served) -> None:
    served.stores[LOCAL_URL] = _DamagingStore(LOCAL_URL)
    served.stores[DURABLE_URL] = durable = MemoryStore(DURABLE_URL)
    served.start(url=DURABLE_URL)
    trainer = Trainer(url=DURABLE_URL, policy=Policy(local=LOCAL_URL))
    trainer.plan()
    trainer.save(1, levels=["local", "durable"])
    error = trainer.wait_for("failed", 1, "durable")["error"]
    assert "differs from what was sealed in block 1 of rank 0 at step 1" in error
    assert complete_steps(durable.list()) == {}


class _DamagingStore(MemoryStore):
    """Flips a bit of each image's second block when it is read."""

    def read(self, name: str, offset: int, into: memoryview) -> None:
        super().read(name, offset, into)
        if name.endswith(".safetensors"):
            into[(5 << 20) - offset] ^= 1


def test_a_level_that_is_not_configured_fails_at_once_with_the_reason(served: Served) -> None:
    served.start()
    trainer = Trainer()
    trainer.plan(SMALL)
    trainer.save(1, levels=["local", "durable"], size=SMALL)
    assert "names no folder" in trainer.wait_for("failed", 1, "local")["error"]
    assert "has no URL" in trainer.wait_for("failed", 1, "durable")["error"]
    trainer.wait_for("complete", 1, "memory")


def test_a_write_that_hangs_fails_after_its_timeout_frees_the_slot_and_publishes_nothing(
    served: Served, eventually: Eventually
) -> None:
    gate = threading.Event()
    served.stores[DURABLE_URL] = durable = GatedStore(gate, DURABLE_URL)
    served.start(url=DURABLE_URL)
    trainer = Trainer(url=DURABLE_URL, policy=Policy(write_timeout_s=30))
    trainer.plan(SMALL)
    trainer.save(1, levels=["durable"], size=SMALL)
    eventually(lambda: durable.begun, "the write has begun")
    served.clock.now += 31
    assert "took more than 30 s" in trainer.wait_for("failed", 1, "durable")["error"]
    trainer.save(2, size=SMALL)
    trainer.wait_for("complete", 2)
    assert trainer.client.take_free_slot(20) is not None
    gate.set()
    eventually(
        lambda: not any(thread.name == "write-durable" for thread in threading.enumerate()),
        "the abandoned thread has ended",
    )
    assert [name for name in durable.list() if name.startswith("step_")] == []


def test_writes_that_hang_do_not_pile_up_threads(served: Served, eventually: Eventually) -> None:
    gate = threading.Event()
    served.stores[DURABLE_URL] = store = GatedStore(gate, DURABLE_URL)
    served.start(url=DURABLE_URL)
    trainer = Trainer(url=DURABLE_URL, policy=Policy(write_timeout_s=30))
    trainer.plan(SMALL)
    for step in range(1, 7):
        trainer.save(step, levels=["durable"], size=SMALL)
        trainer.wait_for("complete", step, "memory")
        begun = min(step, 2)
        eventually(lambda: store.begun == begun, "the write has begun")  # noqa: B023 - it is over within this round
        served.clock.now += 31
        trainer.wait_for("failed", step, "durable")
    assert sum(thread.name == "write-durable" for thread in threading.enumerate()) <= 3
    assert "the level is down" in trainer.wait_for("failed", 6, "durable")["error"]
    gate.set()


def test_flush_waits_for_the_writes_of_its_rank_and_says_when_they_take_too_long(served: Served) -> None:
    gate = threading.Event()
    served.stores[DURABLE_URL] = durable = GatedStore(gate, DURABLE_URL)
    served.start(url=DURABLE_URL)
    trainer = Trainer(url=DURABLE_URL)
    trainer.plan(SMALL)
    trainer.save(1, levels=["durable"], size=SMALL)
    with pytest.raises(LevelFailed, match="did not answer flush|still being written"):
        trainer.client.flush(0.05)
    gate.set()
    assert trainer.client.flush(20) == []
    assert complete_steps(durable.list()) == {1: 1}


def test_old_snapshots_are_deleted_as_the_policy_says(
    served: Served, local: MemoryStore, durable: MemoryStore, eventually: Eventually
) -> None:
    served.start(url=DURABLE_URL)
    policy = Policy(local=LOCAL_URL, local_keep_last=1, keep_last=2, keep_every=4)
    trainers = [Trainer(rank, 2, url=DURABLE_URL, policy=policy) for rank in (0, 1)]
    for each in trainers:
        each.plan(SMALL)
    for step in range(1, 10):
        for each in trainers:
            each.save(step, levels=["local", "durable"], size=SMALL)
        trainers[0].wait_for("complete", step, "durable")
    eventually(lambda: complete_steps(durable.list()) == {4: 2, 8: 2, 9: 2}, "the durable level is tidy")
    eventually(lambda: complete_steps(local.list()) == {9: 2}, "the local level is tidy")
    assert {name for name in durable.list() if name.startswith("step_00000003")} == set()


def test_a_local_file_that_is_still_being_sent_on_is_not_deleted(
    served: Served, local: MemoryStore, eventually: Eventually
) -> None:
    gate = threading.Event()
    served.stores[DURABLE_URL] = durable = GatedStore(gate, DURABLE_URL)
    served.start(url=DURABLE_URL)
    trainer = Trainer(url=DURABLE_URL, policy=Policy(local=LOCAL_URL, local_keep_last=1))
    trainer.plan(SMALL)
    trainer.save(1, levels=["local", "durable"], size=SMALL)
    eventually(lambda: durable.begun, "the upload has begun")
    for step in (2, 3, 4):
        trainer.save(step, levels=["local"], size=SMALL)
        trainer.wait_for("complete", step, "local")
    eventually(lambda: complete_steps(local.list()) == {1: 1, 4: 1}, "step 1 stays as long as it is needed")
    gate.set()
    trainer.wait_for("complete", 1, "durable")
    trainer.save(5, levels=["local"], size=SMALL)
    eventually(lambda: complete_steps(local.list()) == {5: 1}, "and goes afterwards")


def test_digests_of_an_image_that_was_given_up_meanwhile_are_ignored(
    served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    agent = served.start()
    trainer = Trainer()
    trainer.plan(SMALL)
    slot = trainer.fill(1, SMALL)
    agent._loop.post(lambda: agent._node.images._digested(0, (slot.id, 77), ()))
    trainer.client.seal(slot, 1, SMALL, [])
    trainer.wait_for("complete", 1)
    assert "went wrong" not in caplog.text


def test_a_failed_snapshot_is_not_written_to_the_end(served: Served) -> None:
    gate = threading.Event()
    served.stores[DURABLE_URL] = durable = GatedStore(gate, DURABLE_URL)
    served.start(url=DURABLE_URL)
    trainer, other = Trainer(0, 2, url=DURABLE_URL), Trainer(1, 2, url=DURABLE_URL)
    for each in (trainer, other):
        each.plan(SMALL)
    trainer.save(1, levels=["durable"], size=SMALL)
    trainer.wait_for("sealed", 1)
    other.client.failed("memory", 1, 1, "torn")
    trainer.wait_for("failed", 1, "durable")
    gate.set()
    trainer.client.flush(20)
    assert [name for name in durable.list() if name.startswith("step_")] == []


# --- durable after all


def test_images_that_were_not_due_are_made_durable_when_their_ranks_ask(served: Served, durable: MemoryStore) -> None:
    served.start(url=DURABLE_URL)
    ranks = [Trainer(rank, 2, url=DURABLE_URL) for rank in (0, 1)]
    for each in ranks:
        each.plan(SMALL)
        each.save(1, size=SMALL)
    for each in ranks:
        each.wait_for("complete", 1, "memory")
    assert complete_steps(durable.list()) == {}
    for each in ranks:
        each.client.make_durable(1)
        each.client.make_durable(1)  # asking again writes nothing again
    for each in ranks:
        each.wait_for("complete", 1, "durable")
    assert list(complete_steps(durable.list())) == [1]


def test_asking_for_what_is_durable_already_is_answered_again(served: Served, durable: MemoryStore) -> None:
    served.start(url=DURABLE_URL)
    trainer = Trainer(url=DURABLE_URL)
    trainer.plan(SMALL)
    trainer.save(1, levels=["durable"], size=SMALL)
    trainer.wait_for("complete", 1, "durable")
    trainer.events.clear()
    trainer.client.make_durable(1)
    trainer.wait_for("complete", 1, "durable")


def test_an_image_that_is_not_in_memory_cannot_be_made_durable(served: Served, durable: MemoryStore) -> None:
    served.start(url=DURABLE_URL)
    trainer = Trainer(url=DURABLE_URL)
    trainer.plan(SMALL)
    with pytest.raises(LevelFailed, match="rank 0 at step 3 is not in this node's memory"):
        trainer.client.make_durable(3)
