"""The agent as trainers meet it: buffers, images, levels, budgets and restarts, against an agent in this process."""

from collections.abc import Callable
from pathlib import Path

import pytest

from resilient.checkpoint.digest import damaged_blocks
from resilient.checkpoint.record import Record
from resilient.errors import LevelFailed, OverBudget, UrlInUse
from tests.checkpoint.agent.conftest import Served
from tests.checkpoint.agent.trainer import IMAGE_BYTES, Trainer, both_saved, image_of

SMALL = 1000

Eventually = Callable[..., None]


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
    trainer, reader = both_saved(SMALL)
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


def test_a_failure_that_is_no_single_ranks_reaches_all_and_costs_the_leader_nothing(served: Served) -> None:
    served.start()
    leader, other = Trainer(2, 4, (2, 3)), Trainer(3, 4, (2, 3))
    leader.client.failed("memory", 2, None, "a trainer that took part in it has ended")
    for each in (leader, other):
        assert each.wait_for("failed", 2, "memory")["rank"] is None
    assert leader.client.status()["fds"] > 0
    assert leader.lost == []


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


def test_a_plan_that_the_node_has_no_memory_for_is_refused_and_harms_nobody(served: Served) -> None:
    served.start()
    trainer, other = both_saved(SMALL)
    for each in (trainer, other):
        each.wait_for("complete", 1, "memory")
    with pytest.raises(OverBudget, match="bytes of memory are wanted for images and this node has"):
        other.plan(1 << 50)
    assert other.client.take_free_slot(0) is None
    trainer.save(2, size=SMALL)  # digests come from another thread, and what follows from them must not fail either
    trainer.wait_for("sealed", 2)
    assert not trainer.lost + other.lost
    assert other.image(1, 1) == image_of(1, 1, SMALL)
    other.plan(SMALL)
    other.save(2, size=SMALL)
    for each in (trainer, other):
        each.wait_for("complete", 2, "memory")


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
    trainer, other = both_saved(SMALL)
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
    loader.client.adopt(slot.id, 40, _record(5, 40, image))
    assert reader.image(5, 40) == image
    with reader.client.map_image(5, 40) as mapped:
        loader.client.release(slot.id)
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
    trainer.client.release(slot.id)
    assert trainer.client.scratch(90_000, budget_bytes=150_000).id == slot.id
    trainer.client.release(slot.id)
    assert slot.id in {each.id for each in trainer.plan(100_000)}, "its pages are there already"


def test_a_buffer_so_large_that_the_second_would_not_fit_beside_it_is_not_used_again(served: Served) -> None:
    served.start()
    trainer = Trainer()
    slot = trainer.client.scratch(200_000, budget_bytes=300_000)
    trainer.client.release(slot.id)
    planned = trainer.plan(100_000)
    assert len(planned) == 2
    assert slot.id not in {each.id for each in planned}


def test_scratch_after_a_plan_takes_a_free_slot_and_gives_it_back(served: Served) -> None:
    served.start()
    trainer = Trainer()
    trainer.plan(SMALL)
    slot = trainer.client.scratch(SMALL, budget_bytes=2 * SMALL)
    other = trainer.client.take_free_slot(0)
    assert other is not None
    assert trainer.client.take_free_slot(0) is None
    trainer.client.release(slot.id)
    assert trainer.client.take_free_slot(20) is slot
