"""The catalog as text: what it says comes back, and what no catalog says is refused by name."""

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from resilient.checkpoint.catalog.catalog import Catalog, File, Tensor, parse_catalog
from resilient.checkpoint.catalog.table import PieceTable, StoredPiece
from resilient.checkpoint.pieces import Piece
from resilient.errors import DamagedImage, NewerFormat
from tests.checkpoint.catalog.made import Pool, at, shapes, steady, stored, values


def example() -> Catalog:
    catalog = Catalog(
        format="test",
        files=[File("a", 100), File("b", 100)],
        aliases={"model.head.weight": "model.w"},
        groups={"optimizer": [{"lr": 0.1, "params": ["model.w"]}]},
        step=7,
        world_size=2,
        notes=["careful"],
    )
    catalog.add(tensor("model.w", [((0, 0), (2, 3)), ((2, 0), (2, 3))]))
    state = tensor("optimizer.state.model.w.exp_avg", [((0, 0), (4, 3))])
    catalog.add(
        Tensor(
            name=state.name,
            kind="optimizer",
            dtype="bfloat16",
            shape=(4, 3),
            pieces=state.pieces,
            item="optimizer",
            parameter="model.w",
            state="exp_avg",
        )
    )
    catalog.own["model.rank"] = {1: tensor("model.rank", [((0, 0), (4, 3))])}
    return catalog


