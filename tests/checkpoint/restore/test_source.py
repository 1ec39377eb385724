"""Images block by block: nothing damaged is ever given away, and what is damaged has its tensors' names."""

import json
import threading
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from resilient.checkpoint.digest import BLOCK_BYTES, block_count, block_range, digest
from resilient.checkpoint.record import Record
from resilient.checkpoint.restore.scatter import Range, Scatter
from resilient.checkpoint.restore.source import InMemory, InStore, Source
from resilient.errors import DamagedImage, LevelFailed

SIZE = 9 * BLOCK_BYTES + 12_345
BEGINS = 4096


def image() -> bytearray:
    torch.manual_seed(1)
    data = bytearray(torch.randint(256, (SIZE,), dtype=torch.uint8).numpy().tobytes())
    data[:8] = (BEGINS - 8).to_bytes(8, "little")
    return data


def record_of(data: bytes | bytearray) -> Record:
    view = memoryview(data)
    spans = [block_range(number, SIZE) for number in range(block_count(SIZE))]
    pieces = [
        {"key": "first", "offset": 0, "nbytes": BLOCK_BYTES},
        {"key": "middle", "offset": BLOCK_BYTES, "nbytes": 4 * BLOCK_BYTES},
        {"key": "last", "offset": SIZE - BEGINS - 100, "nbytes": 100},
    ]
    return Record(
        run_id="run",
        step=1,
        rank=0,
        world_size=1,
        plan_digest="",
        image_name="image",
        image_bytes=SIZE,
        blocks=tuple(digest(view[start:stop]) for start, stop in spans),
        pieces_text=json.dumps(pieces),
    )


def source(kind: str, record: Record, data: bytearray) -> Source:
    def read(offset: int, part: memoryview) -> None:
        part[:] = data[offset : offset + len(part)]

    def read_parts(offset: int, parts: Sequence[Any]) -> None:
        for part in parts:
            length = memoryview(part).nbytes
            memoryview(part).cast("B")[:] = data[offset : offset + length]
            offset += length

    if kind == "memory":
        return InMemory(record, "memory", memoryview(data))
    if kind == "read memory":
        return InMemory(record, "memory", memoryview(data), read=read_parts)
    return InStore(record, "local", read)


@pytest.mark.parametrize("kind", ["memory", "read memory", "store"])
def test_every_block_comes_once(kind: str) -> None:
    data, got, lock = image(), bytearray(SIZE), threading.Lock()
    counts: list[int] = []

    def use(begin: int, block: memoryview) -> None:
        with lock:
            got[begin : begin + len(block)] = block
            counts.append(len(block))

    source(kind, record_of(data), data).stream(use)
    assert got == data
    assert sum(counts) == SIZE


@pytest.mark.parametrize("kind", ["memory", "read memory", "store"])
def test_a_span_is_verified(kind: str) -> None:
    data = image()
    record = record_of(data)
    data[2 * BLOCK_BYTES + 5] ^= 1
    there = source(kind, record, data)
    assert there.span(0, BEGINS) == data[:BEGINS]
    assert there.span(3 * BLOCK_BYTES, SIZE) == data[3 * BLOCK_BYTES :]
    with pytest.raises(DamagedImage, match=r"1 of 10 blocks .* \(step 1, rank 0; tensors: 'middle'\)"):
        there.span(3 * BLOCK_BYTES - 1, 3 * BLOCK_BYTES + 1)


