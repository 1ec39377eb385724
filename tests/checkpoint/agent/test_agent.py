"""The agent as trainers meet it: buffers, images, levels, budgets and restarts, against an agent in this process."""

import threading
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from resilient.checkpoint.agent.address import address_of
from resilient.checkpoint.digest import damaged_blocks
from resilient.checkpoint.levels.image_io import read_image_range, read_record
from resilient.checkpoint.levels.store import MemoryStore
from resilient.checkpoint.names import complete_steps
from resilient.checkpoint.record import Record
from resilient.errors import AgentLost, LevelFailed, OverBudget, PolicyError, UrlInUse, UsageError
from resilient.policy import Policy
from tests.checkpoint.agent.conftest import Served
from tests.checkpoint.agent.trainer import IMAGE_BYTES, Trainer, image_of

LOCAL_URL, DURABLE_URL = "memory://local", "memory://durable"
SMALL = 1000

Eventually = Callable[..., None]


@pytest.fixture
def local(served: Served) -> MemoryStore:
    return served.stores.setdefault(LOCAL_URL, MemoryStore(LOCAL_URL))  # type: ignore[return-value]


@pytest.fixture
def durable(served: Served) -> MemoryStore:
    return served.stores.setdefault(DURABLE_URL, MemoryStore(DURABLE_URL))  # type: ignore[return-value]


# --- images in memory


def test_an_image_is_digested_sealed_and_read_back_bit_for_bit(served: Served) -> None:
    served.start()
    trainer = Trainer()
    slots = trainer.plan()
    assert all(slot.address % 4096 == 0 and slot.capacity >= IMAGE_BYTES for slot in slots)
    trainer.save(7)
    trainer.wait_for("sealed", 7)
    trainer.wait_for("complete", 7, "memory")
    with trainer.client.map_image(0, 7) as mapped:
        assert bytes(mapped.view) == image_of(0, 7)
        assert mapped.view.readonly
        assert damaged_blocks(mapped.view, mapped.record.blocks) == []
        assert (mapped.record.plan_digest, mapped.record.pieces_text) == ("plan", '[{"name":"weight"}]')
    (image,) = trainer.client.images()
    assert (image.rank, image.step, image.world_size, image.complete) == (0, 7, 1, True)


@pytest.mark.parametrize("size", [1, (4 << 20) - 1, 4 << 20, (4 << 20) + 1, 8 << 20])
def test_images_of_any_size_have_the_digests_of_their_bytes(served: Served, size: int) -> None:
    served.start()
    trainer = Trainer()
    trainer.plan(size)
    trainer.save(1, size=size)
    trainer.wait_for("complete", 1)
    with trainer.client.map_image(0, 1) as mapped:
        assert mapped.record.image_bytes == size
        assert damaged_blocks(mapped.view, mapped.record.blocks) == []


def test_two_ranks_one_step_apart_keep_the_newest_complete_snapshot(served: Served) -> None:
    served.start()
    ahead, behind = Trainer(0, 2), Trainer(1, 2)
    for trainer in (ahead, behind):
        trainer.plan(SMALL)
    for step in range(1, 30):
        ahead.save(step, size=SMALL)
        ahead.wait_for("sealed", step)
        if step > 1:
            assert ahead.client.take_free_slot(0) is None
            assert ahead.image(0, step - 1) == image_of(0, step - 1, SMALL)
            assert ahead.image(1, step - 1) == image_of(1, step - 1, SMALL)
        behind.save(step, size=SMALL)
        behind.wait_for("complete", step)


def test_an_image_that_is_mapped_is_not_overwritten(served: Served) -> None:
    served.start()
    trainer = Trainer()
    trainer.plan(SMALL)
    trainer.save(1, size=SMALL)
    trainer.wait_for("complete", 1)
    with trainer.client.map_image(0, 1) as mapped:
        trainer.save(2, size=SMALL)
        trainer.wait_for("complete", 2)
        assert trainer.client.take_free_slot(0) is None
        assert bytes(mapped.view) == image_of(0, 1, SMALL)
    assert trainer.client.take_free_slot(20) is not None


