"""The index on a store: what is not right is never used, and while the plans stay the records are hardly read."""

from collections.abc import Callable, Iterable
from dataclasses import replace

import pytest

from resilient.checkpoint.catalog.index import Index
from resilient.checkpoint.levels import index_io
from resilient.checkpoint.levels.index_io import (
    IndexKeeper,
    current_index,
    make_index,
    mend_index,
    read_index,
    stored_index,
    write_index,
)
from resilient.checkpoint.levels.store import MemoryStore
from resilient.checkpoint.names import catalog_name, record_name
from resilient.checkpoint.record import HEAD_BYTES, Record, parse_head, parse_record
from tests.checkpoint.catalog.test_index import SIZE, record_of, records

STEP = 3


class CountingStore(MemoryStore):
    """`bytes_read`: how much of records was asked for."""

    bytes_read = 0

    def read(self, name: str, offset: int, into: memoryview) -> None:
        super().read(name, offset, into)
        self.bytes_read += into.nbytes


def stored(found: Iterable[Record], store: MemoryStore | None = None) -> MemoryStore:
    store = CountingStore() if store is None else store
    for one in found:
        store.write(record_name(one.step, one.rank, one.world_size), [memoryview(one.text().encode())])
    return store


def of_step(step: int, life: str = "first") -> list[Record]:
    """The records of another step: objects are of other lengths there."""
    return [replace(record_of(one.rank, one.pieces(), step=step), life=life) for one in records()]


def index_at(step: int = STEP, life: str = "first") -> Index:
    return make_index(stored(of_step(step, life)), step, range(SIZE), SIZE)


def never() -> bool:
    return False


def test_the_stored_index_is_used_when_it_is_right() -> None:
    store = stored(of_step(STEP))
    assert stored_index(store, STEP, SIZE) == (None, "")
    assert mend_index(store, STEP, SIZE)
    index, problem = stored_index(store, STEP, SIZE)
    assert index is not None
    assert (index.text(), problem) == (index_at().text(), "")
    assert not mend_index(store, STEP, SIZE)


WRONG: dict[str, Callable[[MemoryStore], object]] = {
    "is no whole catalog": lambda store: store.write(catalog_name(STEP), [memoryview(b'{"format":1}')]),
    "is of step 4": lambda store: put(store, index_at(4)),
    "is of another attempt": lambda store: put(store, index_at(life="second")),
    "is not of all ranks": lambda store: put(store, make_index(store, STEP, range(3), SIZE)),
    "is of another attempt at the step than": lambda store: stored([replace(of_step(STEP)[2], plan_digest="x")], store),
    "another attempt at the step": lambda store: store.delete([record_name(STEP, 1, SIZE)]),
}


def put(store: MemoryStore, index: Index) -> None:
    store.write(catalog_name(STEP), [memoryview(index.text().encode())])


@pytest.mark.parametrize("what", WRONG)
def test_one_that_is_not_right_is_not_used(what: str) -> None:
    store = stored(of_step(STEP))
    write_index(store, index_at())
    WRONG[what](store)
    index, problem = stored_index(store, STEP, SIZE)
    assert index is None
    assert what in problem
    if record_name(STEP, 1, SIZE) in store.list():
        assert current_index(store, STEP, SIZE).text() == make_index(store, STEP, range(SIZE), SIZE).text()
        assert mend_index(store, STEP, SIZE)
        assert stored_index(store, STEP, SIZE)[0] is not None


def test_while_the_plans_are_the_same_only_the_beginnings_of_records_are_read() -> None:
    keeper, store = IndexKeeper(), CountingStore()
    long = [replace(one, software={"x": "y" * 100_000}) for one in of_step(1)]
    stored(long, store)
    assert keeper.keep(store, 1, SIZE, never) is not None
    for step, life in ((2, "first"), (3, "second")):
        stored([replace(one, software={"x": "y" * 100_000}) for one in of_step(step, life)], store)
        before = store.bytes_read
        assert keeper.keep(store, step, SIZE, never) is not None
        assert store.bytes_read - before <= SIZE * HEAD_BYTES
        assert read_index(store, step, SIZE).text() == index_at(step, life).text()


def test_another_plan_is_found_out() -> None:
    keeper, store = IndexKeeper(), stored(of_step(1))
    keeper.keep(store, 1, SIZE, never)
    changed = of_step(2)
    pieces = changed[5].pieces()
    pieces[1]["offset"] = 512
    changed[5] = record_of(5, pieces, step=2)
    stored(changed, store)
    keeper.keep(store, 2, SIZE, never)
    assert read_index(store, 2, SIZE).text() == make_index(store, 2, range(SIZE), SIZE).text()
    assert read_index(store, 2, SIZE).text() != index_at(2).text()


def test_none_is_kept_of_two_lives_nor_of_what_was_given_up() -> None:
    store = stored([*of_step(STEP)[:3], *of_step(STEP, "second")[3:]])
    assert IndexKeeper().keep(store, STEP, SIZE, never) is None
    assert IndexKeeper().keep(stored(of_step(STEP), store), STEP, SIZE, lambda: True) is None
    assert catalog_name(STEP) not in store.list()


def test_records_that_are_very_long_together_are_left_to_who_needs_them() -> None:
    store = CountingStore()
    name = record_name(STEP, 0, SIZE)
    store.write(name, [memoryview(bytes(index_io.MOST_RECORD_BYTES // SIZE + 1))])
    assert IndexKeeper().keep(store, STEP, SIZE, never) is None
    assert store.bytes_read == 0


def test_the_beginning_of_a_record_says_what_all_of_it_does() -> None:
    record = of_step(STEP)[4]
    text = record.text().encode()
    head = parse_head(text[:HEAD_BYTES])
    assert head is not None
    whole = parse_record(text, "it")
    assert all(getattr(head, name) == getattr(whole, name) for name in head._fields)


@pytest.mark.parametrize("text", [b"", b"{", b'{"digest":"x",\n"format":"resilient"', b'"blocks":[', b"\xff" * 50])
def test_what_is_no_beginning_of_a_record_says_nothing(text: bytes) -> None:
    assert parse_head(text) is None


def test_a_record_that_does_not_say_where_the_data_begins_is_asked_of_its_image() -> None:
    one = replace(record_of(0, [], size=1), data_start=None)
    store = stored([one])
    image = (4096 - 8).to_bytes(8, "little") + bytes(100)
    store.write(one.image_name, [memoryview(image)])
    assert make_index(store, STEP, [0], 1).members[0].data_start == 4096
