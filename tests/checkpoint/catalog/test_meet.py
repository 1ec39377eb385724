"""Pieces that do not make up what is asked for are found out, however they overlap or leave out."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from resilient.checkpoint.catalog.catalog import Tensor
from resilient.checkpoint.catalog.meet import Box, boxes_of_range, parts_of
from resilient.checkpoint.catalog.table import PieceTable, StoredPiece
from resilient.checkpoint.pieces import Piece
from resilient.errors import DamagedImage
from tests.checkpoint.catalog.made import Array, boxes, shapes, sliced, steady, values

# A pinwheel: no cut goes through from side to side.
WHEEL = [((0, 0), (2, 1)), ((0, 1), (1, 2)), ((1, 2), (2, 1)), ((2, 0), (1, 2)), ((1, 1), (1, 1))]


def tensor(shape: tuple[int, ...], pieces: list[Piece]) -> Tensor:
    found = [StoredPiece(piece=piece, file=0, offset=0) for piece in pieces]
    return Tensor(name="model.x", kind="parameter", dtype="float32", shape=shape, pieces=PieceTable.of(found))


@steady
@given(st.data())
def test_a_flat_range_is_few_boxes_in_their_order(data: st.DataObject) -> None:
    array = values(data.draw(shapes()))
    start = data.draw(st.integers(0, array.size))
    stop = data.draw(st.integers(start, array.size))
    found = boxes_of_range(start, stop, array.shape)
    parts = [sliced(array, box).reshape(-1) for box in found]
    assert [*np.concatenate([*parts, np.empty(0, np.uint32)])] == [*array.reshape(-1)[start:stop]]
    assert len(found) <= max(1, 2 * array.ndim - 1)


def counted(shape: tuple[int, ...], pieces: list[Piece]) -> Array:
    """How often each element is there."""
    found = np.zeros(shape, dtype=np.uint32)
    for piece in pieces:
        for at, size in boxes_of_range(piece.start, piece.stop, piece.sizes):
            offsets = tuple(a + b for a, b in zip(piece.offsets, at, strict=True))
            found[tuple(slice(a, a + n) for a, n in zip(offsets, size, strict=True))] += 1
    return found


@st.composite
def any_pieces(draw: st.DrawFn, shape: tuple[int, ...]) -> list[Piece]:
    """Boxes and ranges of boxes that may overlap and leave out; sometimes they happen to be a partition."""
    found = []
    for _ in range(draw(st.integers(1, 4))):
        offsets, sizes = draw(boxes(shape))
        numel = math.prod(sizes)
        start = draw(st.sampled_from([0, 0, numel // 2]))
        stop = draw(st.sampled_from([numel, numel, (start + numel + 1) // 2]))
        found.append(Piece.box(shape, offsets, sizes).part(start, stop))
    return found


@steady
@given(st.data())
def test_parts_are_given_exactly_where_each_element_is_there_once(data: st.DataObject) -> None:
    shape = data.draw(shapes(3, 3))
    pieces = data.draw(any_pieces(shape))
    box: Box = data.draw(boxes(shape))
    wanted = sliced(counted(shape, pieces), box)
    if (wanted == 1).all():
        assert sum(part.numel for part in parts_of(tensor(shape, pieces), *box)) == wanted.size
    elif wanted.sum() != wanted.size or (wanted > 1).any():
        with pytest.raises(DamagedImage, match=r"'model.x': the checkpoint has \d+ of the \d+ elements"):
            parts_of(tensor(shape, pieces), *box)


def test_a_range_that_ends_before_what_else_lies_in_its_box_does_not_overlap_it() -> None:
    assert len(parts_of(tensor((3,), [Piece.box((3,), (2,), (1,)), Piece.whole((3,)).part(0, 2)]))) == 2


def test_boxes_that_are_no_grid_may_still_be_a_tensor() -> None:
    pieces = [Piece.box((3, 3), *box) for box in WHEEL]
    assert len(parts_of(tensor((3, 3), pieces))) == 5
    with pytest.raises(DamagedImage):
        parts_of(tensor((3, 3), [*pieces[:-1], Piece.box((3, 3), (0, 0), (1, 1))]))


@pytest.mark.parametrize(
    ("shape", "pieces"),
    [
        ((4,), [Piece.whole((4,)).part(0, 2), Piece.whole((4,)).part(1, 3)]),
        ((4,), [Piece.box((4,), (0,), (2,)), Piece.box((4,), (1,), (2,))]),
        ((2, 2), [Piece.box((2, 2), (0, 0), (1, 2)), Piece.box((2, 2), (0, 0), (2, 1))]),
        ((3, 3), [*(Piece.box((3, 3), *box) for box in WHEEL[:-1]), Piece.box((3, 3), (2, 1), (1, 1))]),
        ((), [Piece.whole(()), Piece.whole(()).part(0, 0), Piece.whole(())]),
    ],
)
def test_as_many_elements_as_are_wanted_may_still_be_the_wrong_ones(
    shape: tuple[int, ...], pieces: list[Piece]
) -> None:
    with pytest.raises(DamagedImage, match="or has some of them twice"):
        parts_of(tensor(shape, pieces))


@pytest.mark.parametrize("box", [((-1,), (1,)), ((0,), (-1,)), ((3,), (2,)), ((0, 0), (1, 1)), ((5,), (0,))])
def test_a_box_outside_of_the_tensor_is_refused(box: Box) -> None:
    with pytest.raises(ValueError, match=r"is no part of 'model.x', shape \(4,\)"):
        parts_of(tensor((4,), [Piece.whole((4,))]), *box)


def test_a_number_is_one_part() -> None:
    (part,) = parts_of(tensor((), [Piece.whole(())]))
    assert (part.offsets, part.sizes, part.numel, part.is_contiguous(4)) == ((), (), 1, True)
