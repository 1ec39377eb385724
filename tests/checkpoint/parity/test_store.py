"""Parity shards in memory: what is there, what is not, and memory that comes back and never grows."""

from collections.abc import Iterator

import pytest

from resilient.checkpoint.parity.layout import Layout, Member, Stripe, layout_of
from resilient.checkpoint.parity.memory import Arenas, Blocks, copy, zero
from resilient.checkpoint.parity.store import ParityStore
from resilient.errors import DamagedImage, LevelFailed, OverBudget

BLOCK = 16
KEY = ("x", 3)


def layout(step: int = 3, nbytes: int = 100) -> Layout:
    members = tuple(Member(node=name, ranks=(rank,), image_bytes=(nbytes,)) for rank, name in enumerate("abc"))
    return layout_of(Stripe(life="x", step=step, world_size=3, m=1, block_bytes=BLOCK, members=members))


@pytest.fixture
def store() -> Iterator[ParityStore]:
    made = ParityStore("a")
    made.expect(layout(), 0)
    yield made
    made.close()


def fill(store: ParityStore, key: tuple[str, int] = KEY) -> None:
    made = layout(key[1])
    for number in range(made.blocks(0)):
        nbytes = made.nbytes(0, number)
        with store.take(key, 0, 0, number * BLOCK, nbytes) as into:
            into[:] = bytes([number + 1]) * nbytes


def test_a_block_is_lent_once_it_is_there(store: ParityStore) -> None:
    assert store.whole() == {KEY: []}
    with pytest.raises(LevelFailed, match="is not .* on node a"), store.lend(KEY, 0, 0, 0, BLOCK):
        pass
    fill(store)
    assert store.whole() == {KEY: [(0, 0)]}
    with store.lend(KEY, 0, 0, BLOCK, BLOCK) as lent:
        assert bytes(lent) == bytes([2]) * BLOCK
        assert lent.readonly


def test_only_whole_blocks_of_shards_that_are_kept_here_are_taken(store: ParityStore) -> None:
    for key, row, j, offset, nbytes in (
        (("x", 4), 0, 0, 0, BLOCK),
        (KEY, 1, 0, 0, BLOCK),
        (KEY, 0, 1, 0, BLOCK),
        (KEY, 0, 0, 1, BLOCK),
        (KEY, 0, 0, 0, BLOCK - 1),
        (KEY, 0, 0, BLOCK * 99, BLOCK),
        (KEY, 0, 0, -BLOCK, BLOCK),
        (KEY, 0, 0, 0, 0),
        (KEY, 0, 0, 0, 2 * BLOCK - 1),
        (KEY, 0, 0, 2 * BLOCK, layout().parity_bytes(0)),
    ):
        with pytest.raises(LevelFailed), store.take(key, row, j, offset, nbytes):
            pass


def test_several_blocks_are_taken_and_lent_as_one(store: ParityStore) -> None:
    size = layout().parity_bytes(0)
    with store.take(KEY, 0, 0, BLOCK, size - BLOCK) as into:
        into[:] = bytes(range(BLOCK, size))
    with pytest.raises(LevelFailed, match="block 0 of .* is not"), store.lend(KEY, 0, 0, 0, size):
        pass
    with store.take(KEY, 0, 0, 0, BLOCK) as into:
        into[:] = bytes(range(BLOCK))
    assert store.whole() == {KEY: [(0, 0)]}
    with store.lend(KEY, 0, 0, 0, size) as lent:
        assert bytes(lent) == bytes(range(size))
    with pytest.raises(DamagedImage), store.take(KEY, 0, 0, 0, 2 * BLOCK):
        raise DamagedImage("wrong digest")
    with store.lend(KEY, 0, 0, 2 * BLOCK, size - 2 * BLOCK) as lent:
        assert bytes(lent) == bytes(range(2 * BLOCK, size))
    with store.take(KEY, 0, 0, 0, BLOCK) as into:
        into[:] = bytes(range(BLOCK))
    with pytest.raises(LevelFailed, match="block 1 of .* is not"), store.lend(KEY, 0, 0, 0, size):
        pass


