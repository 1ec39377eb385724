"""Boxes of live tensors from pieces that were cut in any other way: every element arrives, and little else is read."""

import itertools
import math
import random
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch

from resilient.checkpoint.catalog.catalog import Tensor as Described
from resilient.checkpoint.catalog.table import PieceTable, StoredPiece
from resilient.checkpoint.digest import BLOCK_BYTES, FINE_BYTES
from resilient.checkpoint.pieces import Piece
from resilient.checkpoint.restore.boxes import BoxScatter, Wanted, filling_of, units
from resilient.errors import DamagedImage

DTYPES = [torch.float32, torch.bfloat16, torch.uint8, torch.bool, torch.complex64, torch.float64, torch.complex128]
IMAGES = 3


def box_of(values: torch.Tensor, at: tuple[int, ...], sizes: tuple[int, ...]) -> torch.Tensor:
    for dim, (begin, size) in enumerate(zip(at, sizes, strict=True)):
        values = values.narrow(dim, begin, size)
    return values


class Stored:
    """A tensor of random values, cut at random into pieces in images that hold other bytes too."""

    def __init__(self, chance: random.Random) -> None:
        shape = tuple(chance.choice([1, 2, 3, 7, 40, 130]) for _ in range(chance.randrange(4)))
        self.dtype = chance.choice(DTYPES)
        self.values = torch.randint(0, 2 if self.dtype == torch.bool else 200, shape).to(self.dtype)
        self.begins = [chance.randrange(5) * 64 for _ in range(IMAGES)]
        self.images = [bytearray(begins) for begins in self.begins]
        cuts = [sorted({0, n, *(chance.randrange(n + 1) for _ in range(chance.randrange(3)))}) for n in shape]
        pieces = []
        for box in itertools.product(*(itertools.pairwise(cut) for cut in cuts)):
            offsets, sizes = tuple(a for a, _ in box), tuple(b - a for a, b in box)
            flat = box_of(self.values, offsets, sizes).contiguous().view(-1)
            ends = sorted({0, len(flat), *(chance.randrange(len(flat) + 1) for _ in range(chance.randrange(3)))})
            for start, stop in itertools.pairwise(ends):
                image = chance.randrange(IMAGES)
                piece = Piece(shape=shape, offsets=offsets, sizes=sizes, start=start, stop=stop)
                pieces.append(StoredPiece(piece=piece, file=image, offset=len(self.images[image]) - self.begins[image]))
                self.images[image] += flat[start:stop].clone().view(torch.uint8).numpy().tobytes()
                self.images[image] += bytes(-len(self.images[image]) % 16)
        name = str(self.dtype).removeprefix("torch.")
        table = PieceTable.of(pieces)
        self.tensor = Described(name="x", kind="parameter", dtype=name, shape=shape, pieces=table)


