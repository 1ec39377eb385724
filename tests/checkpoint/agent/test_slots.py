"""Slots and snapshots as pure state: which buffer may be used again, and that the newest complete one may not."""

import random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from resilient.checkpoint.agent.protocol import ProtocolError
from resilient.checkpoint.agent.slots import Slot, Slots, SlotState
from resilient.checkpoint.agent.snapshots import DURABLE, LOCAL, MEMORY, Progress, Snapshot, Snapshots, Tell

CAPACITY = 100


class World:
    """Ranks of one node, with their slots; sessions are numbered by rank unless said otherwise."""

    def __init__(self, ranks: int, slots_each: int, world_size: int | None = None) -> None:
        self.snapshots = Snapshots()
        self.slots = Slots(self.snapshots)
        self.snapshots.set_world(world_size or ranks, frozenset(range(ranks)))
        for rank in range(ranks):
            for _ in range(slots_each):
                self.slots.add(rank, CAPACITY, planned=True)

    def free(self, rank: int) -> list[Slot]:
        return [slot for slot in self.slots.of(rank) if slot.state is SlotState.FREE]

    def begin(self, rank: int, step: int, session: int | None = None) -> Slot:
        slot = self.free(rank)[0]
        snapshot, _ = self.snapshots.begin(rank, step, rank if session is None else session)
        self.slots.begin(slot, snapshot)
        return slot

    def seal(self, slot: Slot) -> list[Tell]:
        self.slots.sealing(slot, CAPACITY)
        assert slot.snapshot is not None
        self.snapshots.finish(slot.snapshot.key, slot.rank)
        self.slots.sealed(slot)
        return self.snapshots.arrive(slot.snapshot.key, MEMORY, slot.rank)

    def save(self, rank: int, step: int) -> list[Tell]:
        return self.seal(self.begin(rank, step))

    def steps_in_memory(self) -> list[tuple[int, int]]:
        self.slots.recycle()
        sealed = self.slots.sealed_images()
        return sorted((slot.rank, slot.snapshot.step) for slot in sealed if slot.snapshot is not None)


def events(tells: list[Tell]) -> list[tuple[str, str, int]]:
    return [(tell.event["event"], tell.event["level"], tell.event["step"]) for tell in tells]


def test_a_snapshot_is_complete_when_every_rank_has_sealed_it() -> None:
    world = World(ranks=2, slots_each=2)
    assert world.save(0, 1) == []
    assert events(world.save(1, 1)) == [("complete", MEMORY, 1)]


def test_a_slot_is_free_again_when_a_newer_snapshot_is_complete_and_not_before() -> None:
    world = World(ranks=2, slots_each=2)
    for rank in (0, 1):
        world.save(rank, 1)
    world.save(0, 2)
    assert world.steps_in_memory() == [(0, 1), (0, 2), (1, 1)]
    world.save(1, 2)
    assert world.steps_in_memory() == [(0, 2), (1, 2)]


def test_a_rank_one_step_ahead_finds_no_slot_before_the_others_have_followed() -> None:
    world = World(ranks=2, slots_each=2)
    for step in (1, 2):
        world.save(0, step)
    assert world.slots.recycle() == []
    assert world.free(0) == []
    world.save(1, 1)
    assert world.steps_in_memory() == [(0, 1), (0, 2), (1, 1)], "step 1 is the newest complete one"
    world.save(1, 2)
    assert world.steps_in_memory() == [(0, 2), (1, 2)]


def test_a_failed_step_frees_its_slots_and_keeps_the_complete_one_before_it() -> None:
    world = World(ranks=2, slots_each=2)
    for rank in (0, 1):
        world.save(rank, 1)
    world.save(0, 2)
    tells = world.snapshots.fail_step(MEMORY, 2, 1, "no buffer")
    assert events(tells) == [("failed", MEMORY, 2)]
    assert world.steps_in_memory() == [(0, 1), (1, 1)]


def test_a_pinned_slot_is_not_free_although_its_image_is_old() -> None:
    world = World(ranks=1, slots_each=2)
    world.save(0, 1)
    (pinned,) = world.slots.sealed_images()
    pinned.pins += 1
    world.save(0, 2)
    assert world.slots.recycle() == []
    pinned.pins -= 1
    assert world.slots.recycle() == [pinned]