def test_a_reader_that_dies_pins_nothing(served: Served) -> None:
    served.start()
    trainer, reader = Trainer(0, 2), Trainer(1, 2)
    for each in (trainer, reader):
        each.plan(SMALL)
        each.save(1, size=SMALL)
    trainer.wait_for("complete", 1)
    reader.client.map_image(0, 1)
    assert max(slot["pins"] for slot in trainer.client.status()["slots"]) == 1
    reader.vanish()
    trainer.client.failed("memory", 2, 1, "the reader is gone")
    trainer.wait_for("failed", 2)
    assert max(slot["pins"] for slot in trainer.client.status()["slots"]) == 0


def test_an_aborted_image_fails_its_step_on_every_rank_and_frees_the_slot(served: Served) -> None:
    served.start()
    first, second = Trainer(0, 2), Trainer(1, 2)
    for each in (first, second):
        each.plan(SMALL)
    slot = first.fill(1, SMALL)
    first.client.abort(slot, 1, "tensor weight changed")
    for each in (first, second):
        event = each.wait_for("failed", 1, "memory")
        assert (event["rank"], event["error"]) == (0, "tensor weight changed")
    assert {first.client.take_free_slot(20), first.client.take_free_slot(20)} != {None}
    assert first.client.images() == []


def test_a_slot_that_was_taken_and_not_used_can_be_given_back(served: Served) -> None:
    served.start()
    trainer = Trainer()
    trainer.plan(SMALL)
    taken = [trainer.client.take_free_slot(0), trainer.client.take_free_slot(0)]
    assert trainer.client.take_free_slot(0) is None
    assert taken[0] is not None
    trainer.client.abort(taken[0], 1, "not needed")
    assert trainer.client.take_free_slot(20) is taken[0]


def test_an_image_that_is_not_there_is_said_to_be_so(served: Served) -> None:
    served.start()
    with pytest.raises(LevelFailed, match="rank 0 at step 3 is not in this node's memory"):
        Trainer().client.map_image(0, 3)


# --- other nodes


def test_with_other_nodes_the_leader_is_asked_and_its_word_reaches_all_ranks(served: Served) -> None:
    served.start()
    leader, other = Trainer(2, 4, (2, 3)), Trainer(3, 4, (2, 3))
    for each in (other, leader):
        each.plan(SMALL)
        each.save(1, size=SMALL)
    leader.wait_for("node", 1, "memory")
    assert not any(image.complete for image in leader.client.images())
    leader.client.complete("memory", 1)
    for each in (leader, other):
        each.wait_for("complete", 1, "memory")
    assert all(event["event"] != "node" for event in other.events)
    leader.client.failed("memory", 2, 0, "the other node has no buffer")
    assert other.wait_for("failed", 2, "memory")["rank"] == 0


def test_when_the_leader_is_gone_the_next_one_is_asked(served: Served) -> None:
    served.start()
    leader, other = Trainer(0, 3, (0, 1)), Trainer(1, 3, (0, 1))
    for each in (other, leader):
        each.plan(SMALL)
        each.save(1, size=SMALL)
    leader.wait_for("node", 1)
    leader.vanish()
    other.wait_for("node", 1)


# --- budgets


def test_a_plan_beyond_the_budget_is_refused(served: Served) -> None:
    served.start()
    trainer = Trainer()
    with pytest.raises(OverBudget, match="2 images of 1000000 bytes need 2000000 bytes, the memory budget is 1900000"):
        trainer.plan(1000000, slots=2, budget=1900000)
    assert trainer.client.status()["bytes"] == 0


def test_a_new_plan_reuses_buffers_that_are_large_enough_and_gives_the_others_back(served: Served) -> None:
    served.start()
    trainer = Trainer()
    first = trainer.plan(100_000)
    again = trainer.plan(90_000, budget=200_000)
    assert {slot.id for slot in again} == {slot.id for slot in first}
    assert all(new is old for new, old in zip(again, first, strict=True)), "mapped once"
    larger = trainer.plan(300_000)
    assert not {slot.id for slot in larger} & {slot.id for slot in first}
    del first, again
    assert set(trainer.client._mappings) == {slot.id for slot in larger}, "the old ones are not mapped any more"
    assert trainer.client.status()["bytes"] <= 600_000 + 2 * 4096


def test_memory_stays_within_the_budget_while_older_images_are_needed_and_the_rest_follows(served: Served) -> None:
    served.start()
    trainer = Trainer()
    trainer.plan(100_000)
    trainer.save(1, size=100_000)
    trainer.wait_for("complete", 1)
    budget = 400_000
    slots = trainer.plan(200_000, slots=2, budget=budget)
    assert len(slots) == 1, "the image of step 1 takes up the rest"
    assert trainer.client.status()["bytes"] <= budget + 2 * 4096
    trainer.save(2, size=200_000)
    trainer.wait_for("complete", 2)
    assert trainer.client.take_free_slot(20) is not None, "the second buffer came when step 1 was let go"
    assert trainer.client.status()["bytes"] <= budget + 2 * 4096


