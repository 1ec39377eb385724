"""Encode, lose, decode: every loss for small codes, random ones for large, on all kinds of memory and odd lengths."""

from hashlib import sha256
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from resilient.ec.codec import Codec
from resilient.ec.engine import Engine, Tables, default_engine
from resilient.ec.matrix import parity_matrix
from resilient.errors import RestoreError, UsageError

Shards = list[NDArray[np.uint8]]
SMALL = [(k, m) for k in range(1, 7) for m in range(1, 5) if k + m <= 8]


@pytest.fixture(params=["default", "tables"])
def engine(request: pytest.FixtureRequest) -> Engine:
    return default_engine() if request.param == "default" else Tables()


def shards(codec: Codec, nbytes: int, seed: int = 0) -> Shards:
    """Data and parity, encoded."""
    data = list(np.random.default_rng(seed).integers(0, 256, (codec.k, nbytes), dtype=np.uint8))
    parity = [np.full(nbytes, 7, dtype=np.uint8) for _ in range(codec.m)]
    codec.encode(data, parity)
    return data + parity


def lose(codec: Codec, whole: Shards, lost: tuple[int, ...]) -> None:
    """Decode what was lost from all that is left, and compare."""
    left = {number: shard for number, shard in enumerate(whole) if number not in lost}
    found = {number: np.full_like(whole[number], 3) for number in lost}
    codec.decode(left, found)
    for number, shard in found.items():
        assert np.array_equal(shard, whole[number]), (codec.k, codec.m, lost, number)


@pytest.mark.parametrize(("k", "m"), SMALL)
def test_every_loss_that_a_small_code_can_bear_comes_back(k: int, m: int, engine: Engine) -> None:
    codec = Codec(k, m, engine)
    whole = shards(codec, 67)
    for count in range(1, m + 1):
        for lost in combinations(range(k + m), count):
            lose(codec, whole, lost)


@settings(deadline=None)
@given(st.data())
def test_random_losses_of_large_codes_come_back(data: st.DataObject) -> None:
    k = data.draw(st.integers(1, 200))
    m = data.draw(st.integers(1, min(20, 255 - k)))
    codec = Codec(k, m)
    lost = data.draw(st.sets(st.integers(0, k + m - 1), min_size=1, max_size=m))
    lose(codec, shards(codec, data.draw(st.integers(1, 300))), tuple(sorted(lost)))


@pytest.mark.parametrize("nbytes", [0, 1, 15, 16, 31, 32, 33, 63, 64, 65, 4095, 4097, (128 << 10) - 1, (256 << 10) + 1])
def test_any_length_will_do(nbytes: int, engine: Engine) -> None:
    codec = Codec(4, 2, engine)
    lose(codec, shards(codec, nbytes), (1, 3))


def test_parity_is_what_the_tables_say_and_parity_0_is_plain_xor(engine: Engine) -> None:
    codec = Codec(5, 3, engine)
    whole = shards(codec, 1000)
    oracle = [np.empty(1000, dtype=np.uint8) for _ in range(3)]
    Codec(5, 3, Tables()).encode(whole[:5], oracle)
    for ours, theirs in zip(whole[5:], oracle, strict=True):
        assert np.array_equal(ours, theirs)
    assert np.array_equal(whole[5], np.bitwise_xor.reduce(whole[:5]))


def test_the_coefficients_stay_what_they_are_since_peers_and_files_hold_what_they_made() -> None:
    assert parity_matrix(3, 2).tolist() == [[1, 1, 1], [245, 143, 166]]
    assert sha256(parity_matrix(16, 4).tobytes()).hexdigest()[:16] == "e223974f1ac12096"


def test_an_update_gives_what_encoding_again_gives(engine: Engine) -> None:
    for nbytes in (1, 1000, (256 << 10) + 17):
        codec = Codec(4, 3, engine)
        whole = shards(codec, nbytes)
        changed = np.random.default_rng(9).integers(0, 256, nbytes, dtype=np.uint8)
        codec.update(2, whole[2], changed, whole[4:])
        whole[2] = changed
        assert codec.verify(whole[:4], whole[4:]) == []


def test_verify_names_inconsistent_parity() -> None:
    codec = Codec(4, 3)
    whole = shards(codec, (1 << 20) + 100)
    assert codec.verify(whole[:4], whole[4:]) == []
    whole[5][-1] ^= 1
    assert codec.verify(whole[:4], whole[4:]) == [5]
    whole[0][5] ^= 128
    assert codec.verify(whole[:4], whole[4:]) == [4, 5, 6]


def test_tensors_bytes_and_memory_views_are_used_where_they_lie() -> None:
    codec = Codec(3, 2)
    data: list[Any] = [torch.randn(64), bytes(range(256)), memoryview(bytearray(256))]
    parity: list[Any] = [torch.empty(256, dtype=torch.uint8), bytearray(256)]
    codec.encode(data, parity)
    found = torch.zeros(64)
    codec.decode({1: data[1], 3: parity[0], 4: parity[1]}, {0: found, 2: (rest := bytearray(b"x" * 256))})
    assert torch.equal(found.view(torch.int32), data[0].view(torch.int32))
    assert rest == bytes(256)
    assert codec.verify(data, parity) == []


