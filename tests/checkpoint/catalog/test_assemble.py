"""Ranks' slices make up the global tensor, whatever the cut: each element once, and from where it really is."""

import math
from dataclasses import replace
from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from resilient.checkpoint.catalog.assemble import Held, assemble, regions_of
from resilient.checkpoint.catalog.cut import Cut, Padded, Shard, SubParameters
from resilient.checkpoint.catalog.table import StoredPiece, row_major
from resilient.errors import LayoutMismatch
from tests.checkpoint.catalog.made import ITEMSIZE, Array, Pool, steady, tensor_of, values
from tests.checkpoint.catalog.test_fetch import fetched

Sizes = dict[str, int]
TP = Cut(how="sharded", shards=(Shard(0, "tp"),), text="pattern w")


@st.composite
def cuts(draw: st.DrawFn) -> tuple[Cut, Sizes, Array, Array]:
    """A cut, the sizes of its axes, the tensor it is of, and the same with padding."""
    dims = draw(st.integers(1, 3))
    sizes = {axis: draw(st.integers(1, 3)) for axis in ("ep", "tp")}
    shards = tuple(Shard(draw(st.integers(0, dims - 1)), axis) for axis in sizes if draw(st.booleans()))
    cut = Cut(how="sharded" if shards else "replicated", shards=shards)
    shape = [draw(st.integers(1, 3)) * math.prod(sizes[axis] for axis in cut.over(dim)) for dim in range(dims)]
    if draw(st.booleans()):
        dim, widths = draw(st.integers(0, dims - 1)), tuple(draw(st.lists(st.integers(1, 3), min_size=2, max_size=3)))
        shape[dim] *= sum(widths)
        cut = replace(cut, sub_parameters=SubParameters(dim, widths))
    padded = values(shape)
    array = padded
    if draw(st.booleans()):
        dim = draw(st.integers(0, dims - 1))
        real = draw(st.integers(1, shape[dim]))
        cut = replace(cut, padded=Padded(dim, real))
        array = np.take(padded, range(real), axis=dim)
    return cut, sizes, array, padded