# --- restarts


def test_a_trainer_that_comes_back_finds_its_images_and_its_half_filled_slot_free(served: Served) -> None:
    served.start()
    trainer, other = Trainer(0, 2), Trainer(1, 2)
    for each in (trainer, other):
        each.plan(SMALL)
        each.save(1, size=SMALL)
    trainer.wait_for("complete", 1)
    trainer.fill(2, SMALL)
    trainer.vanish()
    assert "ended before its image was whole" in other.wait_for("failed", 2)["error"]
    again = Trainer(0, 2)
    assert again.image(0, 1) == image_of(0, 1, SMALL)
    again.plan(SMALL)
    again.save(2, size=SMALL)
    other.save(2, size=SMALL)
    again.wait_for("complete", 2)


def test_images_of_a_larger_world_are_read_by_a_smaller_one_and_dropped_when_it_has_its_own(served: Served) -> None:
    served.start()
    trainers = [Trainer(rank, 2) for rank in (0, 1)]
    for each in trainers:
        each.plan(SMALL)
        each.save(10, size=SMALL)
    trainers[0].wait_for("complete", 10)
    for each in trainers:
        each.vanish()
    alone = Trainer(0, 1)
    assert alone.image(1, 10) == image_of(1, 10, SMALL)
    alone.plan(SMALL)
    alone.save(11, size=SMALL)
    alone.wait_for("complete", 11)
    alone.client.status()
    assert [(image.rank, image.step, image.world_size) for image in alone.client.images()] == [(0, 11, 1)]
    assert {slot["rank"] for slot in alone.client.status()["slots"]} == {0}


def test_a_second_world_is_refused_while_the_first_one_lives(served: Served) -> None:
    agent = served.start()
    Trainer(0, 2)
    with pytest.raises(UrlInUse, match="not run 'other'"):
        _connect_as(agent.address.folder, "other")


def _connect_as(folder: Path, run_id: str) -> None:
    """Say hello with another run id at the same socket."""
    from resilient.checkpoint.agent.connection import Connection, dial

    sock = dial(folder / "agent.sock")
    assert sock is not None
    connection = Connection(sock, "rank 1", lambda event, fds: None, lambda error: None)
    connection.start()
    try:
        connection.request(
            "hello",
            token=(folder / "token").read_text(),
            protocol=1,
            run_id=run_id,
            url=None,
            rank=1,
            world_size=2,
            node_ranks=[0, 1],
            policy={},
        )
    finally:
        connection.hang_up()


def test_scratch_adopt_and_release_let_other_ranks_read_what_one_has_loaded(served: Served) -> None:
    served.start()
    loader, reader = Trainer(0, 2), Trainer(1, 2)
    image = image_of(5, 40)
    slot = loader.client.scratch(len(image), budget_bytes=len(image))
    slot.view[: len(image)] = image
    loader.client.adopt(slot, 40, _record(5, 40, image))
    assert reader.image(5, 40) == image
    with reader.client.map_image(5, 40) as mapped:
        loader.client.release(slot)
        assert bytes(mapped.view) == image
    reader.client.status()
    assert reader.client.images() == []


def _record(rank: int, step: int, image: bytes) -> Record:
    from resilient.checkpoint.digest import block_count, block_range, digest

    ranges = [block_range(index, len(image)) for index in range(block_count(len(image)))]
    return Record(
        run_id="run",
        step=step,
        rank=rank,
        world_size=8,
        plan_digest="plan",
        image_name="name",
        image_bytes=len(image),
        blocks=tuple(digest(image[start:stop]) for start, stop in ranges),
    )


def test_scratch_beyond_the_budget_is_refused_and_a_released_one_is_used_again(served: Served) -> None:
    served.start()
    trainer = Trainer()
    slot = trainer.client.scratch(100_000, budget_bytes=150_000)
    with pytest.raises(OverBudget, match="does not fit its memory budget of 150000 bytes"):
        trainer.client.scratch(100_000, budget_bytes=150_000)
    trainer.client.release(slot)
    assert trainer.client.scratch(90_000, budget_bytes=150_000).id == slot.id
    trainer.client.release(slot)
    assert slot.id in {each.id for each in trainer.plan(95_000)}, "its pages are there already"


