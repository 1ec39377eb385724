"""What is wrong with a call, and where its rows are cut: without processes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resilient.kernels.overlap.call import Call, problem
from resilient.kernels.overlap.chunks import LEAST_ROWS, cut, most, peers_of, tapered


@given(rows=st.integers(1, 5000), chunks=st.integers(1, 64))
def test_cuts_cover_all_rows_once_in_order_and_differ_by_one_at_most(rows: int, chunks: int) -> None:
    pieces = cut(rows, chunks)
    assert [begin for begin, _ in pieces] == [0, *(end for _, end in pieces[:-1])]
    assert pieces[-1][1] == rows
    sizes = {end - begin for begin, end in pieces}
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) >= 1
    assert len(pieces) == min(rows, chunks)


@given(rows=st.integers(1, 5000), chunks=st.integers(1, 64))
def test_tapered_cuts_cover_all_rows_once_and_halve_the_two_at_the_ends(rows: int, chunks: int) -> None:
    pieces = tapered(rows, chunks)
    assert [begin for begin, _ in pieces] == [0, *(end for _, end in pieces[:-1])]
    assert pieces[-1][1] == rows
    sizes = [end - begin for begin, end in pieces]
    assert min(sizes) >= 1
    if chunks > 1 and rows >= 2 * chunks:
        assert len(sizes) == chunks + 1
        assert abs(sizes[0] - rows / (2 * chunks)) < 1
        assert abs(sizes[-1] - rows / (2 * chunks)) < 1
        assert max(sizes[1:-1]) - min(sizes[1:-1]) <= 1


@given(rows=st.integers(1, 5000))
def test_the_most_chunks_leave_enough_rows_for_each(rows: int) -> None:
    assert most(rows) == 1 or rows // most(rows) >= LEAST_ROWS


@given(world=st.integers(1, 16))
def test_at_each_turn_every_rank_is_somebodys_peer_and_none_is_its_own(world: int) -> None:
    orders = [peers_of(rank, world) for rank in range(world)]
    for turn in zip(*orders, strict=True):
        assert sorted(turn) == list(range(world))
    assert all(rank not in order for rank, order in enumerate(orders))


def call(operation: str, **more: object) -> Call:
    facts = {"rows": 64, "inner": 8, "columns": 4, "dtype": "float32", "device": "cpu", "world": 4, **more}
    return Call(operation=operation, **facts)  # type: ignore[arg-type]


def test_what_is_communicated_is_the_operand_of_a_gather_and_the_result_of_the_others() -> None:
    assert call("all_gather_matmul").nbytes == 64 * 8 * 4
    assert call("matmul_reduce_scatter").nbytes == 64 * 4 * 4
    assert call("matmul_all_reduce", dtype="bfloat16").nbytes == 64 * 4 * 2
    assert call("matmul_all_reduce").rows_to_cut == 64
    assert call("matmul_reduce_scatter").rows_to_cut == 16


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, None),
        ({"input": (8, 7)}, "7 is not 6"),
        ({"input": (8, 6, 1)}, "two dimensions"),
        ({"input": (0, 6)}, "empty"),
        ({"input": (9, 6)}, "9 rows of the result cannot be dealt out to 4 ranks"),
        ({"bias": (6,)}, "bias must be [5]"),
        ({"bias": (5,)}, None),
        ({"dtypes": ("float32", "float64")}, "float32, float64"),
        ({"dtypes": ("int32", "int32")}, "int32"),
        ({"devices": ("cpu", "cuda:0")}, "cpu, cuda:0"),
        ({"activation": "tanh"}, "'tanh'"),
        ({"contiguous": False}, "not contiguous"),
    ],
)
def test_each_thing_that_can_be_wrong_is_named(change: dict[str, object], said: str | None) -> None:
    facts: dict[str, object] = {
        "input": (8, 6), "weight": (6, 5), "dtypes": ("float32",) * 2, "devices": ("cpu",) * 2, "world": 4,
        **change,
    }  # fmt: skip
    found = problem("matmul_reduce_scatter", **facts)  # type: ignore[arg-type]
    assert found is None if said is None else found is not None and said in found
