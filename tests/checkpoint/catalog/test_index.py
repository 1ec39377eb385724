"""The merged index: in whatever parts and order it is made it is the same, and what is no index is refused by name."""

import json
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.big_job import WAYS, part_of
from bench.big_job import index_of as index_of_big_job
from resilient.checkpoint.catalog.index import index_of, merged, parse_index
from resilient.checkpoint.catalog.native import native_catalog
from resilient.checkpoint.digest import BLOCK_BYTES, digest
from resilient.checkpoint.names import image_name
from resilient.checkpoint.record import Record
from resilient.errors import DamagedImage, NewerFormat
from tests.checkpoint.catalog.made import at, steady
from tests.checkpoint.catalog.test_native import piece

SIZE = 6


def record_of(rank: int, pieces: list[dict[str, Any]], *, size: int = SIZE, step: int = 3) -> Record:
    return Record(
        run_id="r",
        life="first",
        step=step,
        rank=rank,
        world_size=size,
        plan_digest=digest(json.dumps(pieces).encode()),
        image_name=image_name(step, rank, size),
        image_bytes=BLOCK_BYTES - rank,
        blocks=("0" * 32,),
        pieces_text=json.dumps(pieces),
        data_start=4096,
    )


def records() -> list[Record]:
    """Rows of one tensor on all ranks, something of its own on each, two stages with groups of their own, a tie."""
    found = []
    for rank in range(SIZE):
        pieces = [
            piece("model.w", 2 * rank, 2, whole=2 * SIZE, offset=64),
            piece("model.seen", 0, 8, kind="buffer", own=True, offset=128),
            piece(f"model.stage{rank // 3}.v", 4 * (rank % 3), 4, whole=12, offset=256),
            {"optimizer": "adam", "groups": [["model.w", f"model.stage{rank // 3}.v"]]},
            {"key": "model.tied", "alias_of": "model.w"},
        ]
        found.append(record_of(rank, pieces))
    return found


@steady
@given(st.permutations(range(SIZE)), st.integers(1, SIZE), st.randoms(use_true_random=False))
def test_however_records_are_shared_out_the_index_is_the_same(
    order: list[int], parts: int, chance: random.Random
) -> None:
    whole = index_of(records())
    held = [index_of([records()[rank] for rank in order[number::parts]]) for number in range(parts)]
    while len(held) > 1:  # merged in pairs, in any order, each sent as text
        one, other = (held.pop(chance.randrange(len(held))) for _ in range(2))
        held.append(merged([parse_index(one.text(), "one"), other]))
    assert held[0].is_complete
    assert held[0].text() == whole.text()


def test_all_that_the_records_say_is_in_the_catalog() -> None:
    catalog = native_catalog(parse_index(index_of(records()).text(), "it"))
    assert list(catalog.tensors) == ["model.w", "model.stage0.v", "model.stage1.v", "model.seen"]
    assert catalog.aliases == {"model.tied": "model.w"}
    assert catalog.groups == {"adam": [{"params": ["model.w", "model.stage0.v", "model.stage1.v"]}]}
    assert [(file.name, file.nbytes, file.begins) for file in catalog.files] == [
        (image_name(3, rank, SIZE), BLOCK_BYTES - rank, 4096) for rank in range(SIZE)
    ]
    rows = sorted(catalog.tensors["model.w"].pieces.rows.tolist())
    assert rows == [[rank, 64, 0, 4, 2 * rank, 0, 2, 2, 2, 1] for rank in range(SIZE)]
    own = catalog.own["model.seen"]
    assert sorted(own) == list(range(SIZE))
    assert [one.pieces.rows.tolist() for one in own.values()] == [
        [[rank, 128, 0, 16, 0, 0, 8, 2, 2, 1]] for rank in range(SIZE)
    ]
    assert 0 in own
    assert SIZE not in own


def test_what_one_rank_of_many_has_of_its_own_is_not_whole() -> None:
    found = records()
    pieces = found[4].pieces()
    pieces[1] = piece("model.seen", 0, 7, kind="buffer", own=True, offset=128)
    found[4] = record_of(4, pieces)
    with pytest.raises(DamagedImage, match=r"'model.seen'.* 14 of 16 elements"):
        native_catalog(index_of(found))


def test_ranks_that_call_different_tensors_by_one_name_are_told() -> None:
    pieces = [piece("model.w", 0, 8)]
    found = [record_of(0, pieces, size=2), record_of(1, [{**pieces[0], "dtype": "int32"}], size=2)]
    with pytest.raises(DamagedImage, match=r"'model.w' is float32 .* on some ranks, and int32 .* on others"):
        native_catalog(index_of(found))


