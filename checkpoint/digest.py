"""Digests of an image, block by block.

xxh3-128 finds damage (it is no defence against an attacker) at memory speed; see
https://github.com/Cyan4973/xxHash/blob/dev/doc/xxhash_spec.md. A block is what one digest covers, so it is also
the least that must be read to verify a range.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import xxhash

BLOCK_BYTES = 4 << 20
ALGORITHM = "xxh3_128"


def digest(data: memoryview | bytes) -> str:
    """The digest of one block, 32 hexadecimal digits. Releases the interpreter lock for large blocks."""
    return xxhash.xxh3_128_hexdigest(data)


def block_count(image_bytes: int) -> int:
    return -(-image_bytes // BLOCK_BYTES)


def block_range(index: int, image_bytes: int) -> tuple[int, int]:
    """[start, stop) of a block within an image."""
    start = index * BLOCK_BYTES
    return start, min(start + BLOCK_BYTES, image_bytes)


def damaged_blocks(image: memoryview, blocks: Sequence[str], threads: int = 1) -> list[int]:
    """The indices of the blocks of a whole image whose bytes differ from their digests. Reads every byte once."""

    def differs(index: int) -> bool:
        start, stop = block_range(index, len(image))
        return digest(image[start:stop]) != blocks[index]

    indices = range(block_count(len(image)))
    if threads <= 1:
        return [index for index in indices if differs(index)]
    with ThreadPoolExecutor(threads) as pool:
        return [index for index, bad in zip(indices, pool.map(differs, indices), strict=True) if bad]
