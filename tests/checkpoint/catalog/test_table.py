"""Pieces as rows and as lattices: nothing is lost, regular ones are short, and a box finds what it meets."""

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from resilient.checkpoint.catalog.lattice import Block, Rows, corners_of, fold, parse_blocks
from resilient.checkpoint.catalog.table import PieceTable, StoredPiece
from resilient.checkpoint.pieces import Piece
from tests.checkpoint.catalog.made import Pool, boxes, shapes, steady, stored, values

numbers = st.integers(-3, 3)


def as_set(rows: Rows) -> list[list[int]]:
    return sorted(rows.tolist())


@st.composite
def tables(draw: st.DrawFn) -> Rows:
    """Rows of which many go up by equal steps, in nested ways, and some do not."""
    columns, parts = 4, []
    for _ in range(draw(st.integers(1, 4))):
        rows = np.array([draw(st.lists(numbers, min_size=columns, max_size=columns))], dtype=np.int64)
        for _ in range(draw(st.integers(0, 3))):
            count, steps = draw(st.integers(1, 5)), draw(st.lists(numbers, min_size=columns, max_size=columns))
            grown = np.arange(count)[:, None, None] * np.array(steps)
            rows = (rows[None] + grown).reshape(-1, columns)
        parts.append(rows)
    return np.concatenate(parts)


@steady
@given(tables())
def test_what_is_folded_unfolds_to_the_same_rows(rows: Rows) -> None:
    blocks = fold(rows)
    assert as_set(np.concatenate([block.unfold() for block in blocks])) == as_set(rows)
    again = parse_blocks([block.to_json() for block in blocks], 4)
    assert as_set(np.concatenate([block.unfold() for block in again])) == as_set(rows)
    assert sum(len(block.bases) for block in blocks) <= len(rows)


@steady
@given(tables())
def test_totals_and_bounds_are_told_without_unfolding(rows: Rows) -> None:
    blocks = fold(rows)
    for column in range(4):
        assert sum(block.total(column) for block in blocks) == rows[:, column].sum()
    corners, owners = corners_of(blocks, 4)
    assert (corners.min(axis=0) == rows.min(axis=0)).all()
    assert (corners.max(axis=0) == rows.max(axis=0)).all()
    for number, block in enumerate(blocks):
        own, all_rows = corners[owners == number], block.unfold()
        assert all(row in all_rows.tolist() for row in own.tolist())
        assert (own.min(axis=0) == all_rows.min(axis=0)).all()
        assert (own.max(axis=0) == all_rows.max(axis=0)).all()


@steady
@given(st.data())
def test_a_box_meets_the_same_pieces_however_they_are_kept(data: st.DataObject) -> None:
    array = values(data.draw(shapes(3)))
    table = PieceTable.of(data.draw(stored(array, Pool())))
    read = PieceTable.from_json(table.dims, table.to_json())
    box = data.draw(boxes(array.shape))
    assert as_set(read.rows) == as_set(table.rows)
    assert as_set(read.meeting(*box)) == as_set(table.meeting(*box))
    assert (len(read), read.numel) == (len(table), table.numel)


@steady
@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 4), st.integers(1, 4), st.data())
def test_a_box_meets_the_pieces_of_a_mesh(dp: int, tp: int, rows: int, columns: int, data: st.DataObject) -> None:
    shape = dp * rows, tp * columns
    pieces = [
        StoredPiece(piece=Piece.box(shape, (d * rows, t * columns), (rows, columns)), file=d * tp + t, offset=d % 2)
        for d in range(dp)
        for t in range(tp)
    ]
    table = PieceTable.of(pieces)
    read = PieceTable.from_json(2, table.to_json())
    (top, left), (height, width) = data.draw(boxes(shape))
    assume(height * width)
    met = {
        piece.file
        for piece in pieces
        if piece.piece.offsets[0] < top + height
        and piece.piece.offsets[0] + rows > top
        and piece.piece.offsets[1] < left + width
        and piece.piece.offsets[1] + columns > left
    }
    for one in (table, read):
        assert {row[0] for row in one.meeting((top, left), (height, width)).tolist()} == met


