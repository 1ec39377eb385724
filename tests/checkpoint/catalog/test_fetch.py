"""Reading boxes of tensors, however they are cut: every element arrives, none twice, hardly a byte too many."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from resilient.checkpoint.catalog.meet import Box, parts_of
from resilient.checkpoint.catalog.table import StoredPiece
from resilient.checkpoint.formats.fetch import boxes_of, fetch
from resilient.checkpoint.pieces import Piece
from tests.checkpoint.catalog.made import (
    ITEMSIZE,
    Array,
    BytesSource,
    Pool,
    boxes,
    partitions,
    shapes,
    sliced,
    steady,
    stored,
    tensor_of,
    values,
)

SMALL_BYTES = 16 << 10  # a part that spans no more is read as it lies
PAGE = 4096


def fetched(source: BytesSource, box: Box) -> Array:
    data = bytearray(math.prod(box[1]) * ITEMSIZE)
    fetch(source, source.catalog.tensors["model.x"], memoryview(data), *box)
    return np.frombuffer(data, dtype=np.uint32).reshape(box[1])


@steady
@given(st.data())
def test_every_element_of_any_target_partition_arrives_from_any_source_partition(data: st.DataObject) -> None:
    array = values(data.draw(shapes()))
    pool = Pool()
    source = pool.source(tensor_of(array.shape, data.draw(stored(array, pool))))
    seen = np.zeros(array.shape, dtype=np.int64)
    for box in data.draw(partitions(array.shape)):
        assert np.array_equal(fetched(source, box), sliced(array, box))
        seen[tuple(slice(at, at + size) for at, size in zip(*box, strict=True))] += 1
    assert (seen == 1).all()


@steady
@given(st.data())
def test_the_parts_of_a_box_are_its_elements_each_once(data: st.DataObject) -> None:
    array = values(data.draw(shapes()))
    pool = Pool()
    tensor = tensor_of(array.shape, data.draw(stored(array, pool)))
    box = data.draw(boxes(array.shape))
    seen = np.zeros(array.shape, dtype=np.int64)
    for part in parts_of(tensor, *box):
        seen[tuple(slice(at, at + size) for at, size in zip(part.offsets, part.sizes, strict=True))] += 1
    assert (seen[tuple(slice(at, at + size) for at, size in zip(*box, strict=True))] == 1).all()
    assert seen.sum() == math.prod(box[1])


@st.composite
def grids(draw: st.DrawFn, shape: tuple[int, ...], unit: int) -> list[Box]:
    """Partitions whose last dimension is cut at multiples of `unit`."""
    *rest, last = shape
    return [
        ((*offsets[:-1], offsets[-1] * unit), (*sizes[:-1], sizes[-1] * unit))
        for offsets, sizes in draw(partitions((*rest, last // unit)))
    ]


@steady
@given(st.data())
def test_hardly_a_byte_is_read_that_nobody_wanted(data: st.DataObject) -> None:
    """At most 1.05 of the bytes that are needed, where a part is no smaller than what one read costs."""
    rows, columns = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 12))
    array = values((rows, columns, 128 * data.draw(st.integers(1, 4))))
    pool, pieces = Pool(), list[StoredPiece]()
    for offsets, sizes in data.draw(grids(array.shape, 128)):
        file, offset = pool.put(sliced(array, (offsets, sizes)), data.draw(st.integers(0, 9)))
        pieces.append(StoredPiece(piece=Piece.box(array.shape, offsets, sizes), file=file, offset=offset))
    source = pool.source(tensor_of(array.shape, pieces))
    for box in data.draw(grids(array.shape, 128)):
        source.reads.clear()
        assert np.array_equal(fetched(source, box), sliced(array, box))
        parts = parts_of(source.catalog.tensors["model.x"], *box)
        allowed = sum(max(1.05 * part.numel * ITEMSIZE, min(part.span_bytes(ITEMSIZE), SMALL_BYTES)) for part in parts)
        assert source.nbytes_read <= allowed


@steady
@given(st.data())
def test_what_is_tiny_is_read_with_no_more_than_its_pages(data: st.DataObject) -> None:
    array = values((data.draw(st.integers(1, 80)), data.draw(st.integers(1, 9)), data.draw(st.integers(1, 99))))
    pool = Pool()
    file, offset = pool.put(array)
    whole = StoredPiece(piece=Piece.whole(array.shape), file=file, offset=offset)
    source = pool.source(tensor_of(array.shape, [whole]))
    box = data.draw(boxes(array.shape))
    assert np.array_equal(fetched(source, box), sliced(array, box))
    places = np.arange(array.size).reshape(array.shape) * ITEMSIZE
    pages = len(np.unique(sliced(places.astype(np.uint32), box) // PAGE))
    assert source.nbytes_read <= max(1.05 * math.prod(box[1]) * ITEMSIZE, (pages + 1) * PAGE, SMALL_BYTES)


def test_a_slice_of_a_large_tensor_reads_the_slice() -> None:
    """DCP reads all 64 MiB."""
    array = values((4096, 4096))
    pool = Pool()
    file, offset = pool.put(array)
    source = pool.source(
        tensor_of(array.shape, [StoredPiece(piece=Piece.whole(array.shape), file=file, offset=offset)])
    )
    for box in (((1024, 0), (64, 4096)), ((0, 512), (4096, 64)), ((0, 0), (512, 512)), ((4095, 0), (1, 4096))):
        source.reads.clear()
        assert np.array_equal(fetched(source, box), sliced(array, box))
        assert source.nbytes_read <= 1.1 * math.prod(box[1]) * ITEMSIZE


def test_a_slice_of_what_lies_transposed_reads_the_slice() -> None:
    array = values((1024, 64))
    pool = Pool()
    file, offset = pool.put(array.T)
    stored_so = StoredPiece(piece=Piece.whole(array.shape), file=file, offset=offset, strides=(1, 1024))
    source = pool.source(tensor_of(array.shape, [stored_so]))
    box = (256, 0), (256, 64)
    assert np.array_equal(fetched(source, box), sliced(array, box))
    assert source.reads == [(file, offset + 4096 * n + 1024, 1024) for n in range(64)]


def test_one_column_is_read_in_parts_of_a_bounded_size() -> None:
    """Whole pages, as every medium does, but never all of them at once."""
    array = values((8192, 512))
    pool = Pool()
    file, offset = pool.put(array)
    source = pool.source(
        tensor_of(array.shape, [StoredPiece(piece=Piece.whole(array.shape), file=file, offset=offset)])
    )
    box = (0, 7), (8192, 1)
    assert np.array_equal(fetched(source, box), sliced(array, box))
    assert max(nbytes for _, _, nbytes in source.reads) <= (1 << 20) + PAGE
    assert len(source.reads) <= 17


def test_large_pieces_are_read_in_parts_where_they_do_not_go_straight_into_place() -> None:
    """Halves of columns in two files, as tensor parallelism leaves them, become one tensor."""
    array = values((6000, 1024))
    pool, pieces = Pool(), list[StoredPiece]()
    for number in range(2):
        box = (0, 512 * number), (6000, 512)
        file, offset = pool.put(sliced(array, box))
        pieces.append(StoredPiece(piece=Piece.box(array.shape, *box), file=file, offset=offset))
    source = pool.source(tensor_of(array.shape, pieces))
    assert np.array_equal(fetched(source, ((0, 0), array.shape)), array)
    assert max(nbytes for _, _, nbytes in source.reads) <= 8 << 20
    assert source.nbytes_read == array.nbytes


def test_what_lies_near_is_read_with_it_where_a_request_costs_more() -> None:
    array = values((64, 4096))
    pool = Pool()
    file, offset = pool.put(array)
    source = pool.source(
        tensor_of(array.shape, [StoredPiece(piece=Piece.whole(array.shape), file=file, offset=offset)])
    )
    source.folder.gap_bytes = 256 << 10
    box = (0, 1024), (64, 2048)
    assert np.array_equal(fetched(source, box), sliced(array, box))
    assert len(source.reads) == 4


@pytest.mark.parametrize("box", [((0, 0), (0, 4)), ((4, 4), (0, 0)), ((2, 1), (2, 0))])
def test_an_empty_box_reads_nothing(box: Box) -> None:
    array = values((4, 4))
    pool = Pool()
    file, offset = pool.put(array)
    source = pool.source(
        tensor_of(array.shape, [StoredPiece(piece=Piece.whole(array.shape), file=file, offset=offset)])
    )
    assert fetched(source, box).size == 0
    assert source.reads == []


@steady
@given(shapes(3, 9), st.integers(1, 200))
def test_a_tensor_is_the_boxes_that_it_is_cut_into(shape: tuple[int, ...], most: int) -> None:
    array = values(shape)
    cut = list(boxes_of(shape, ITEMSIZE, most))
    assert np.array_equal(np.concatenate([sliced(array, box).reshape(-1) for box in cut]), array.reshape(-1))
    assert all(math.prod(sizes) * ITEMSIZE <= max(most, ITEMSIZE) for _, sizes in cut)


def test_a_buffer_of_another_size_is_refused() -> None:
    pool = Pool()
    file, offset = pool.put(values((4,)))
    source = pool.source(tensor_of((4,), [StoredPiece(piece=Piece.whole((4,)), file=file, offset=offset)]))
    with pytest.raises(ValueError, match="15 bytes for a box of"):
        fetch(source, source.catalog.tensors["model.x"], memoryview(bytearray(15)))