def test_with_other_nodes_the_leader_is_asked_and_only_its_answer_completes_the_step() -> None:
    world = World(ranks=1, slots_each=2, world_size=2)
    assert events(world.save(0, 1)) == [("node", MEMORY, 1)]
    assert world.snapshots.newest_complete() is None
    assert events(world.snapshots.unanswered()) == [("node", MEMORY, 1)]
    assert events(world.snapshots.complete(MEMORY, 1)) == [("complete", MEMORY, 1)]
    assert world.snapshots.complete(MEMORY, 1) == [], "said once"


def test_a_step_that_the_leader_calls_complete_but_this_node_has_not_stays_open() -> None:
    world = World(ranks=2, slots_each=2, world_size=4)
    world.save(0, 1)
    assert world.snapshots.complete(MEMORY, 1) == []


def test_a_failure_in_memory_fails_the_other_levels_that_were_due() -> None:
    world = World(ranks=2, slots_each=2)
    slot = world.begin(0, 1)
    world.seal(slot)
    assert slot.snapshot is not None
    assert world.snapshots.due(slot.snapshot.key, DURABLE) == []
    tells = world.snapshots.fail_step(MEMORY, 1, 1, "torn")
    assert events(tells) == [("failed", MEMORY, 1), ("failed", DURABLE, 1)]
    assert events(world.snapshots.due(slot.snapshot.key, LOCAL)) == [("failed", LOCAL, 1)], "one that is due later too"


def test_a_failure_is_told_once_and_a_complete_step_does_not_fail() -> None:
    world = World(ranks=1, slots_each=2)
    world.save(0, 1)
    assert world.snapshots.fail_step(MEMORY, 1, 0, "too late") == []
    world.snapshots.fail_step(MEMORY, 2, 0, "first")
    assert world.snapshots.fail_step(MEMORY, 2, 0, "second") == []


def test_a_step_that_failed_before_anyone_began_it_fails_for_who_begins_it_later() -> None:
    world = World(ranks=2, slots_each=1)
    world.snapshots.fail_step(MEMORY, 1, 1, "no buffer")
    assert world.save(0, 1) == []
    assert world.steps_in_memory() == []


def test_when_a_trainer_ends_the_step_it_had_not_sealed_fails_and_the_one_it_had_can_still_be_whole() -> None:
    world = World(ranks=2, slots_each=3)
    world.save(0, 1)
    behind = world.begin(1, 1)
    world.begin(0, 2)
    assert events(world.snapshots.leave(0)) == [("failed", MEMORY, 2)]
    assert events(world.seal(behind)) == [("complete", MEMORY, 1)]


def test_new_trainers_do_not_join_a_step_that_the_old_ones_left_half_done() -> None:
    world = World(ranks=2, slots_each=3)
    world.save(0, 1)
    world.snapshots.leave(0)
    assert events(world.snapshots.greet(living={7})) == [("failed", MEMORY, 1)]
    world.seal(world.begin(1, 1, session=7))
    assert world.snapshots.newest_complete() is None, "rank 0's image of step 1 is of an earlier attempt"
    world.snapshots.greet(living={7, 8})
    assert events(world.seal(world.begin(0, 1, session=8))) == [("complete", MEMORY, 1)]


def test_a_run_that_goes_back_keeps_its_earlier_snapshot_until_a_new_one_is_complete() -> None:
    world = World(ranks=2, slots_each=3)
    for step in (9, 10):
        for rank in (0, 1):
            world.save(rank, step)
    world.save(0, 6)
    assert world.steps_in_memory() == [(0, 6), (0, 10), (1, 10)]
    world.save(1, 6)
    assert world.steps_in_memory() == [(0, 6), (1, 6)], "the new attempt counts, though its number is lower"


