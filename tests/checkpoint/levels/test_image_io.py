"""Images and records on a store: in the right order, in either encoding, and never half."""

import errno
from collections.abc import Iterable
from dataclasses import replace

import pytest

from resilient.checkpoint.digest import digest
from resilient.checkpoint.levels.image_io import (
    chunks_of,
    read_image_range,
    read_record,
    write_image,
)
from resilient.checkpoint.levels.store import MemoryStore
from resilient.checkpoint.names import complete_steps, digests_name, image_name, record_name
from resilient.checkpoint.record import Record
from resilient.errors import DamagedImage, LevelFailed, NewerFormat, NotACheckpoint, PolicyError
from tests.conformance.store_contract import get, put

DATA = bytes(range(256)) * 1000


def record(step: int = 7, rank: int = 0, world_size: int = 2) -> Record:
    return Record(
        run_id="run",
        step=step,
        rank=rank,
        world_size=world_size,
        plan_digest="0" * 32,
        image_name=image_name(step, rank, world_size),
        image_bytes=len(DATA),
        blocks=(digest(DATA),),
    )


def chunks() -> Iterable[memoryview]:
    return chunks_of(memoryview(DATA), 60_000)


def never() -> bool:
    return False


@pytest.mark.parametrize("compression", [None, "zstd"])
def test_an_image_and_its_record_come_back(compression: str | None) -> None:
    store = MemoryStore()
    stored = write_image(store, record(), chunks, compression=compression, cancelled=never)
    assert read_record(store, 7, 0, 2) == stored
    assert (stored.encoding is None) == (compression is None)
    assert replace(stored, encoding=None, fine=None) == record()
    for offset, length in [(0, len(DATA)), (1, 5), (len(DATA) - 3, 3), (10, 0)]:
        into = bytearray(length)
        read_image_range(store, stored, offset, memoryview(into))
        assert into == DATA[offset : offset + length]


@pytest.mark.parametrize("compression", [None, "zstd"])
def test_a_range_outside_of_the_image_is_refused(compression: str | None) -> None:
    store = MemoryStore()
    stored = write_image(store, record(), chunks, compression=compression, cancelled=never)
    for offset, length in [(-1, 1), (len(DATA), 1), (0, len(DATA) + 1)]:
        with pytest.raises(ValueError, match="outside"):
            read_image_range(store, stored, offset, memoryview(bytearray(length)))


def test_the_record_is_written_last() -> None:
    class Ordered(MemoryStore):
        written: list[str] = []  # noqa: RUF012

        def write(self, name: str, chunks: Iterable[memoryview], *, exclusive: bool = False) -> None:
            super().write(name, chunks, exclusive=exclusive)
            self.written.append(name)

    store = Ordered()
    write_image(store, record(), chunks, cancelled=never)
    assert store.written == [image_name(7, 0, 2), digests_name(7, 0, 2), record_name(7, 0, 2)]


@pytest.mark.parametrize("after", range(6))
@pytest.mark.parametrize("compression", [None, "zstd"])
def test_a_cancelled_write_leaves_no_record(after: int, compression: str | None) -> None:
    store = MemoryStore()
    asked = iter(range(100))
    with pytest.raises(LevelFailed, match="cancelled") as caught:
        write_image(store, record(), chunks, compression=compression, cancelled=lambda: next(asked) >= after)
    assert caught.value.errno == errno.ECANCELED
    assert record_name(7, 0, 2) not in store.list()
    assert (image_name(7, 0, 2) in store.list()) == (after == 5)


def test_an_unknown_compression_is_refused_before_anything_is_written() -> None:
    store = MemoryStore()
    with pytest.raises(PolicyError, match="lz5"):
        write_image(store, record(), chunks, compression="lz5", cancelled=never)
    assert store.list() == []


def test_chunks_that_do_not_add_up_are_our_own_defect() -> None:
    store = MemoryStore()
    with pytest.raises(AssertionError, match="256000"):
        write_image(store, record(), lambda: [memoryview(b"short")], cancelled=never)
    assert store.list() == []


def test_a_record_that_is_not_there_is_reported_as_absent() -> None:
    with pytest.raises(FileNotFoundError):
        read_record(MemoryStore(), 7, 0, 2)


def test_a_record_under_the_name_of_another_is_damage() -> None:
    store = MemoryStore()
    write_image(store, record(), chunks, cancelled=never)
    put(store, record_name(8, 0, 2), get(store, record_name(7, 0, 2)))
    with pytest.raises(DamagedImage, match="renamed or copied"):
        read_record(store, 8, 0, 2)


@pytest.mark.parametrize(
    ("text", "error"), [(b"{", DamagedImage), (b'{"format":"x"}', NotACheckpoint), (b"\xff", DamagedImage)]
)
def test_a_record_that_is_none_is_told(text: bytes, error: type[Exception]) -> None:
    store = MemoryStore()
    put(store, record_name(7, 0, 2), text)
    with pytest.raises(error, match="rank_00000-of-00002.json"):
        read_record(store, 7, 0, 2)


def test_an_encoding_of_a_later_version_asks_for_an_upgrade() -> None:
    with pytest.raises(NewerFormat, match="upgrade"):
        read_image_range(MemoryStore(), replace(record(), encoding={"name": "new"}), 0, memoryview(bytearray(1)))


def test_a_snapshot_is_complete_when_every_rank_has_its_record() -> None:
    store = MemoryStore()
    write_image(store, record(rank=0), chunks, cancelled=never)
    assert complete_steps(store.list()) == {}
    write_image(store, record(rank=1), chunks, cancelled=never)
    assert complete_steps(store.list()) == {7: 2}


def test_chunks_are_slices_of_the_same_memory() -> None:
    memory = bytearray(10)
    pieces = list(chunks_of(memoryview(memory), 4))
    memory[:] = b"0123456789"
    assert [bytes(piece) for piece in pieces] == [b"0123", b"4567", b"89"]
