"""Whose records count when places disagree, and repair between levels that keep images in different forms."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from resilient.checkpoint.digest import BLOCK_BYTES, block_count, digest
from resilient.checkpoint.formats.native_repair import Mended, Repair, Told, decide, world_size_of
from resilient.checkpoint.levels.files import FileStore
from resilient.checkpoint.levels.image_io import chunks_of, read_image_range, read_record, write_image
from resilient.checkpoint.levels.store import MemoryStore, Store
from resilient.checkpoint.names import catalog_name, image_name, record_name
from resilient.checkpoint.record import Record
from resilient.errors import NotACheckpoint

STEP, RANKS = 7, 2
DATA = bytes(range(256)) * (3 * BLOCK_BYTES // 256) + b"the end"


def record(rank: int, life: str = "a") -> Record:
    blocks = tuple(digest(bytes(block)) for block in chunks_of(memoryview(DATA), BLOCK_BYTES))
    return Record(
        run_id="run",
        life=life,
        step=STEP,
        rank=rank,
        world_size=RANKS,
        plan_digest="",
        image_name=image_name(STEP, rank, RANKS),
        image_bytes=len(DATA),
        blocks=blocks,
    )


def fill(store: Store, *, compression: str | None, life: str = "a", ranks: tuple[int, ...] = (0, 1)) -> Store:
    for rank in ranks:
        write_image(
            store,
            record(rank, life),
            lambda: chunks_of(memoryview(DATA)),
            compression=compression,
            cancelled=lambda: False,
        )
    return store


def repair(*stores: Store, dry: bool = False) -> list[Mended]:
    return list(Repair(stores, STEP, lambda _: None).run(dry=dry))


def harm(store: Store, name: str, offset: int) -> None:
    data = bytearray(store.size(name))
    store.read(name, 0, memoryview(data))
    data[offset] ^= 1
    store.write(name, [memoryview(data)])


@pytest.mark.parametrize(("here", "there"), [(None, "zstd"), ("zstd", None), ("zstd", "zstd"), (None, None)])
@pytest.mark.parametrize("lost", [True, False])
def test_levels_that_keep_images_in_other_forms_repair_one_another(
    here: str | None, there: str | None, lost: bool
) -> None:
    broken, whole = fill(MemoryStore(), compression=here), fill(MemoryStore(), compression=there)
    before = {name: broken.size(name) for name in broken.list()}
    harm(broken, image_name(STEP, 0, RANKS), 200)
    if lost:
        broken.delete([record_name(STEP, 0, RANKS)])
    outcomes = repair(broken, whole)
    assert [one.outcome for one in outcomes] == ["repaired", "well"]
    assert outcomes[0].sources == (whole.url,)
    if not (lost and here != there):  # what is left of such an image cannot be told apart from the other form
        assert outcomes[0].blocks == 1
    after = {name: broken.size(name) for name in broken.list()}
    assert after.pop(catalog_name(STEP)) > 0, "a complete snapshot has its index again"
    assert after == before
    stored = read_record(broken, STEP, 0, RANKS)
    assert (stored.encoding is None) == (here is None)
    found = memoryview(bytearray(len(DATA)))
    read_image_range(broken, stored, 0, found)
    assert bytes(found) == DATA


def test_each_block_may_come_from_another_place_and_none_that_is_bad_is_taken() -> None:
    places = [fill(MemoryStore(f"memory://{number}"), compression=None) for number in range(3)]
    name = image_name(STEP, 0, RANKS)
    for place, blocks in enumerate([(0, 2), (0,), (2,)]):
        for block in blocks:
            harm(places[place], name, block * BLOCK_BYTES + 5)
    (first, _) = repair(*places, dry=True)
    assert (first.outcome, first.blocks) == ("repairable", 2)
    assert first.sources == ("memory://1", "memory://2")
    (first, _) = repair(*places)
    assert first.outcome == "repaired"
    assert repair(places[0])[0].outcome == "well"
    assert repair(places[1])[0].outcome == "lost"


def test_a_place_that_cannot_be_read_is_passed_over(tmp_path: Path) -> None:
    broken, whole = fill(MemoryStore(), compression=None), fill(FileStore(str(tmp_path / "a")), compression=None)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    (tmp_path / "b" / image_name(STEP, 0, RANKS)).write_bytes(b"short")
    harm(broken, image_name(STEP, 0, RANKS), 5)
    assert repair(broken, FileStore(str(tmp_path / "b")), whole)[0].outcome == "repaired"


def told(*lives: str) -> dict[int, Told]:
    return {
        rank: Told(record=replace(record(0), rank=rank, world_size=len(lives), life=life) if life else None)
        for rank, life in enumerate(lives)
    }


def test_the_life_counts_of_which_most_ranks_are_anywhere() -> None:
    assert decide([told("a", ""), told("", "a")]).places == {0: 0, 1: 1}
    assert decide([told("b", ""), told("a", "a")]).life == "a"
    assert decide([told("b", ""), told("a", "a")]).places == {0: 1, 1: 1}
    assert decide([told("a", "a"), told("b", "b")]).life == "a"  # what is here already
    assert decide([told("", ""), told("a", "a"), told("b", "b")]).life == "b"  # the newer one
    assert decide([told("", "")]).places == {0: None, 1: None}


def test_what_no_place_knows_is_no_checkpoint() -> None:
    with pytest.raises(NotACheckpoint, match="no record of step 7"):
        world_size_of([MemoryStore()], STEP)
    assert world_size_of([MemoryStore(), fill(MemoryStore(), compression=None, ranks=(1,))], STEP) == RANKS
    assert block_count(len(DATA)) == 4