def test_parts_of_shards_are_coded_by_themselves() -> None:
    codec = Codec(4, 2)
    whole = shards(codec, 10_000)
    again = [np.zeros(10_000, dtype=np.uint8) for _ in range(2)]
    for begin, end in ((0, 777), (777, 5000), (5000, 10_000)):
        codec.encode([shard[begin:end] for shard in whole[:4]], [shard[begin:end] for shard in again])
    assert all(np.array_equal(ours, theirs) for ours, theirs in zip(again, whole[4:], strict=True))


@settings(deadline=None)
@given(
    st.integers(1, 5),
    st.integers(1, 3),
    st.sampled_from([1, 16, 64, 100, 4096]),
    st.integers(0, 4),
    st.integers(-1, 1),
    st.data(),
)
def test_block_by_block_gives_what_whole_shards_give_at_all_sizes_around_the_edges(
    k: int, m: int, block: int, blocks: int, more: int, data: st.DataObject
) -> None:
    nbytes = max(block * blocks + more, 0)
    codec = Codec(k, m)
    whole = shards(codec, nbytes, seed=blocks)
    streamed = [np.full(nbytes, 5, dtype=np.uint8) for _ in range(m)]
    lost = data.draw(st.sets(st.integers(0, k + m - 1), min_size=1, max_size=m))
    decoded = {number: np.full(nbytes, 6, dtype=np.uint8) for number in lost}
    for begin in range(0, nbytes, block):
        part = slice(begin, begin + block)
        codec.encode([shard[part] for shard in whole[:k]], [shard[part] for shard in streamed])
        left = {number: shard[part] for number, shard in enumerate(whole) if number not in lost}
        codec.decode(left, {number: shard[part] for number, shard in decoded.items()})
    assert all(np.array_equal(ours, theirs) for ours, theirs in zip(streamed, whole[k:], strict=True))
    assert all(np.array_equal(shard, whole[number]) for number, shard in decoded.items())


@settings(deadline=None)
@given(st.integers(1, 5), st.integers(1, 3), st.integers(0, 4), st.integers(-1, 1), st.data())
def test_members_that_change_one_after_the_other_in_some_blocks_leave_the_parity_of_the_last(
    k: int, m: int, blocks: int, more: int, data: st.DataObject
) -> None:
    block = 64
    nbytes = max(block * blocks + more, 0)
    codec = Codec(k, m)
    whole = shards(codec, nbytes)
    numbers = st.integers(0, k - 1)
    for turn, number in enumerate(data.draw(st.lists(numbers, max_size=4))):
        changed = np.random.default_rng(turn + 9).integers(0, 256, nbytes, dtype=np.uint8)
        for begin in range(0, nbytes, block * data.draw(st.integers(1, 2))):
            part = slice(begin, begin + block)
            codec.update(number, whole[number][part], changed[part], [shard[part] for shard in whole[k:]])
            whole[number][part] = changed[part]
    again = [np.empty(nbytes, dtype=np.uint8) for _ in range(m)]
    codec.encode(whole[:k], again)
    assert all(np.array_equal(ours, theirs) for ours, theirs in zip(whole[k:], again, strict=True))


def test_a_plan_is_made_once_and_cannot_be_changed_by_who_gets_it() -> None:
    codec = Codec(4, 2)
    plan = codec.plan({5: "", 4: "", 1: "", 0: ""}, [2, 3])
    assert codec.plan([0, 1, 4, 5], (2, 3)) is plan
    assert plan.sources == (0, 1, 4, 5)
    with pytest.raises(ValueError, match="read-only"):
        plan.coefficients[0, 0] = 1


@pytest.mark.parametrize(("k", "m"), [(0, 1), (1, 0), (200, 56), (-1, 3)])
def test_impossible_codes_are_refused(k: int, m: int) -> None:
    with pytest.raises(UsageError, match="at most 255 together"):
        Codec(k, m)


def test_too_many_losses_are_an_error_and_nothing_is_written() -> None:
    codec = Codec(4, 2)
    whole = shards(codec, 100)
    found = np.full(100, 3, dtype=np.uint8)
    with pytest.raises(RestoreError, match="3 of 6 shards are left and 4 are needed"):
        codec.decode({number: whole[number] for number in (0, 1, 5)}, {2: found})
    assert (found == 3).all()


def test_wrong_shards_are_named() -> None:
    codec = Codec(2, 1)
    a, b, c = (np.zeros(10, dtype=np.uint8) for _ in range(3))
    with pytest.raises(UsageError, match=r"1 data shards .*: 2 of one length"):
        codec.encode([a], [c])
    with pytest.raises(UsageError, match=r"\[9, 10\] bytes"):
        codec.encode([a, b[:9]], [c])
    with pytest.raises(UsageError, match="10 and of 8 bytes"):
        codec.encode([a, b], [c[:8]])
    with pytest.raises(UsageError, match="writable"):
        codec.encode([a, b], [bytes(10)])
    with pytest.raises(UsageError, match="contiguous"):
        codec.encode([a, torch.zeros(20, dtype=torch.uint8)[::2]], [c])
    with pytest.raises(UsageError, match="shards \\[3\\]"):
        codec.decode({0: a, 1: b}, {3: c})
    with pytest.raises(UsageError, match="each lost or present"):
        codec.decode({0: a, 1: b}, {1: c})
    with pytest.raises(UsageError, match="data shard 2 of 2"):
        codec.update(2, a, b, [c])