def test_scratch_after_a_plan_takes_a_free_slot_and_gives_it_back(served: Served) -> None:
    served.start()
    trainer = Trainer()
    trainer.plan(SMALL)
    slot = trainer.client.scratch(SMALL, budget_bytes=2 * SMALL)
    other = trainer.client.take_free_slot(0)
    assert other is not None
    assert trainer.client.take_free_slot(0) is None
    trainer.client.release(slot)
    assert trainer.client.take_free_slot(20) is slot


# --- levels


def test_an_image_is_written_to_both_levels_and_its_slot_is_free_after_the_local_one(
    served: Served, local: MemoryStore
) -> None:
    gate = threading.Event()
    served.stores[DURABLE_URL] = durable = _GatedStore(gate, DURABLE_URL)
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


class _GatedStore(MemoryStore):
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


def test_a_level_that_fails_is_told_to_all_ranks_and_listed_by_flush(served: Served, durable: MemoryStore) -> None:
    gate = threading.Event()
    gate.set()
    served.stores[DURABLE_URL] = store = _GatedStore(gate, DURABLE_URL)
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
    served.stores[LOCAL_URL] = broken = _GatedStore(gate, LOCAL_URL)
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
    served.stores[DURABLE_URL] = durable = _GatedStore(gate, DURABLE_URL)
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
    served.stores[DURABLE_URL] = store = _GatedStore(gate, DURABLE_URL)
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
    served.stores[DURABLE_URL] = durable = _GatedStore(gate, DURABLE_URL)
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
    served.stores[DURABLE_URL] = durable = _GatedStore(gate, DURABLE_URL)
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
    served.stores[DURABLE_URL] = durable = _GatedStore(gate, DURABLE_URL)
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


# --- the claim, the policy, the ends


def test_rank_0_holds_a_claim_on_the_url_until_all_have_ended(served: Served, durable: MemoryStore) -> None:
    served.start(url=DURABLE_URL)
    trainer = Trainer(url=DURABLE_URL)
    assert "claim.json" in durable.list()
    trainer.client.close(keep=False)
    served.wait_ended()
    assert "claim.json" not in durable.list()


def test_a_url_that_cannot_be_claimed_fails_the_hello_of_rank_0(served: Served) -> None:
    served.stores[DURABLE_URL] = store = MemoryStore(DURABLE_URL)
    store.write("claim.json", [memoryview(b"something else")])
    served.start(url=DURABLE_URL)
    with pytest.raises(Exception, match="claim.json is no claim of this library"):
        Trainer(url=DURABLE_URL)
    store.delete(["claim.json"])
    assert Trainer(url=DURABLE_URL).client.status()["slots"] == []


def test_a_store_that_cannot_be_opened_fails_the_hello_of_rank_0(served: Served) -> None:
    served.start(url="memory://unknown")
    with pytest.raises(LevelFailed, match="could not be claimed: KeyError"):
        Trainer(url="memory://unknown")


def test_the_agent_ends_when_all_ranks_close_and_want_nothing_kept(served: Served, eventually: Eventually) -> None:
    agent = served.start()
    first, second = Trainer(0, 2), Trainer(1, 2)
    for each in (first, second):
        each.plan(SMALL)
    first.client.close(keep=False)
    assert second.client.status()["pid"]
    second.client.close(keep=False)
    served.wait_ended()
    assert not agent.address.folder.exists()


def test_the_agent_stays_when_one_rank_wants_its_images_kept(served: Served) -> None:
    served.start()
    first, second = Trainer(0, 2), Trainer(1, 2)
    for each in (first, second):
        each.plan(SMALL)
        each.save(1, size=SMALL)
    first.wait_for("complete", 1)
    first.client.close(keep=False)
    second.client.close(keep=True)
    assert Trainer(0, 2).image(1, 1) == image_of(1, 1, SMALL)


def test_pending_writes_are_finished_before_the_agent_ends(served: Served) -> None:
    gate = threading.Event()
    served.stores[DURABLE_URL] = durable = _GatedStore(gate, DURABLE_URL)
    served.start(url=DURABLE_URL)
    trainer = Trainer(url=DURABLE_URL)
    trainer.plan(SMALL)
    trainer.save(1, levels=["durable"], size=SMALL)
    trainer.wait_for("sealed", 1)
    trainer.client.close(keep=False)
    gate.set()
    served.wait_ended()
    assert complete_steps(durable.list()) == {1: 1}