def even(ranks: int) -> list[StoredPiece]:
    return [
        StoredPiece(piece=Piece.box((ranks * 5,), (rank * 5,), (5,)), file=rank, offset=100) for rank in range(ranks)
    ]


def test_a_regular_partition_is_one_lattice_whatever_its_size() -> None:
    assert len(str(PieceTable.of(even(4096)).to_json())) == len(str(PieceTable.of(even(1000)).to_json()))


def test_an_uneven_end_costs_one_row_more() -> None:
    pieces = even(100)
    last = StoredPiece(piece=Piece.box((498,), (495,), (3,)), file=99, offset=100)
    assert [len(bases) for bases, _ in PieceTable.of([*pieces[:-1], last]).to_json()] == [1, 1]


@pytest.mark.parametrize("tp", [2, 3, 8])
def test_a_mesh_is_folded_axis_by_axis(tp: int) -> None:
    shape = (64 * 5, tp * 7)
    pieces = [
        StoredPiece(piece=Piece.box(shape, (d * 5, t * 7), (5, 7)), file=d * tp + t, offset=100)
        for d in range(64)
        for t in range(tp)
    ]
    ((bases, axes),) = PieceTable.of(pieces).to_json()
    assert (len(bases), [count for count, _ in axes]) == (1, [tp, 64])


def test_ranks_whose_files_are_fuller_are_folded_with_their_like() -> None:
    """The first of each tensor-parallel group has the norms before the others' slices."""
    shape = (64 * 5, 8 * 7)
    pieces = [
        StoredPiece(piece=Piece.box(shape, (d * 5, t * 7), (5, 7)), file=d * 8 + t, offset=100 if t else 164)
        for d in range(64)
        for t in range(8)
    ]
    assert sum(len(bases) for bases, _ in PieceTable.of(pieces).to_json()) <= 3


def test_pieces_are_given_back_as_they_were() -> None:
    transposed = StoredPiece(piece=Piece.box((4, 6), (1, 2), (3, 2)), file=1, offset=9, strides=(1, 3))
    part = StoredPiece(piece=Piece.whole((4, 6)).part(3, 7), file=0, offset=8, strides=(6, 1))
    assert list(PieceTable.of([transposed, part]).pieces((4, 6))) == [transposed, part]


def test_a_part_of_a_box_with_strides_is_refused() -> None:
    part = StoredPiece(piece=Piece.whole((4, 6)).part(3, 7), file=0, offset=8, strides=(1, 4))
    with pytest.raises(ValueError, match="stored row-major"):
        PieceTable.of([part])


@pytest.mark.parametrize(
    "raw",
    [
        [[[1, 2, 3]], []],
        [[[1, 2, 3, "4"]], []],
        [[[1, 2, 3, True]], []],
        [[[1, 2, 3, 1 << 70]], []],
        [[[1, 2, 3, 4]], [[0, [1, 1, 1, 1]]]],
        [[[1, 2, 3, 4]], [[-1, [1, 1, 1, 1]]]],
        [[[1, 2, 3, 4]], [[2.5, [1, 1, 1, 1]]]],
        [[[1, 2, 3, 4]], [[1 << 40, [0, 0, 0, 0]]]],
        [[[1, 2, 3, 4]], [[1 << 20, [1 << 50, 0, 0, 0]]]],
        [[[1, 2, 3, 4]], [[2, [0, 0, 0, 0]]] * 9],
        [[[1, 2, 3, 4]], [[2, [0, 0]]]],
        [[[1, 2, 3, 4]]],
        [[[1, 2, 3, (1 << 60) - 1]] * 8, []],
    ],
)
def test_numbers_beyond_all_measure_are_refused(raw: object) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse_blocks([[[[0, 0, 0, 0]], []], raw], 4)


def test_a_block_of_one_row_is_itself() -> None:
    block = Block(np.array([[1, 2]], dtype=np.int64))
    assert (block.unfold().tolist(), corners_of([block], 2)[0].tolist(), block.total(1)) == ([[1, 2]], [[1, 2]], 2)