def test_records_of_different_steps_are_not_merged() -> None:
    first, second = (index_of([record_of(rank, [piece("w", 0, 8)], step=rank)]) for rank in range(2))
    with pytest.raises(DamagedImage, match="of step 1 of 6 ranks .* among those of step 0"):
        merged([first, second])


def test_a_record_of_another_attempt_is_not_what_the_index_says() -> None:
    found = records()
    index = index_of(found)
    assert [index.disagreement(one) for one in found] == [None] * SIZE
    assert "life is second" in (index.disagreement(replace(found[2], life="second")) or "")
    assert "plan_digest" in (index.disagreement(replace(found[2], plan_digest="x")) or "")
    assert "image_bytes" in (index.disagreement(replace(found[2], image_bytes=BLOCK_BYTES)) or "")


# --- many ranks


@pytest.mark.parametrize("way", WAYS)
def test_the_parts_of_many_ranks_merge_into_as_little_as_all_at_once(way: str) -> None:
    whole = index_of_big_job(way, 96, 24)
    parts = [part_of(whole, first, first + 16) for first in (32, 0, 80, 16, 64, 48)]
    assert merged(parts).text() == whole.text()
    assert merged([merged(parts[:3]), merged(parts[3:])]).text() == whole.text()


# --- what is no index


def signed(raw: dict[str, Any]) -> str:
    """As somebody would write it who makes its digest fit."""
    rest = json.dumps(raw, separators=(",", ":"))[1:] + "\n"
    return f'{{"digest":"{digest(rest.encode())}",\n{rest}'


HOSTILE: dict[str, Callable[[dict[str, Any]], None]] = {
    "another format": at("format", value="resilient"),
    "no tensors": lambda raw: raw.pop("tensors"),
    "a tensor twice": lambda raw: raw["tensors"].append(raw["tensors"][0]),
    "an unknown dtype": at("tensors", 0, "dtype", value="float31"),
    "an unknown kind": at("tensors", 0, "kind", value="soup"),
    "a name that is none": at("tensors", 0, "name", value=3),
    "a shape of texts": at("tensors", 0, "shape", value=["12", "2"]),
    "a smaller shape": at("tensors", 0, "shape", value=[4, 2]),
    "other dimensions": at("tensors", 0, "shape", value=[24]),
    "more than any tensor": at("tensors", 0, "shape", value=[1 << 40, 1 << 40]),
    "a piece of a rank that there is not": at("tensors", 0, "pieces", 0, 0, 0, 0, value=SIZE),
    "an offset before the data": at("tensors", 0, "pieces", 0, 0, 0, 1, value=-8),
    "a number that is none": at("tensors", 0, "pieces", 0, 0, 0, 1, value=1.5),
    "more pieces than any job has": at("tensors", 0, "pieces", 0, 1, value=[[1 << 50, [0] * 10]]),
    "an order that is none": at("tensors", 0, "at", value=["x", 0]),
    "more ranks than images": at("ranks", value=[[0, SIZE - 2]]),
    "a rank twice": at("ranks", value=[[0, 4], [4, 4]]),
    "more ranks than any job has": at("world_size", value=1 << 40),
    "an image of no known life": at("images", 0, 0, value=1),
    "an image of negative length": at("images", 0, 2, value=-1),
    "a step that is none": at("step", value="3"),
    "a rank of which nothing else is told": at("others", 0, "ranks", value=[[0, 1]]),
    "others that are none": at("others", 0, "entries", value=[3]),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_what_no_index_says_is_refused_by_name(what: str) -> None:
    raw = json.loads(index_of(records()).text())
    del raw["digest"]
    assert parse_index(signed(raw), "catalog.json").text() == index_of(records()).text()
    HOSTILE[what](raw)
    with pytest.raises(DamagedImage, match=r"catalog.json is no whole catalog|'model.w"):
        parse_index(signed(raw), "catalog.json")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", b"\xff\xfe", '{"digest":"",\n', "[" * 100_000])
def test_what_is_no_index_is_refused_by_name(text: str | bytes) -> None:
    with pytest.raises(DamagedImage, match=r"catalog.json is no whole catalog"):
        parse_index(text, "catalog.json")


def test_one_that_was_changed_is_refused() -> None:
    text = index_of(records()).text()
    for place in (20, len(text) // 3, len(text) - 4):
        changed = text[:place] + ("0" if text[place] != "0" else "1") + text[place + 1 :]
        with pytest.raises(DamagedImage):
            parse_index(changed, "catalog.json")


def test_one_of_a_later_version_asks_for_an_upgrade() -> None:
    raw = json.loads(index_of(records()).text()) | {"version": 99}
    del raw["digest"]
    with pytest.raises(NewerFormat, match=r"catalog.json has catalog version 99"):
        parse_index(signed(raw), "catalog.json")
