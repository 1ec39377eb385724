"""Which buffers are kept where there is parity: law 4 for data and parity together, and never a standstill."""

from resilient.checkpoint.agent.snapshots import MEMORY, PARITY, Snapshot
from tests.checkpoint.agent.test_slots import World


class Protected(World):
    """One node of two, with one rank and two slots; the other node always follows."""

    def __init__(self, slots_each: int = 2) -> None:
        super().__init__(ranks=1, slots_each=slots_each, world_size=2)

    def saved(self, step: int) -> Snapshot:
        """A snapshot that is complete in memory, everywhere, and waits for its parity."""
        self.slots.recycle()
        slot = self.begin(0, step)
        snapshot = slot.snapshot
        assert snapshot is not None
        snapshot.life = "life"
        self.snapshots.due(snapshot.key, PARITY)
        self.seal(slot)
        self.snapshots.complete(MEMORY, step)
        self.slots.recycle()
        return snapshot

    def protect(self, snapshot: Snapshot) -> None:
        self.snapshots.arrive(snapshot.key, PARITY, 0)
        self.snapshots.complete(PARITY, snapshot.step)

    def steps(self) -> list[int]:
        return [step for _, step in self.steps_in_memory()]


def test_what_has_parity_stays_until_something_newer_has_it() -> None:
    world = Protected()
    world.protect(world.saved(1))
    second = world.saved(2)
    assert world.steps() == [1, 2]
    assert world.free(0) == []
    world.protect(second)
    assert world.steps() == [2]
    assert world.snapshots.wanted_parity() == {("life", 2)}


def test_parity_that_this_node_has_but_others_may_not_have_does_not_count_yet() -> None:
    world = Protected()
    world.protect(world.saved(1))
    second = world.saved(2)
    world.snapshots.arrive(second.key, PARITY, 0)
    assert world.steps() == [1, 2]
    assert world.snapshots.wanted_parity() == {("life", 1), ("life", 2)}


def test_a_snapshot_that_failed_to_get_parity_gives_way_to_the_next_one() -> None:
    world = Protected()
    world.protect(world.saved(1))
    second = world.saved(2)
    world.snapshots.fail(second.key, PARITY, 0, "a peer is gone")
    assert world.steps() == [1], "what survives the loss of a node is worth more"
    third = world.saved(3)
    world.protect(third)
    assert world.steps() == [3]


def test_what_had_parity_long_ago_is_not_kept_for_ever() -> None:
    world = Protected()
    world.protect(world.saved(1))
    for step in (2, 3):
        world.snapshots.fail(world.saved(step).key, PARITY, 0, "no room for parity")
    assert world.steps() == [3]
    assert world.snapshots.wanted_parity() == set()
    world.protect(world.saved(4))
    assert world.snapshots.wanted_parity() == {("life", 4)}


def test_what_never_heard_that_all_have_its_parity_gives_way_to_what_has_it() -> None:
    """The trainers that should have told one another were killed."""
    world = Protected()
    first = world.saved(1)
    world.snapshots.arrive(first.key, PARITY, 0)
    world.protect(world.saved(2))
    assert world.steps() == [2]
    assert world.snapshots.wanted_parity() == {("life", 2)}


def test_without_parity_in_the_new_policy_the_protected_snapshot_is_let_go() -> None:
    world = Protected()
    world.protect(world.saved(1))
    world.seal(world.begin(0, 2))
    world.snapshots.complete(MEMORY, 2)
    assert world.steps() == [2]


def test_where_nothing_has_parity_the_newest_complete_snapshot_is_kept_as_ever() -> None:
    world = Protected()
    world.snapshots.fail(world.saved(1).key, PARITY, 0, "no")
    assert world.steps() == [1]
    world.seal(world.begin(0, 2))
    assert world.steps() == [1, 2]
