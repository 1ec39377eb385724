"""The catalog of a snapshot of ours, from records as ranks write them."""

import json
from typing import Any

import pytest

from resilient.checkpoint.catalog.catalog import Catalog, parse_catalog
from resilient.checkpoint.catalog.index import index_of
from resilient.checkpoint.catalog.meet import parts_of
from resilient.checkpoint.catalog.native import native_catalog
from resilient.checkpoint.digest import BLOCK_BYTES
from resilient.checkpoint.names import image_name
from resilient.checkpoint.record import Record
from resilient.errors import DamagedImage

BEGINS = 4096


def piece(key: str, at: int, rows: int, *, whole: int = 8, offset: int = 0, **keys: Any) -> dict[str, Any]:
    """Some rows of a [whole, 2] tensor of float32."""
    raw = {
        "key": key,
        "kind": "parameter",
        "dtype": "float32",
        "shape": [whole, 2],
        "offsets": [at, 0],
        "sizes": [rows, 2],
        "start": 0,
        "stop": rows * 2,
        "offset": offset,
        "nbytes": rows * 8,
        "own": False,
        "host": True,
    }
    return raw | keys


def catalog_of(*ranks: list[dict[str, Any]]) -> Catalog:
    size = len(ranks)
    records = {
        rank: Record(
            run_id="r",
            step=3,
            rank=rank,
            world_size=size,
            plan_digest="0" * 32,
            image_name=image_name(3, rank, size),
            image_bytes=BLOCK_BYTES,
            blocks=("0" * 32,),
            pieces_text=json.dumps(pieces),
        )
        for rank, pieces in enumerate(ranks)
    }
    return native_catalog(index_of(records.values(), dict.fromkeys(records, BEGINS)))


def test_the_pieces_of_all_ranks_are_one_tensor() -> None:
    found = catalog_of([piece("model.w", 0, 5)], [piece("model.w", 5, 3, offset=64)])
    assert (found.step, found.world_size, found.format) == (3, 2, "native")
    tensor = found.tensors["model.w"]
    assert (tensor.item, tensor.fqn, tensor.shape, tensor.kind) == ("model", "w", (8, 2), "parameter")
    parts = parts_of(tensor, (4, 0), (2, 2))
    assert [(part.file, part.offset, part.sizes) for part in parts] == [
        (0, 4 * 8, (1, 2)),
        (1, 64, (1, 2)),
    ]
    again = parse_catalog(found.text(), "the catalog")
    assert parts_of(again.tensors["model.w"]) == parts_of(tensor)


def test_what_a_rank_lacks_is_missed() -> None:
    with pytest.raises(DamagedImage, match=r"'model.w'.* 14 of 16 elements"):
        catalog_of([piece("model.w", 0, 5)], [piece("model.w", 5, 2)])


def test_what_each_rank_has_of_its_own_is_kept_apart() -> None:
    found = catalog_of(*([piece("model.b", 0, 8, kind="buffer", own=True, offset=16 * rank)] for rank in range(3)))
    assert sorted(found.own["model.b"]) == [0, 1, 2]
    assert [parts_of(one)[0].file for one in found.own["model.b"].values()] == [0, 1, 2]
    assert parts_of(found.tensors["model.b"])[0].file == 0


def test_groups_of_ranks_with_the_same_names_are_told_apart() -> None:
    halves = [[piece("model.w", 0, 4)], [piece("model.w", 4, 4)]]
    found = catalog_of(*halves, *halves)
    assert {rank: {part.file for part in parts_of(one)} for rank, one in found.own["model.w"].items()} == {
        0: {0, 1},
        1: {0, 1},
        2: {2, 3},
        3: {2, 3},
    }


def test_the_groups_of_pipeline_stages_are_joined() -> None:
    stages = [[["a", "b"], ["c"]], [["d"], ["c", "e"]], [["a", "b"], ["c"], ["f"]]]
    ranks = [[piece("w", 0, 8, own=True), {"optimizer": "adam", "groups": groups}] for groups in stages]
    assert catalog_of(*ranks).groups == {
        "adam": [{"params": ["a", "b", "d"]}, {"params": ["c", "e"]}, {"params": ["f"]}]
    }


def test_optimizer_state_groups_and_tied_names_are_there() -> None:
    state = piece("adam.state.model.w.exp_avg", 0, 8, kind="optimizer", parameter="model.w", name="exp_avg", mesh=False)
    groups = {"optimizer": "adam", "groups": [["model.w"], []]}
    found = catalog_of([piece("model.w", 0, 8), state, groups, {"key": "model.head.w", "alias_of": "model.w"}])
    one = found.tensors["adam.state.model.w.exp_avg"]
    assert (one.item, one.parameter, one.state) == ("adam", "model.w", "exp_avg")
    assert found.states_of("model.w") == {"exp_avg": one}
    assert found.groups == {"adam": [{"params": ["model.w"]}, {"params": []}]}
    assert found.aliases == {"model.head.w": "model.w"}