def some_box(chance: random.Random, shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    at = tuple(chance.randrange(n) for n in shape)
    return at, tuple(chance.randrange(1, n - a + 1) for n, a in zip(shape, at, strict=True))


@pytest.mark.parametrize("seed", range(150))
def test_a_box_is_filled_from_whatever_pieces_there_are(seed: int) -> None:
    torch.manual_seed(seed)
    chance = random.Random(seed)
    stored = Stored(chance)
    fill(chance, stored, *some_box(chance, stored.tensor.shape))


@pytest.mark.parametrize("seed", range(100))
def test_a_whole_tensor_is_filled_from_pieces_that_lie_side_by_side(seed: int) -> None:
    torch.manual_seed(seed)
    chance = random.Random(1000 + seed)
    stored = Stored(chance)
    fill(chance, stored, (0,) * len(stored.tensor.shape), stored.tensor.shape)


def fill(chance: random.Random, stored: Stored, at: tuple[int, ...], sizes: tuple[int, ...]) -> None:
    """Fill a box of the tensor from its images, in portions of any size, and compare it."""
    local = torch.zeros(sizes, dtype=stored.dtype)
    if local.dim() > 1 and chance.random() < 0.3:
        local = torch.zeros(sizes[::-1], dtype=stored.dtype).permute(*range(local.dim())[::-1])  # not contiguous
    wanted = Wanted([filling_of(stored.tensor, local, (at, sizes), np.array(stored.begins))])
    assert wanted.nbytes == local.numel() * local.element_size()
    scatter = BoxScatter(wanted)
    for number, use in scatter.uses().items():
        image = stored.images[number]
        needed = wanted.blocks({number: len(image) for number, image in enumerate(stored.images)})[number]
        for begin, end in units(needed, len(image), fine=chance.random() < 0.5):
            while begin < end:
                stop = min(end, begin + chance.choice([16, 64, 4096, 1 << 20]))
                use(begin, memoryview(image)[begin:stop])
                begin = stop
    scatter.finish()
    assert torch.equal(local, box_of(stored.values, at, sizes))


@pytest.mark.parametrize("seed", range(100))
def test_runs_say_of_each_element_where_it_is(seed: int) -> None:
    """Against the simplest there is: for every element of every piece, its place in the image and in the tensor."""
    chance = random.Random(2000 + seed)
    stored = Stored(chance)
    at, sizes = some_box(chance, stored.tensor.shape)
    local = torch.zeros(sizes, dtype=stored.dtype)
    size = local.element_size()
    wanted = Wanted([filling_of(stored.tensor, local, (at, sizes), np.array(stored.begins))])
    found = [
        (image, first + number * stride + byte, to + number * to_stride + byte)
        for image, first, count, stride, length, to, to_stride in wanted.runs.tolist()
        for number in range(count)
        for byte in range(0, length, size)
    ]
    expected = []
    places = torch.arange(local.numel()).view(sizes)
    for one in stored.tensor.pieces.pieces(stored.tensor.shape):
        box = itertools.product(*(range(a, a + n) for a, n in zip(one.piece.offsets, one.piece.sizes, strict=True)))
        for number, element in enumerate(itertools.islice(box, one.piece.start, one.piece.stop)):
            inner = tuple(x - a for x, a in zip(element, at, strict=True))
            if all(0 <= x < n for x, n in zip(inner, sizes, strict=True)):
                byte = stored.begins[one.file] + one.offset + number * size
                expected.append((one.file, byte, int(places[inner]) * size))
    assert sorted(found) == sorted(expected)
    image_bytes = {number: len(image) for number, image in enumerate(stored.images)}
    blocks = {(image, int(one)) for image, some in wanted.blocks(image_bytes).items() for one in np.flatnonzero(some)}
    assert blocks == {(image, byte // FINE_BYTES) for image, byte, _ in expected}


def one_piece(shape: tuple[int, ...], offset: int = 0, drop: int = 0) -> Described:
    piece = Piece.whole(shape).part(0, math.prod(shape) - drop)
    table = PieceTable.of([StoredPiece(piece=piece, file=0, offset=offset)])
    return Described(name="w", kind="parameter", dtype="float32", shape=shape, pieces=table)


def read_of(tensor: Described, local: torch.Tensor, at: tuple[int, ...], *, fine: bool) -> int:
    image_bytes = tensor.nbytes + 4096
    wanted = Wanted([filling_of(tensor, local, (at, tuple(local.shape)), np.zeros(1, np.int64))])
    needed = wanted.blocks({0: image_bytes})[0]
    return sum(end - begin for begin, end in units(needed, image_bytes, fine=fine))


def test_of_a_slice_hardly_more_is_read_than_it_has() -> None:
    tensor = one_piece((4096, 4096), offset=4096)  # 64 MiB
    rows = torch.zeros(64, 4096)  # 1 MiB
    assert read_of(tensor, rows, (1000, 0), fine=True) <= 1.1 * 2**20
    assert read_of(tensor, rows, (1000, 0), fine=False) <= 2 * BLOCK_BYTES
    columns = torch.zeros(4096, 1)
    assert read_of(tensor, columns, (0, 0), fine=True) <= 64 * 2**20 + FINE_BYTES


def test_rows_that_are_narrower_than_a_block_are_read_once() -> None:
    tensor = one_piece((64, 4096), offset=4096)
    assert read_of(tensor, torch.zeros(64, 2048), (0, 0), fine=True) <= tensor.nbytes + 2 * FINE_BYTES


def test_of_columns_that_are_far_apart_only_their_blocks_are_read() -> None:
    tensor = one_piece((16, 65536), offset=4096)  # rows of 256 KiB
    assert read_of(tensor, torch.zeros(16, 100), (0, 0), fine=True) == 16 * FINE_BYTES


def test_bytes_that_two_tensors_want_go_to_both() -> None:
    values = torch.randn(64, 32)
    whole, columns, begins = torch.zeros(64, 32), torch.zeros(62, 3), np.zeros(1, np.int64)
    tensor, image = one_piece((64, 32)), memoryview(values.numpy().data).cast("B")
    fillings = [filling_of(tensor, whole, ((0, 0), (64, 32)), begins)]
    fillings.append(filling_of(tensor, columns, ((1, 7), (62, 3)), begins))
    (use,) = BoxScatter(Wanted(fillings)).uses().values()
    for begin in range(0, len(image), 64):
        use(begin, image[begin : begin + 64])
    assert torch.equal(whole, values)
    assert torch.equal(columns, values[1:63, 7:10])


def test_elements_that_are_nowhere_are_missed() -> None:
    begins, tensor = np.zeros(1, np.int64), one_piece((4, 4), drop=1)
    with pytest.raises(DamagedImage, match="'w'"):
        filling_of(tensor, torch.zeros(4, 4), ((0, 0), (4, 4)), begins)
    assert len(filling_of(tensor, torch.zeros(2, 4), ((1, 0), (2, 4)), begins).runs) == 1


def test_a_piece_behind_the_end_of_its_image_is_refused() -> None:
    wanted = Wanted([filling_of(one_piece((4, 4)), torch.zeros(4, 4), ((0, 0), (4, 4)), np.zeros(1, np.int64))])
    assert wanted.blocks({0: 64})
    with pytest.raises(DamagedImage, match="behind the ends"):
        wanted.blocks({0: 63})


def cut_in_rows(offset: int, ranks: int = 4) -> Described:
    """A tensor of which ranks hold sixteen rows each, in the images of four."""
    shape = (16 * ranks, 32)
    pieces = [
        StoredPiece(piece=Piece.box(shape, (16 * rank, 0), (16, 32)), file=rank % 4, offset=offset)
        for rank in range(ranks)
    ]
    return Described(name="w", kind="parameter", dtype="float32", shape=shape, pieces=PieceTable.of(pieces))


def calls_of(act: Callable[[], object]) -> int:
    """How many of Python's functions are called."""
    calls = 0

    def count(_frame: object, event: str, _argument: object) -> None:
        nonlocal calls
        calls += event == "call"

    sys.setprofile(count)
    act()
    sys.setprofile(None)
    return calls


def test_of_tensors_that_are_cut_alike_only_the_first_is_thought_about() -> None:
    """Layers, and a parameter's moments, differ only by where they are."""
    local, begins = torch.zeros(24, 32), np.zeros(4, np.int64)
    filling_of(cut_in_rows(4096), local, ((20, 0), (24, 32)), begins)
    tensor = cut_in_rows(8192)
    assert calls_of(lambda: filling_of(tensor, local, ((20, 0), (24, 32)), begins)) < 30


def test_thousands_of_pieces_are_planned_as_numbers_not_one_by_one() -> None:
    ranks = 2000
    tensor, local = cut_in_rows(4096, ranks), torch.zeros(16 * ranks, 16)

    def plan() -> None:
        wanted = Wanted([filling_of(tensor, local, ((0, 8), (16 * ranks, 16)), np.zeros(4, np.int64))])
        assert len(wanted.blocks(dict.fromkeys(range(4), 1 << 20))) == 4
        assert len(BoxScatter(wanted).uses()) == 4

    assert calls_of(plan) < ranks / 4