def tensor(name: str, boxes: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> Tensor:
    pieces = [
        StoredPiece(piece=Piece.box((4, 3), *box), file=number % 2, offset=8 * number)
        for number, box in enumerate(boxes)
    ]
    return Tensor(name=name, kind="parameter", dtype="float32", shape=(4, 3), pieces=PieceTable.of(pieces))


def same(one: Tensor, other: Tensor) -> bool:
    described = ("name", "kind", "dtype", "shape", "item", "parameter", "state")
    return all(getattr(one, key) == getattr(other, key) for key in described) and np.array_equal(
        one.pieces.rows, other.pieces.rows
    )


def test_all_that_a_catalog_says_comes_back() -> None:
    catalog = example()
    read = parse_catalog(catalog.text(), "it")
    assert list(read.tensors) == list(catalog.tensors)
    assert all(same(read.tensors[name], tensor) for name, tensor in catalog.tensors.items())
    assert same(read.own["model.rank"][1], catalog.own["model.rank"][1])
    for key in ("format", "files", "aliases", "groups", "step", "world_size", "notes"):
        assert getattr(read, key) == getattr(catalog, key)
    assert read.text() == catalog.text()


@steady
@given(st.data())
def test_any_tensor_comes_back(data: st.DataObject) -> None:
    array = values(data.draw(shapes()))
    pool = Pool()
    pieces = data.draw(stored(array, pool))
    catalog = Catalog(format="test", files=[File(str(n), len(file)) for n, file in enumerate(pool.files)])
    catalog.add(
        Tensor(name="model.x", kind="parameter", dtype="uint32", shape=array.shape, pieces=PieceTable.of(pieces))
    )
    read = parse_catalog(catalog.text(), "it").tensors["model.x"]
    assert sorted(read.pieces.rows.tolist()) == sorted(PieceTable.of(pieces).rows.tolist())
    assert (read.shape, read.numel, read.nbytes) == (array.shape, array.size, array.nbytes)


def test_states_are_found_by_their_parameter() -> None:
    catalog = example()
    assert list(catalog.states_of("model.w")) == ["exp_avg"]
    assert catalog.states_of("model.head.weight") == {}
    assert list(catalog.all_states()) == ["model.w"]


def test_a_choice_of_tensors_keeps_what_belongs_to_them() -> None:
    some = example().only(["model.w"])
    assert (list(some.tensors), some.aliases, some.own) == (["model.w"], {"model.head.weight": "model.w"}, {})
    assert example().only(["model.rank"]).aliases == {}


def test_a_second_tensor_of_one_name_is_refused() -> None:
    with pytest.raises(DamagedImage, match=r"two tensors of the checkpoint are called 'model.w'"):
        example().add(tensor("model.w", [((0, 0), (4, 3))]))


def piece(**changes: Any) -> Callable[[dict[str, Any]], None]:
    """Change numbers of the only piece of the state: file, offset, start, stop, offsets, sizes, strides."""
    columns = {"file": 0, "offset": 1, "start": 2, "stop": 3, "at": 4, "size": 6}

    def change(raw: dict[str, Any]) -> None:
        for key, value in changes.items():
            raw["tensors"][1]["pieces"][0][0][0][columns[key]] = value

    return change


HOSTILE: dict[str, Callable[[dict[str, Any]], None]] = {
    "another format": at("format", value="resilient.record"),
    "no tensors": lambda raw: raw.pop("tensors"),
    "tensors that are no list": at("tensors", value=3),
    "a tensor twice": lambda raw: raw["tensors"].append(raw["tensors"][0]),
    "an unknown dtype": at("tensors", 0, "dtype", value="float31"),
    "an unknown kind": at("tensors", 0, "kind", value="soup"),
    "a name that is none": at("tensors", 0, "name", value=3),
    "a shape that is no list": at("tensors", 0, "shape", value=3),
    "a shape of texts": at("tensors", 0, "shape", value=["4", "3"]),
    "another shape": at("tensors", 0, "shape", value=[4, 4]),
    "other dimensions": at("tensors", 0, "shape", value=[12]),
    "a negative shape": at("tensors", 0, "shape", value=[-4, -3]),
    "more than any tensor": at("tensors", 0, "shape", value=[1 << 40, 1 << 40]),
    "a piece outside": piece(at=1),
    "a piece before": piece(at=-1),
    "a piece larger than the tensor": piece(size=5),
    "a piece that ends before it begins": piece(start=12, stop=0),
    "a range that begins before its box": piece(start=-1, stop=11),
    "a range beyond its box": piece(start=12, stop=24),
    "an offset before the file": piece(offset=-8),
    "a file that is not there": piece(file=2),
    "a file before the first": piece(file=-1),
    "a file with a negative size": at("files", 0, value=["a", -1]),
    "a file outside of the folder": at("files", 0, value=["../a", 100]),
    "a file with an absolute path": at("files", 0, value=["/etc/passwd", 100]),
    "files that are no pairs": at("files", value=["a"]),
    "a number that is none": piece(offset=1.5),
    "a number beyond all measure": piece(offset=1 << 70),
    "more pieces than any job has": at("tensors", 1, "pieces", 0, 1, value=[[1 << 50, [0] * 10]]),
    "no pieces": at("tensors", 1, "pieces", value=[]),
    "a rank that is no number": at("own", "model.rank", value={"x": {}}),
    "a tensor of a rank that lies outside": at("own", "model.rank", "1", "shape", value=[2, 2]),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_what_no_catalog_says_is_refused_by_name(what: str) -> None:
    raw = json.loads(example().text())
    HOSTILE[what](raw)
    with pytest.raises(DamagedImage, match=r"catalog.json|'model.w|'optimizer.state|'model.rank"):
        parse_catalog(json.dumps(raw), "catalog.json")


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", "null", b"\xff\xfe", "[" * 100_000, '{"format": "resilient.catalog"}']
)
def test_what_is_no_catalog_is_refused_by_name(text: str | bytes) -> None:
    with pytest.raises(DamagedImage, match=r"catalog.json is no whole catalog"):
        parse_catalog(text, "catalog.json")


def test_a_key_twice_is_refused() -> None:
    with pytest.raises(DamagedImage, match="'step' twice"):
        parse_catalog(example().text().replace('"step":7', '"step":7,"step":8'), "catalog.json")


def test_a_catalog_of_a_later_version_asks_for_an_upgrade() -> None:
    raw = json.loads(example().text()) | {"version": 99}
    with pytest.raises(NewerFormat, match=r"catalog.json has catalog version 99"):
        parse_catalog(json.dumps(raw), "catalog.json")
