"""The field against two that are not ours: the definition, bit by bit, and reedsolo's arithmetic."""

import numpy as np
import pytest
import reedsolo
from hypothesis import given
from hypothesis import strategies as st

from resilient.ec.field import INVERSE, MULTIPLY, Bytes, invert, product


def by_definition(a: int, b: int) -> int:
    """Multiply polynomials over GF(2), then divide by x^8 + x^4 + x^3 + x^2 + 1."""
    total = 0
    for bit in range(8):
        if b >> bit & 1:
            total ^= a << bit
    for bit in range(15, 7, -1):
        if total >> bit & 1:
            total ^= 0x11D << (bit - 8)
    return total


def test_every_product_is_that_of_the_definition() -> None:
    assert MULTIPLY.tolist() == [[by_definition(a, b) for b in range(256)] for a in range(256)]


def test_every_product_and_inverse_is_that_of_reedsolo() -> None:
    reedsolo.init_tables(0x11D)
    for a in range(256):
        assert MULTIPLY[a].tolist() == [reedsolo.gf_mul(a, b) for b in range(256)]
    assert INVERSE[1:].tolist() == [reedsolo.gf_inverse(a) for a in range(1, 256)]


@given(st.integers(1, 12), st.integers(0, 2**32 - 1))
def test_a_matrix_times_its_inverse_is_one(size: int, seed: int) -> None:
    matrix = np.random.default_rng(seed).integers(0, 256, (size, size), dtype=np.uint8)
    try:
        inverse = invert(matrix)
    except ValueError:
        return  # about one in 255 has none
    one: Bytes = np.eye(size, dtype=np.uint8)
    assert np.array_equal(product(matrix, inverse), one)
    assert np.array_equal(product(inverse, matrix), one)


def test_a_matrix_without_inverse_is_refused() -> None:
    with pytest.raises(ValueError, match="no inverse"):
        invert(np.array([[1, 2], [1, 2]], dtype=np.uint8))