def test_blocks_with_a_gap_between_them_are_not_taken_as_one() -> None:
    sizes = (BLOCK + 4, BLOCK + 4)
    members = tuple(Member(node=name, ranks=ranks, image_bytes=sizes) for name, ranks in (("a", (0, 1)), ("b", (2, 3))))
    made = layout_of(Stripe(life="x", step=3, world_size=4, m=1, block_bytes=BLOCK, members=members))
    assert [made.nbytes(0, number) for number in range(4)] == [BLOCK, 4, BLOCK, 4]
    store = ParityStore("a")
    store.expect(made, 0)
    for nbytes in (BLOCK, BLOCK + 4):
        with store.take(KEY, 0, 0, 0, nbytes) as into:
            assert into.nbytes == nbytes
    with pytest.raises(LevelFailed, match="no whole blocks"), store.take(KEY, 0, 0, 0, 2 * BLOCK + 4):
        pass


def test_a_torn_repetition_leaves_a_block_there_and_a_damaged_one_does_not(store: ParityStore) -> None:
    fill(store)
    with pytest.raises(LevelFailed, match="torn"), store.take(KEY, 0, 0, 0, BLOCK):
        raise LevelFailed("torn")
    assert store.whole() == {KEY: [(0, 0)]}
    with pytest.raises(DamagedImage), store.take(KEY, 0, 0, 0, BLOCK):
        raise DamagedImage("wrong digest")
    assert store.whole() == {KEY: []}


def test_what_is_sealed_takes_nothing_more(store: ParityStore) -> None:
    fill(store)
    store.seal(KEY)
    assert store.sealed() == [(*KEY, 0, 0)]
    with pytest.raises(LevelFailed, match="sealed"), store.take(KEY, 0, 0, 0, BLOCK):
        pass
    with store.mend(KEY, 0, 0, 0) as block:
        assert bytes(block) == bytes([1]) * BLOCK


def test_memory_in_use_outlives_its_snapshot(store: ParityStore) -> None:
    fill(store)
    with store.lend(KEY, 0, 0, 0, BLOCK) as lent:
        store.free(KEY)
        store.expect(layout(4), 0)
        with store.take(("x", 4), 0, 0, 0, BLOCK) as into:
            into[:] = b"\xff" * BLOCK
        assert bytes(lent) == bytes([1]) * BLOCK
    assert store.whole() == {("x", 4): []}


def test_memory_is_used_again_and_does_not_grow(store: ParityStore) -> None:
    most = store.total_bytes
    for step in range(4, 30):
        store.expect(layout(step), 0)
        store.expect(layout(step), 0)
        most = max(most, store.total_bytes) if step < 6 else most
        fill(store, ("x", step))
        store.free(("x", step - 1))
        store.free(("x", step - 1))
    assert store.total_bytes <= most
    store.close()
    assert store.total_bytes == 0


def test_the_budget_is_kept() -> None:
    store = ParityStore("a", budget_bytes=100 // 2)  # one parity of two images of 100 bytes, which takes whole blocks
    store.expect(layout(), 0)
    assert store.total_bytes > 100 // 2
    with pytest.raises(OverBudget, match="raise memory_budget"):
        store.expect(layout(4), 0)
    assert KEY in store.whole()
    store.free(KEY)
    store.expect(layout(4), 0)


def test_a_push_waits_for_a_stripe_that_is_not_yet_known() -> None:
    store = ParityStore("a")
    with pytest.raises(LevelFailed, match="is not kept"), store.take(KEY, 0, 0, 0, BLOCK, wait_s=0.0):
        pass
    store.expect(layout(), 0)
    with store.take(KEY, 0, 0, 0, BLOCK, wait_s=60.0) as into:
        assert into.nbytes == BLOCK


def test_idle_arenas_are_no_more_than_those_in_use() -> None:
    arenas = Arenas()
    pieces = [arenas.take(1 << 16) for _ in range(4)]
    for piece in pieces[1:]:
        arenas.give(piece)
    assert (arenas.used_bytes, arenas.total_bytes) == (1 << 16, 2 << 16)
    assert arenas.take(60_000).nbytes == 1 << 16
    assert arenas.take(10).nbytes == 10


def test_copies_and_zeros() -> None:
    blocks = Blocks(64, kept=1)
    one, other = blocks.take(), blocks.take()
    copy(one, memoryview(bytes(range(64))))
    copy(other, one)
    assert bytes(other) == bytes(range(64))
    zero(other[3:5])
    assert bytes(other[2:6]) == b"\x02\x00\x00\x05"
    with pytest.raises(ValueError, match="bytes into"):
        copy(one, other[:3])
    blocks.give(one)
    blocks.give(other)
    assert blocks.idle_bytes == 64
    assert not any(blocks.zeros())
