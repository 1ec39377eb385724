"""CRC-32 of bytes that were written in pieces by several processes: the checksums of the pieces, put together.

As zlib's crc32_combine does it (https://github.com/madler/zlib, crc32.c): a checksum is a polynomial over GF(2), and n
zero bytes behind it multiply it by x^(8n).
"""

from collections.abc import Iterable
from functools import lru_cache

_POLYNOMIAL = 0xEDB88320  # of CRC-32, its bits reflected; so x^0 is the highest bit


def combined(pieces: Iterable[tuple[int, int]]) -> int:
    """The CRC-32 of pieces that lie one after the other, each given as (CRC-32, bytes)."""
    total = 0
    for crc, nbytes in pieces:
        total = _multiply(_shift(nbytes), total) ^ crc
    return total


@lru_cache(maxsize=64)
def _shift(nbytes: int) -> int:
    """x^(8 nbytes), modulo the polynomial, by squaring."""
    power, result, bits = 1 << 30, 1 << 31, 8 * nbytes  # x^1 and x^0
    while bits:
        if bits & 1:
            result = _multiply(power, result)
        power, bits = _multiply(power, power), bits >> 1
    return result


def _multiply(one: int, other: int) -> int:
    """The product of two polynomials, modulo the polynomial."""
    product = 0
    for bit in range(31, -1, -1):
        if one >> bit & 1:
            product ^= other
        other = other >> 1 ^ (_POLYNOMIAL if other & 1 else 0)
    return product
