"""Engines: the native one is there on this machine, and none is trusted that computes something else."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resilient.ec import engine as engines
from resilient.ec.engine import Combine, Engine, Isal, Tables, default_engine
from resilient.ec.field import Bytes


def test_the_native_engine_is_found_where_its_wheel_is_installed() -> None:
    assert default_engine().name.startswith("isa-l")


def test_without_a_library_the_tables_serve_and_the_log_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(engines, "_libraries", lambda: iter(["libc.so.6", "/nowhere/libisal.so"]))
    assert isinstance(default_engine.__wrapped__(), Tables)
    assert "install pyeclib" in caplog.text


def test_a_library_that_lies_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    class Lying(Isal):
        def prepare(self, coefficients: Bytes) -> Combine:
            combine = super().prepare(coefficients)
            return lambda sources, targets, nbytes: combine(sources, targets, nbytes - 1)

    path = default_engine().name.removeprefix("isa-l (").removesuffix(")")
    Isal(path)
    with pytest.raises(RuntimeError, match="something else than the tables"):
        Lying(path)


def native(longest_bytes: int = 1 << 30) -> Isal:
    return Isal(default_engine().name.removeprefix("isa-l (").removesuffix(")"), longest_bytes)


def aligned(count: int, nbytes: int, offset: int = 0) -> list[Bytes]:
    """Ranges that begin `offset` bytes after a multiple of 64, with a byte 90 before and behind each."""
    found = []
    for _ in range(count):
        memory = np.full(nbytes + 192, 90, dtype=np.uint8)
        begin = -int(memory.ctypes.data) % 64 + 64 + offset
        found.append(memory[begin - 1 : begin + nbytes + 1])
    return found


OFFSETS = st.sampled_from([0, 0, 1, 16, 32])


@settings(deadline=None)
@given(st.integers(1, 5), st.integers(1, 3), st.integers(0, 700), OFFSETS, OFFSETS, st.integers(0, 9))
def test_all_ones_aligned_or_not_give_the_xor_and_touch_nothing_else(
    columns: int, rows: int, nbytes: int, offset: int, to_offset: int, seed: int
) -> None:
    sources, targets = aligned(columns, nbytes, offset), aligned(rows, nbytes, to_offset)
    for number, source in enumerate(sources):
        source[1:-1] = np.random.default_rng(10 * seed + number).integers(0, 256, nbytes, dtype=np.uint8)
    addresses = [[int(one.ctypes.data) + 1 for one in ranges] for ranges in (sources, targets)]
    default_engine().prepare(np.ones((rows, columns), dtype=np.uint8))(addresses[0], addresses[1], nbytes)
    expected = np.bitwise_xor.reduce([source[1:-1] for source in sources])
    for target in targets:
        assert np.array_equal(target[1:-1], expected)
        assert target[0] == target[-1] == 90


@settings(deadline=None)
@given(st.integers(0, 5), st.integers(-2, 2), st.sampled_from([(1, 3), (2, 3)]), st.integers(0, 9))
def test_ranges_longer_than_the_library_can_take_are_cut(
    pieces: int, more: int, shape: tuple[int, int], seed: int
) -> None:
    nbytes = max(128 * pieces + more, 0)
    generator = np.random.default_rng(seed)
    coefficients = np.ones(shape, np.uint8) if shape[0] == 1 else generator.integers(0, 256, shape, dtype=np.uint8)
    sources = [one[1:-1] for one in aligned(3, nbytes)]
    for source in sources:
        source[:] = generator.integers(0, 256, nbytes, dtype=np.uint8)
    results = []
    engines_: tuple[Engine, Engine] = (native(longest_bytes=128), Tables())
    for used in engines_:
        targets = [one[1:-1] for one in aligned(shape[0], nbytes)]
        addresses = [[int(one.ctypes.data) for one in ranges] for ranges in (sources, targets)]
        used.prepare(coefficients)(addresses[0], addresses[1], nbytes)
        used.add(coefficients[:, 0].copy(), addresses[0][1], addresses[1], nbytes)
        results.append(np.array(targets))
    assert np.array_equal(results[0], results[1])
