"""Seekable zstd frames: any range comes back, damage is found, and the zstd program reads the file."""

import json
import subprocess
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from resilient.checkpoint.levels.files import FileStore
from resilient.checkpoint.levels.frames import compress_frames, read_range
from resilient.checkpoint.levels.store import MemoryStore, Store
from resilient.errors import DamagedImage, NewerFormat
from tests.conformance.store_contract import get, put

NAME = "x"


def stored(
    data: bytes, frame_bytes: int, cuts: list[int] | None = None, store: Store | None = None
) -> tuple[Store, dict[str, Any]]:
    store = store or MemoryStore()
    bounds = [0, *sorted(min(cut, len(data)) for cut in cuts or []), len(data)]
    view = memoryview(data)
    frames = compress_frames((view[a:b] for a, b in pairwise(bounds)), frame_bytes)
    store.write(NAME, frames)
    return store, json.loads(json.dumps(frames.encoding()))


@settings(max_examples=150, deadline=None)
@given(
    data=st.binary(min_size=1, max_size=3000),
    frame_bytes=st.integers(1, 1500),
    cuts=st.lists(st.integers(0, 3000), max_size=4),
    start=st.floats(0, 1),
    length=st.floats(0, 1),
)
def test_any_range_of_any_data_in_any_chunks_comes_back(
    data: bytes, frame_bytes: int, cuts: list[int], start: float, length: float
) -> None:
    store, encoding = stored(data, frame_bytes, cuts)
    assert len(encoding["frames"]) == -(-len(data) // frame_bytes)
    assert sum(encoding["frames"]) == store.size(NAME)
    offset = int(start * len(data))
    into = bytearray(int(length * (len(data) - offset)))
    read_range(store, NAME, encoding, len(data), offset, memoryview(into))
    assert into == data[offset : offset + len(into)]


@settings(max_examples=150, deadline=None)
@given(
    data=st.binary(min_size=1, max_size=600),
    frame_bytes=st.integers(50, 300),
    where=st.floats(0, 0.999),
    bit=st.integers(0, 7),
)
def test_a_flipped_bit_is_found_or_did_no_harm(data: bytes, frame_bytes: int, where: float, bit: int) -> None:
    store, encoding = stored(data, frame_bytes)
    damaged = bytearray(get(store, NAME))
    damaged[int(where * len(damaged))] ^= 1 << bit
    put(store, NAME, bytes(damaged))
    into = bytearray(len(data))
    try:
        read_range(store, NAME, encoding, len(data), 0, memoryview(into))
    except DamagedImage:
        return
    assert into == data


def test_a_file_that_was_cut_is_damage() -> None:
    data = bytes(range(256)) * 40
    store, encoding = stored(data, 1000)
    put(store, NAME, get(store, NAME)[:-1])
    into = bytearray(len(data))
    with pytest.raises(DamagedImage):
        read_range(store, NAME, encoding, len(data), 0, memoryview(into))
    read_range(store, NAME, encoding, len(data), 10, memoryview(into)[:2000])
    assert into[:2000] == data[10:2010]


def test_a_frame_of_another_length_is_refused_before_memory_is_taken() -> None:
    bomb = zstandard.ZstdCompressor(level=1, write_content_size=True).compress(bytes(1 << 28))
    store = MemoryStore()
    put(store, NAME, bomb)
    with pytest.raises(DamagedImage, match="says it holds 268435456"):
        read_range(
            store, NAME, {"name": "zstd", "frame_bytes": 100, "frames": [len(bomb)]}, 100, 0, memoryview(bytearray(1))
        )


@pytest.mark.parametrize(
    "encoding",
    [
        {"name": "zstd"},
        {"name": "zstd", "frame_bytes": 0, "frames": [1]},
        {"name": "zstd", "frame_bytes": 10, "frames": [1]},
        {"name": "zstd", "frame_bytes": 10, "frames": [5, -1]},
        {"name": "zstd", "frame_bytes": 10, "frames": "ab"},
    ],
)
def test_a_list_of_frames_that_does_not_fit_is_damage(encoding: dict[str, Any]) -> None:
    with pytest.raises(DamagedImage, match="frames"):
        read_range(MemoryStore(), NAME, encoding, 20, 0, memoryview(bytearray(1)))


def test_an_unknown_encoding_asks_for_a_newer_library() -> None:
    with pytest.raises(NewerFormat, match="lz5"):
        read_range(MemoryStore(), NAME, {"name": "lz5"}, 20, 0, memoryview(bytearray(1)))


def test_a_range_outside_of_the_image_is_refused() -> None:
    store, encoding = stored(b"abc", 2)
    for offset, length in [(-1, 1), (0, 4), (3, 1)]:
        with pytest.raises(ValueError, match="outside"):
            read_range(store, NAME, encoding, 3, offset, memoryview(bytearray(length)))


def test_only_the_frames_of_a_range_are_read() -> None:
    class Counting(MemoryStore):
        bytes_read = 0

        def read(self, name: str, offset: int, into: memoryview) -> None:
            self.bytes_read += len(into)
            super().read(name, offset, into)

    data = bytes(range(256)) * 400
    store = Counting()
    _, encoding = stored(data, 1024, store=store)
    into = bytearray(1500)
    read_range(store, NAME, encoding, len(data), 3000, memoryview(into))
    assert into == data[3000:4500]
    assert store.bytes_read == sum(encoding["frames"][2:5])


def test_the_zstd_program_opens_the_file(tmp_path: Path) -> None:
    data = bytes(range(256)) * 100
    stored(data, 1000, store=FileStore(str(tmp_path)))
    done = subprocess.run(["zstd", "-d", "-c", str(tmp_path / NAME)], capture_output=True, check=True)
    assert done.stdout == data


def test_a_frame_length_that_is_not_positive_is_refused() -> None:
    with pytest.raises(ValueError, match="positive"):
        compress_frames([], 0)
