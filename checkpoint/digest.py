"""Digests of an image, block by block.

xxh3-128 finds damage (it is no defence against an attacker) at memory speed; see
https://github.com/Cyan4973/xxHash/blob/dev/doc/xxhash_spec.md. A block is what one digest covers, so it is also
the least that must be read to verify a range.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import xxhash

BLOCK_BYTES = 4 << 20
ALGORITHM = "xxh3_128"

Buffer = Any  # whatever has the buffer protocol, which has no name before Python 3.12


def digest(data: memoryview | bytes) -> str:
    """The digest of one block, 32 hexadecimal digits. Releases the interpreter lock for large blocks."""
    return xxhash.xxh3_128_hexdigest(data)


def digest_of(parts: Iterable[Buffer]) -> str:
    """The digest of a block whose bytes lie in several places."""
    found = xxhash.xxh3_128()
    for part in parts:
        found.update(part)
    return found.hexdigest()


def block_count(image_bytes: int) -> int:
    return -(-image_bytes // BLOCK_BYTES)


def block_range(index: int, image_bytes: int) -> tuple[int, int]:
    """[start, stop) of a block within an image."""
    start = index * BLOCK_BYTES
    return start, min(start + BLOCK_BYTES, image_bytes)


def damaged_blocks(part: memoryview, blocks: Sequence[str], begin: int = 0) -> list[int]:
    """The indices of the blocks in a part of an image whose bytes differ from their digests.

    The part begins at offset `begin`, on a block border, and ends on one or with the image.
    """
    first = begin // BLOCK_BYTES
    return [
        first + number
        for number in range(block_count(len(part)))
        if digest(part[number * BLOCK_BYTES : (number + 1) * BLOCK_BYTES]) != blocks[first + number]
    ]