@pytest.mark.parametrize("kind", ["memory", "read memory", "store"])
def test_damaged_blocks_are_named_and_never_given(kind: str) -> None:
    data = image()
    record = record_of(data)
    data[3 * BLOCK_BYTES] ^= 1
    data[SIZE - 1] ^= 1
    there = source(kind, record, data)
    there.span(0, 8)
    given: list[int] = []
    with pytest.raises(DamagedImage, match="2 of 10 blocks .*tensors: 'middle', 'last'"):
        there.stream(lambda begin, block: given.append(begin // BLOCK_BYTES))
    assert sorted(given) == [0, 1, 2, 4, 5, 6, 7, 8]


def test_what_is_closed_before_it_was_streamed_leaves_no_thread() -> None:
    before = threading.active_count()
    data = image()
    there = source("store", record_of(data), data)
    assert isinstance(there, InStore)
    there.begin()
    there.span(0, 8)
    there.close()
    there.close()
    assert threading.active_count() == before


def test_what_was_begun_is_read_once_and_serves_spans_and_stream() -> None:
    data, reads, got = image(), list[int](), bytearray(SIZE)

    def read(offset: int, part: memoryview) -> None:
        reads.append(offset)
        part[:] = data[offset : offset + len(part)]

    def use(begin: int, block: memoryview) -> None:
        got[begin : begin + len(block)] = block

    there = InStore(record_of(data), "local", read)
    there.begin()
    assert there.span(0, BEGINS) == data[:BEGINS]
    assert there.span(SIZE - 100, SIZE) == data[-100:]
    there.stream(use)
    there.close()
    assert got == data
    assert sorted(reads) == list(range(0, SIZE, BLOCK_BYTES))


def test_a_read_that_fails_after_it_was_begun_is_raised_and_nothing_hangs() -> None:
    data = image()

    def read(offset: int, part: memoryview) -> None:
        if offset == 4 * BLOCK_BYTES:
            raise LevelFailed("no such block")
        part[:] = data[offset : offset + len(part)]

    there = InStore(record_of(data), "local", read)
    there.begin()
    with pytest.raises(LevelFailed, match="no such block"):
        there.stream(lambda begin, block: None)
    there.close()


def test_when_every_read_fails_nobody_waits_for_a_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resilient.checkpoint.restore.source._READERS", 2)  # fewer than there are units

    def read(offset: int, part: memoryview) -> None:
        raise LevelFailed("the store is gone")

    for begun in (False, True):
        there = InStore(record_of(image()), "local", read)
        if begun:
            there.begin()
        with pytest.raises(LevelFailed, match="the store is gone"):
            there.stream(lambda begin, block: None)
        there.close()


def test_what_is_held_needs_no_second_look() -> None:
    data, room = image(), bytearray(SIZE)
    there = source("store", record_of(data), data)
    assert isinstance(there, InStore)
    held = there.hold(memoryview(room))
    assert room == data
    room[5] ^= 1  # only to see that it is not compared again
    assert held.span(0, 8) == room[:8]


@pytest.mark.parametrize("kind", ["memory", "read memory", "store"])
@pytest.mark.parametrize("shape", ["gaps", "overlaps", "turned", "crumbs", "islands"])
def test_a_state_is_loaded_wherever_its_tensors_are(kind: str, shape: str) -> None:
    data = image()
    bounds = {
        "gaps": [(0, 5), (BLOCK_BYTES - 3, 2 * BLOCK_BYTES + 7), (2 * BLOCK_BYTES + 8, SIZE - 1)],
        "overlaps": [(100, 3 * BLOCK_BYTES), (BLOCK_BYTES, BLOCK_BYTES + 50), (2 * BLOCK_BYTES, SIZE)],
        "turned": [(8, 2 * BLOCK_BYTES)],
        "islands": [(start, start + 12_345) for start in range(50, SIZE - 12_345, 400_000)],
        "crumbs": [(start, start + 7) for start in range(50, 3 * BLOCK_BYTES, 9001)],
    }[shape]
    tensors = [torch.zeros(stop - start, dtype=torch.uint8) for start, stop in bounds]
    if shape == "turned":
        tensors = [torch.zeros(8, (bounds[0][1] - 8) // 8, dtype=torch.uint8).t()]
    spans = [
        Range(0, start, stop - start, tensor, 0, tensor.numel())
        for (start, stop), tensor in zip(bounds, tensors, strict=True)
    ]
    source(kind, record_of(data), data).load(Scatter(spans))
    for (start, stop), tensor in zip(bounds, tensors, strict=True):
        assert tensor.contiguous().view(-1).numpy().tobytes() == data[start:stop]


@pytest.mark.parametrize("kind", ["memory", "read memory", "store"])
def test_damage_is_named_when_a_state_is_loaded(kind: str) -> None:
    data = image()
    record = record_of(data)
    data[3 * BLOCK_BYTES] ^= 1
    whole = torch.zeros(SIZE, dtype=torch.uint8)
    with pytest.raises(DamagedImage, match="1 of 10 blocks"):
        source(kind, record, data).load(Scatter([Range(0, 0, SIZE, whole, 0, SIZE)]))
    assert whole[: 3 * BLOCK_BYTES].numpy().tobytes() == data[: 3 * BLOCK_BYTES], "the others are there"


@pytest.mark.parametrize("portion", [1 << 20, BLOCK_BYTES, SIZE])
def test_ranges_are_filled_whatever_the_portions(portion: int) -> None:
    data = image()
    view = memoryview(data)
    turned = torch.zeros(1000, 1100, dtype=torch.float32).t()
    whole = torch.zeros(500, dtype=torch.float64)
    spans = [
        Range(0, 4104, 800, whole, 100, 200),
        Range(0, BLOCK_BYTES - 16, 4_400_000, turned, 0, 1_100_000),
        Range(0, SIZE - 3, 3, torch.zeros(3, dtype=torch.uint8), 0, 3),
        Range(0, 9, 0, torch.zeros(0), 0, 0),
    ]
    scatter = Scatter(spans)
    assert scatter.nbytes == 4_400_803
    for begin in reversed(range(0, SIZE, portion)):
        scatter.take(begin, view[begin : begin + portion])
    assert whole.view(torch.uint8).numpy().tobytes()[800:1600] == data[4104:4904]
    assert bytes(800) == whole.view(torch.uint8).numpy().tobytes()[:800]
    flat = turned.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    assert flat == data[BLOCK_BYTES - 16 : BLOCK_BYTES - 16 + 4_400_000]
    assert spans[2].local.numpy().tobytes() == data[-3:]