def test_images_of_another_world_size_stay_until_a_new_snapshot_is_complete() -> None:
    world = World(ranks=2, slots_each=2)
    for rank in (0, 1):
        world.save(rank, 10)
    world.snapshots.set_world(1, frozenset({0}))
    assert world.steps_in_memory() == [(0, 10), (1, 10)]
    world.save(0, 4)
    assert world.steps_in_memory() == [(0, 4)]


def test_an_adopted_image_stays_until_it_is_released_or_a_newer_snapshot_is_complete() -> None:
    world = World(ranks=1, slots_each=3)
    for released in (True, False):
        slot = world.free(0)[0]
        world.slots.load(slot)
        world.slots.adopted(slot, world.snapshots.adopt(50, 1), 0, CAPACITY)
        assert world.slots.recycle() == []
        if released:
            world.slots.release(slot)
        else:
            world.save(0, 51)
        assert world.slots.recycle() == [slot]


def test_an_image_of_the_run_cannot_be_released() -> None:
    world = World(ranks=1, slots_each=1)
    world.save(0, 1)
    with pytest.raises(ProtocolError, match="freed when a newer one"):
        world.slots.release(world.slots.sealed_images()[0])


def test_a_slot_of_another_rank_or_in_another_state_is_refused() -> None:
    world = World(ranks=2, slots_each=1)
    slot = world.begin(0, 1)
    with pytest.raises(ProtocolError, match="does not belong to rank 1"):
        world.slots.owned(slot.id, 1, SlotState.FILLING)
    with pytest.raises(ProtocolError, match="is filling"):
        world.slots.owned(slot.id, 0, SlotState.FREE)
    with pytest.raises(ProtocolError, match="101 bytes"):
        world.slots.sealing(slot, CAPACITY + 1)


def test_of_two_attempts_at_a_step_the_complete_one_is_read() -> None:
    world = World(ranks=2, slots_each=2)
    for rank in (0, 1):
        world.save(rank, 1)
    (complete,) = [slot for slot in world.slots.sealed_images() if slot.rank == 0]
    world.save(0, 1)
    assert world.slots.find(0, 1, None) is complete
    assert world.slots.find(0, 1, 3) is None


def test_thousands_of_steps_failed_or_complete_leave_no_trace() -> None:
    world = World(ranks=1, slots_each=2)
    for step in range(2000):
        if step % 3 == 0:
            world.snapshots.fail_step(MEMORY, step, 0, "no buffer")
        else:
            world.save(0, step)
        world.slots.recycle()
        world.snapshots.forget({slot.snapshot.key for slot in world.slots.all() if slot.snapshot})
        assert len(world.snapshots) <= 3
    for step in range(3000, 3600):
        world.snapshots.fail_step(MEMORY, step, 0, "no buffer")
        world.snapshots.forget({slot.snapshot.key for slot in world.slots.all() if slot.snapshot})
    assert len(world.snapshots) <= 300
    newest = world.snapshots.newest_complete()
    assert newest is not None
    assert newest.step == 1999