def slice_of(padded: Array, cut: Cut, sizes: Sizes, at: Sizes) -> Array:
    """What a rank holds, said in another way than the code says it: indices of each dimension, dealt out."""
    for dim, size in enumerate(padded.shape):
        parts = [(0, size)]
        if cut.sub_parameters is not None and cut.sub_parameters.dim == dim:
            widths = cut.sub_parameters.widths
            ends = [sum(widths[:n]) * size // sum(widths) for n in range(len(widths) + 1)]
            parts = list(pairwise(ends))
        mine = []
        for begin, end in parts:
            indices = np.arange(begin, end)
            for axis in cut.over(dim):
                indices = np.split(indices, sizes[axis])[at[axis]]
            mine.append(indices)
        padded = np.take(padded, np.concatenate(mine), axis=dim)
    return padded


@st.composite
def held(draw: st.DrawFn, local: Array, at: Sizes, pool: Pool) -> list[Held]:
    """A slice as the data-parallel ranks have it: all of it each, ranges of it, or a transposed copy."""
    found: list[Held] = []
    copies, way = draw(st.integers(1, 3)), draw(st.sampled_from(["copies", "ranges", "transposed"]))
    bounds = sorted([0, local.size, *(draw(st.integers(0, local.size)) for _ in range(copies - 1))])
    for dp in range(copies):
        before = draw(st.integers(0, 5))
        common = {"at": {**at, "dp": dp}, "shape": local.shape}
        if way == "ranges":
            start, stop = bounds[dp], bounds[dp + 1]
            file, offset = pool.put(local.reshape(-1)[start:stop], before)
            found.append(Held(**common, file=file, offset=offset, start=start, stop=stop))  # type: ignore[arg-type]
        elif way == "copies":
            file, offset = pool.put(local, before)
            found.append(Held(**common, file=file, offset=offset))  # type: ignore[arg-type]
        else:
            file, offset = pool.put(local.T, before)
            strides = tuple(reversed(row_major(tuple(reversed(local.shape)))))
            found.append(Held(**common, file=file, offset=offset, strides=strides))  # type: ignore[arg-type]
    return found


@steady
@given(st.data())
def test_slices_of_any_cut_make_up_the_tensor(data: st.DataObject) -> None:
    cut, sizes, array, padded = data.draw(cuts())
    pool, everything = Pool(), list[Held]()
    for ep, tp in product(range(sizes["ep"]), range(sizes["tp"])):
        at = {"ep": ep, "tp": tp}
        everything += data.draw(held(slice_of(padded, cut, sizes, at), at, pool))
    shape, pieces = assemble("x", cut, data.draw(st.permutations(everything)), ITEMSIZE)
    assert shape == array.shape
    source = pool.source(tensor_of(shape, pieces))  # which refuses pieces that are not all of the tensor
    assert np.array_equal(fetched(source, ((0,) * array.ndim, array.shape)), array)


@steady
@given(st.data())
def test_the_regions_of_a_rank_are_what_its_slice_has(data: st.DataObject) -> None:
    cut, sizes, array, padded = data.draw(cuts())
    seen = np.zeros(array.shape, dtype=np.int64)
    used = [axis for axis in sizes if axis in cut.axes]
    for coordinates in product(*(range(sizes[axis]) for axis in used)):
        at = dict.fromkeys(sizes, 0) | dict(zip(used, coordinates, strict=True))
        local = slice_of(padded, cut, sizes, at)
        shape, regions = regions_of("x", cut, local.shape, at, sizes)
        assert shape == array.shape
        for region in regions:
            there = tuple(slice(a, a + n) for a, n in zip(region.offsets, region.sizes, strict=True))
            here = tuple(slice(a, a + n) for a, n in zip(region.local, region.sizes, strict=True))
            assert np.array_equal(local[here], array[there])
            seen[there] += 1
    assert (seen == 1).all()


def whole(at: Sizes, shape: tuple[int, ...], file: int = 0) -> Held:
    return Held(at=at, shape=shape, file=file, offset=0)


def test_of_copies_another_one_is_read_from_tensor_to_tensor() -> None:
    copies = [whole({"dp": dp}, (4,), file=dp) for dp in range(4)]
    read = {assemble(f"layers.{n}.norm", Cut(), copies, 4)[1][0].file for n in range(40)}
    assert read == {0, 1, 2, 3}


def test_ranges_that_overlap_are_read_once() -> None:
    some = [replace(whole({"dp": dp}, (9,), file=dp), start=3 * dp, stop=3 * dp + 5) for dp in range(2)]
    with pytest.raises(LayoutMismatch, match=r"w: elements 8 to 9 of a slice of shape \(9,\) are nowhere"):
        assemble("w", Cut(), some, 4)
    some.append(replace(whole({"dp": 2}, (9,), file=2), start=6, stop=9, offset=100))
    _, pieces = assemble("w", Cut(), some, 4)
    assert [(one.file, one.piece.start, one.piece.stop, one.offset) for one in pieces] == [
        (0, 0, 5, 0),
        (1, 5, 8, 8),
        (2, 8, 9, 108),
    ]


def test_averaged_tensors_are_those_of_the_first_rank_with_all_its_ranges() -> None:
    ranges = [
        replace(whole({"dp": dp, "tp": tp}, (6,), file=2 * tp + dp), start=3 * dp, stop=3 * dp + 3)
        for tp in range(2)
        for dp in range(2)
    ]
    shape, pieces = assemble("norm", Cut(how="averaged", averaged=("tp",)), ranges, 4)
    assert shape == (6,)
    assert [(one.file, one.piece.start) for one in pieces] == [(0, 0), (1, 3)]


def test_unique_tensors_are_those_of_the_first_rank() -> None:
    shape, pieces = assemble("table", Cut(how="unique"), [whole({"tp": 0}, (2,), 0), whole({"tp": 1}, (3,), 1)], 4)
    assert (shape, [one.file for one in pieces]) == ((2,), [0])


def test_slices_of_different_sizes_lie_one_behind_the_other() -> None:
    shape, pieces = assemble("w", TP, [whole({"tp": 1}, (2, 3), 1), whole({"tp": 0}, (5, 3), 0)], 4)
    assert shape == (7, 3)
    assert [(one.piece.offsets, one.piece.sizes) for one in pieces] == [((0, 0), (5, 3)), ((5, 0), (2, 3))]


def test_a_tensor_without_elements_is_one_empty_piece() -> None:
    shape, pieces = assemble("w", TP, [whole({"tp": n}, (0, 3), n) for n in range(2)], 4)
    assert (shape, [one.piece.numel for one in pieces]) == ((0, 3), [0])
    assert tensor_of(shape, pieces).problem() is None


def test_ranks_may_have_no_rows_of_a_tensor() -> None:
    shape, pieces = assemble("w", TP, [whole({"tp": n}, (size, 3), n) for n, size in enumerate((2, 1, 0))], 4)
    assert (shape, [one.file for one in pieces]) == ((3, 3), [0, 1])


@pytest.mark.parametrize(
    ("cut", "some", "message"),
    [
        (TP, [], "no rank has w"),
        (TP, [whole({"tp": 0}, (2,)), whole({"tp": 2}, (2,))], "w: the slice of the ranks at {'tp': 1} is missing"),
        (Cut(text="pattern w"), [whole({"tp": 0}, (2,)), whole({"tp": 1}, (3,))], "does not say that they differ"),
        (TP, [whole({"tp": 0}, (2, 3)), whole({"tp": 1}, (2, 4))], "3 and 4 elements along dimension 1"),
        (TP, [whole({"tp": 0}, (2, 3)), whole({"tp": 1}, (2,))], "2 and 1 dimensions"),
        (TP, [whole({"tp": 0}, ())], "w has 0 dimensions; the cut for pattern w speaks of dimension 0"),
        (
            replace(TP, sub_parameters=SubParameters(0, (1, 1))),
            [whole({"tp": 0}, (3,)), whole({"tp": 1}, (3,))],
            r"w: 3 elements along dimension 0 are not to be divided into sub-parameters of widths \[1, 1\]",
        ),
        (
            replace(TP, sub_parameters=SubParameters(0, (1, 1))),
            [whole({"tp": 0}, (4,)), whole({"tp": 1}, (2,))],
            "slices with sub-parameters have different sizes",
        ),
        (
            replace(TP, padded=Padded(0, 9)),
            [whole({"tp": 0}, (4,)), whole({"tp": 1}, (4,))],
            "w has 8 elements, padding included; the specification says 9 without",
        ),
    ],
)
def test_slices_that_make_up_no_tensor_are_refused(cut: Cut, some: list[Held], message: str) -> None:
    with pytest.raises(LayoutMismatch, match=message):
        assemble("w", cut, some, 4)


def test_pieces_of_one_slice_stay_one_piece() -> None:
    """What is listed grows with the ranks, not with their rows."""
    _, pieces = assemble(
        "w", replace(TP, shards=(Shard(1, "tp"),)), [whole({"tp": n}, (64, 8), n) for n in range(4)], 4
    )
    assert pieces == [
        StoredPiece(piece=replace(one.piece, offsets=(0, 8 * n)), file=n, offset=0) for n, one in enumerate(pieces)
    ]
    assert len(pieces) == 4


@pytest.mark.parametrize(
    "wrong", [{"start": 3, "stop": 2}, {"stop": 5}, {"start": -1}, {"start": 1, "strides": (1, 2)}]
)
def test_what_cannot_be_held_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"slice"):
        replace(whole({}, (2, 2)), **wrong)  # type: ignore[arg-type]