def test_an_idle_agent_ends_when_its_time_is_over_and_not_before(served: Served) -> None:
    agent = served.start()
    trainer = Trainer(policy=Policy(agent_idle_s=100))
    trainer.plan(SMALL)
    trainer.save(1, size=SMALL)
    trainer.wait_for("complete", 1)
    served.clock.now += 1000
    for _ in range(3):
        trainer.client.status()
    trainer.vanish()
    served.clock.now += 50
    again = Trainer(policy=Policy(agent_idle_s=100))
    assert again.image(0, 1) == image_of(0, 1, SMALL)
    again.vanish()
    served.clock.now += 101
    served.wait_ended()
    assert not agent.address.folder.exists()


def test_a_client_that_was_closed_says_so(served: Served) -> None:
    served.start()
    trainer = Trainer()
    trainer.plan(SMALL)
    trainer.client.close(keep=True)
    trainer.client.close(keep=True)
    with pytest.raises(AgentLost, match="was closed"):
        trainer.client.take_free_slot(1)
    with pytest.raises(AgentLost, match="was closed"):
        trainer.client.images()
    assert trainer.lost == [], "it is not lost, it was closed"


def test_a_mistake_in_the_handler_of_an_event_does_not_end_the_listening_thread(
    served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    served.start()
    trainer = Trainer()
    trainer.plan(SMALL)
    del trainer.events
    trainer.save(1, size=SMALL)
    trainer.client.flush(20)
    assert trainer.client.status()["images"] == 1
    assert "handling the event" in caplog.text


def test_an_impossible_hello_is_refused_with_the_reason(served: Served) -> None:
    served.start()
    with pytest.raises(UsageError, match="rank 3 of 2 does not fit"):
        Trainer(3, 2)
    with pytest.raises(PolicyError):
        Policy(retries=0)


def test_the_address_is_the_same_for_all_ranks_and_differs_by_run_url_and_node(runtime_dir: Path) -> None:
    addresses = {
        address_of("run", None, "a").folder,
        address_of("run", "s3://b", "a").folder,
        address_of("run", None, "b").folder,
        address_of("other", None, "a").folder,
    }
    assert len(addresses) == 4
    assert address_of("run", None, "a") == address_of("run", None, "a")


def test_a_claim_that_another_job_took_stops_the_writes_until_rank_0_has_it_again(served: Served) -> None:
    """The claim is beaten every ten seconds of real time, so its loss is brought about on the agent's own loop."""
    served.stores[DURABLE_URL] = MemoryStore(DURABLE_URL)
    agent = served.start(url=DURABLE_URL)
    trainer = Trainer(url=DURABLE_URL)
    trainer.plan(SMALL)
    agent._loop.post(lambda: agent._node._on_claim_lost(UrlInUse("run 'other' took it over")))
    trainer.client.status()
    trainer.save(1, levels=["durable"], size=SMALL)
    assert "run 'other' took it over" in trainer.wait_for("failed", 1, "durable")["error"]
    trainer.vanish()
    again = Trainer(url=DURABLE_URL)
    again.plan(SMALL)
    again.save(2, levels=["durable"], size=SMALL)
    again.wait_for("complete", 2, "durable")


def test_a_scratch_slot_that_no_plan_holds_is_given_back_when_it_is_released(served: Served) -> None:
    served.start()
    trainer = Trainer()
    trainer.plan(SMALL, slots=1)
    before = trainer.client.status()["bytes"]
    slot = trainer.client.scratch(50_000, budget_bytes=100_000)
    assert trainer.client.status()["bytes"] > before
    trainer.client.release(slot)
    assert trainer.client.status()["bytes"] == before


def test_after_a_plan_was_refused_for_want_of_room_no_slot_of_the_old_one_is_given_out(served: Served) -> None:
    served.start()
    trainer = Trainer()
    trainer.plan(100_000)
    trainer.save(1, size=100_000)
    trainer.wait_for("complete", 1)
    with pytest.raises(OverBudget, match="older images that are still needed take"):
        trainer.plan(150_000, slots=1, budget=200_000)
    assert trainer.client.take_free_slot(0) is None
    assert trainer.image(0, 1) == image_of(0, 1, 100_000)
