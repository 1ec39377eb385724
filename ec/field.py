"""GF(2^8) with the polynomial 0x11d, the field of RAID-6, ISA-L and reedsolo: tables, products, inverse matrices.

Tables come from the definition (doubling is the generator), so that they depend on no engine. Values are uint8 arrays.
"""

import numpy as np
from numpy.typing import NDArray

POLYNOMIAL = 0x11D
ORDER = 255  # of the generator

Bytes = NDArray[np.uint8]


def _powers() -> list[int]:
    found, value = [], 1
    for _ in range(ORDER):
        found.append(value)
        value <<= 1
        if value & 0x100:
            value ^= POLYNOMIAL
    return found


_EXP = np.array(_powers(), dtype=np.int64)
_LOG = np.zeros(256, dtype=np.int64)
_LOG[_EXP] = np.arange(ORDER)


def _products() -> Bytes:
    table = np.zeros((256, 256), dtype=np.uint8)
    table[1:, 1:] = _EXP[(_LOG[1:, None] + _LOG[None, 1:]) % ORDER]
    return table


MULTIPLY: Bytes = _products()
"""MULTIPLY[a, b] is the product of a and b; a row is the table of one coefficient."""
INVERSE: Bytes = np.concatenate([np.zeros(1, np.uint8), _EXP[(-_LOG[1:]) % ORDER].astype(np.uint8)])
"""INVERSE[a] is 1 / a; 0 for a = 0, which has none."""


def product(left: Bytes, right: Bytes) -> Bytes:
    """The product of two matrices."""
    found: Bytes = np.bitwise_xor.reduce(MULTIPLY[left[:, :, None], right[None, :, :]], axis=1)
    return found


def invert(matrix: Bytes) -> Bytes:
    """The inverse of a square matrix. Raises ValueError where there is none."""
    size = len(matrix)
    work = np.concatenate([matrix, np.eye(size, dtype=np.uint8)], axis=1)
    for column in range(size):
        rows = np.flatnonzero(work[column:, column])
        if not len(rows):
            raise ValueError("the matrix has no inverse")
        pivot = column + int(rows[0])
        work[[column, pivot]] = work[[pivot, column]]
        work[column] = MULTIPLY[INVERSE[work[column, column]], work[column]]
        factors = work[:, column].copy()
        factors[column] = 0
        work ^= MULTIPLY[factors[:, None], work[column][None, :]]
    inverse: Bytes = work[:, size:]
    return inverse