class Ranks(RuleBasedStateMachine):
    """Ranks that save, fail, die, come back and go back, in any order, against the law and against progress."""

    filling = Bundle("filling")
    pinned = Bundle("pinned")

    @initialize(ranks=st.integers(1, 3), slots=st.integers(2, 3), others=st.booleans())
    def start(self, ranks: int, slots: int, others: bool) -> None:
        self.ranks = ranks
        self.world = World(ranks, slots, world_size=ranks + others)
        self.next_step = dict.fromkeys(range(ranks), 1)
        self.session = dict.fromkeys(range(ranks), 0)
        self.next_session = 1
        for rank in range(ranks):
            self.come(rank)
        self.newest: Snapshot | None = None

    def come(self, rank: int) -> None:
        self.session[rank], self.next_session = self.next_session, self.next_session + 1
        self.world.snapshots.greet(set(self.session.values()))

    @rule(target=filling, rank=st.integers(0, 2))
    def begin(self, rank: int) -> object:
        rank %= self.ranks
        if not self.world.free(rank):
            return multiple()
        slot = self.world.begin(rank, self.next_step[rank], self.session[rank])
        self.next_step[rank] += 1
        return slot.id, slot.fill

    def _slot(self, use: tuple[int, int]) -> Slot | None:
        slot = next(slot for slot in self.world.slots.all() if slot.id == use[0])
        return slot if slot.fill == use[1] and slot.state is SlotState.FILLING else None

    @rule(use=consumes(filling))
    def seal(self, use: tuple[int, int]) -> None:
        if (slot := self._slot(use)) is not None:
            self.world.seal(slot)

    @rule(use=consumes(filling))
    def abort(self, use: tuple[int, int]) -> None:
        if (slot := self._slot(use)) is not None:
            assert slot.snapshot is not None
            key = slot.snapshot.key
            self.world.slots.clear(slot)
            self.world.snapshots.fail(key, MEMORY, slot.rank, "aborted")

    @rule(rank=st.integers(0, 2))
    def skip(self, rank: int) -> None:
        rank %= self.ranks
        self.world.snapshots.fail_step(MEMORY, self.next_step[rank], rank, "skipped")
        self.next_step[rank] += 1

    @rule(rank=st.integers(0, 2))
    def die_and_come_back(self, rank: int) -> None:
        rank %= self.ranks
        for slot in self.world.slots.of(rank):
            if slot.state is SlotState.FILLING:
                self.world.slots.clear(slot)
        self.world.snapshots.leave(rank)
        self.come(rank)

    @rule(back=st.integers(0, 4))
    def all_go_back(self, back: int) -> None:
        step = max(1, min(self.next_step.values()) - back)
        for rank in range(self.ranks):
            self.die_and_come_back(rank)
        self.next_step = dict.fromkeys(range(self.ranks), step)

    @rule(step=st.integers(1, 30))
    def leader_hears(self, step: int) -> None:
        self.world.snapshots.complete(MEMORY, step)

    @rule(target=pinned, number=st.integers(0, 10))
    def pin(self, number: int) -> object:
        sealed = self.world.slots.sealed_images()
        if not sealed:
            return multiple()
        slot = sealed[number % len(sealed)]
        slot.pins += 1
        return slot.id, slot.fill

    @rule(use=consumes(pinned))
    def unpin(self, use: tuple[int, int]) -> None:
        (slot,) = [slot for slot in self.world.slots.all() if slot.id == use[0]]
        assert slot.fill == use[1], "a pinned slot was used again"
        slot.pins -= 1

    @rule()
    def recycle(self) -> None:
        self.world.slots.recycle()
        self.world.snapshots.forget({slot.snapshot.key for slot in self.world.slots.all() if slot.snapshot})

    @invariant()
    def the_newest_complete_snapshot_is_whole(self) -> None:
        if not hasattr(self, "world"):
            return
        self.world.slots.recycle()
        newest = self.world.snapshots.newest_complete()
        assert newest is not None or self.newest is None, "a complete snapshot was forgotten"
        self.newest = newest
        if newest is not None:
            held = {slot.rank for slot in self.world.slots.sealed_images() if slot.snapshot is newest}
            assert held == set(range(self.ranks))

    @invariant()
    def the_snapshots_of_the_running_attempt_do_not_go_backwards(self) -> None:
        if not hasattr(self, "world"):
            return
        newest = self.world.snapshots.newest_complete()
        current = [
            each for each in self.world.snapshots.all() if each.is_complete() and not each.superseded and not each.gone
        ]
        assert not current or newest is max(current, key=lambda each: each.step)


TestRanks = Ranks.TestCase
TestRanks.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)


@pytest.mark.parametrize("seed", range(20))
def test_ranks_at_most_one_step_apart_always_get_on_with_two_slots(seed: int) -> None:
    chance = random.Random(seed)
    world = World(ranks=3, slots_each=2)
    done = {0: 0, 1: 0, 2: 0}
    while min(done.values()) < 30:
        rank = chance.choice([rank for rank in done if done[rank] <= min(done.values())])
        world.save(rank, done[rank] + 1)
        done[rank] += 1
        world.slots.recycle()
        newest = world.snapshots.newest_complete()
        assert (newest.step if newest else 0) == min(done.values())
    assert all(progress is Progress.COMPLETE for each in world.snapshots.all() for progress in each.progress.values())
