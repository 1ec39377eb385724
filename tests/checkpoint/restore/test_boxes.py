"""Boxes of live tensors from pieces that were cut in any other way: every element arrives, and little else is read."""

import itertools
import math
import random
import sys

import pytest
import torch

from resilient.checkpoint.catalog.catalog import Tensor as Described
from resilient.checkpoint.catalog.table import PieceTable, StoredPiece
from resilient.checkpoint.digest import BLOCK_BYTES, FINE_BYTES
from resilient.checkpoint.pieces import Piece
from resilient.checkpoint.restore.boxes import BoxScatter, box_ranges, needed_blocks, units
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
    ranges = box_ranges(stored.tensor, local, (at, sizes), stored.begins)
    assert sum(one.needed_bytes for one in ranges) == local.numel() * local.element_size()
    for number, image in enumerate(stored.images):
        mine = [one for one in ranges if one.image_rank == number]
        scatter = BoxScatter(mine)
        for begin, end in units(needed_blocks(mine, len(image)), len(image), fine=chance.random() < 0.5):
            while begin < end:
                stop = min(end, begin + chance.choice([16, 64, 4096, 1 << 20]))
                scatter.take(begin, memoryview(image)[begin:stop])
                begin = stop
        scatter.finish()
    assert torch.equal(local, box_of(stored.values, at, sizes))


def one_piece(shape: tuple[int, ...], offset: int = 0, drop: int = 0) -> Described:
    piece = Piece.whole(shape).part(0, math.prod(shape) - drop)
    table = PieceTable.of([StoredPiece(piece=piece, file=0, offset=offset)])
    return Described(name="w", kind="parameter", dtype="float32", shape=shape, pieces=table)


def read_of(tensor: Described, local: torch.Tensor, at: tuple[int, ...], *, fine: bool) -> int:
    image_bytes = tensor.nbytes + 4096
    ranges = box_ranges(tensor, local, (at, tuple(local.shape)), [0])
    return sum(end - begin for begin, end in units(needed_blocks(ranges, image_bytes), image_bytes, fine=fine))


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


def test_elements_that_are_nowhere_are_missed() -> None:
    with pytest.raises(DamagedImage, match="'w'"):
        box_ranges(one_piece((4, 4), drop=1), torch.zeros(4, 4), ((0, 0), (4, 4)), [0])
    assert box_ranges(one_piece((4, 4), drop=1), torch.zeros(2, 4), ((1, 0), (2, 4)), [0])


def cut_in_rows(offset: int) -> Described:
    """A tensor that four ranks hold some rows of each."""
    pieces = [
        StoredPiece(piece=Piece.box((64, 32), (16 * rank, 0), (16, 32)), file=rank, offset=offset) for rank in range(4)
    ]
    return Described(name="w", kind="parameter", dtype="float32", shape=(64, 32), pieces=PieceTable.of(pieces))


def test_of_tensors_that_are_cut_alike_only_the_first_is_thought_about() -> None:
    """Layers, and a parameter's moments, differ only by where they are. Counted are the calls of Python's functions."""
    local = torch.zeros(24, 32)
    calls = 0

    def count(_frame: object, event: str, _argument: object) -> None:
        nonlocal calls
        calls += event == "call"

    def plan(offset: int) -> int:
        nonlocal calls
        tensor, calls = cut_in_rows(offset), 0
        sys.setprofile(count)
        ranges = box_ranges(tensor, local, ((20, 0), (24, 32)), [0] * 4)
        needed_blocks([one for one in ranges if one.image_rank == 1], 1 << 20)
        sys.setprofile(None)
        return calls

    plan(4096)
    assert plan(8192) < 40
