"""Digests of an image, block by block.

xxh3-128 finds damage (it is no defence against an attacker) at memory speed; see
https://github.com/Cyan4973/xxHash/blob/dev/doc/xxhash_spec.md. A block is what one digest covers, so it is also
the least that must be read to verify a range.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import xxhash

BLOCK_BYTES = 4 << 20
FINE_BYTES = 64 << 10  # on disks, so that a small range can be verified without the rest of its block
FINE_DIGEST_BYTES = 16
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


class FineDigests:
    """Digests of the blocks of `FINE_BYTES` of a stream, 16 bytes each, taken while it passes by."""

    def __init__(self) -> None:
        self._found: list[bytes] = []
        self._open = xxhash.xxh3_128()
        self._open_bytes = 0

    def update(self, chunk: memoryview) -> None:
        """The bytes that come next."""
        at, end = 0, chunk.nbytes
        while at < end:
            if not self._open_bytes and end - at >= FINE_BYTES:
                self._found.append(xxhash.xxh3_128_digest(chunk[at : at + FINE_BYTES]))
                at += FINE_BYTES
                continue
            part = chunk[at : at + FINE_BYTES - self._open_bytes]
            self._open.update(part)
            self._open_bytes += part.nbytes
            at += part.nbytes
            if self._open_bytes == FINE_BYTES:
                self._close()

    def finish(self) -> bytes:
        """All digests, end to end; the last block may be short."""
        if self._open_bytes:
            self._close()
        return b"".join(self._found)

    def _close(self) -> None:
        self._found.append(self._open.digest())
        self._open.reset()
        self._open_bytes = 0


def fine_damage(part: memoryview, digests: bytes, begin: int) -> list[int]:
    """The offsets of the fine blocks in a part of an image that differ from `digests`, those of the whole image.

    The part begins at offset `begin`, on a fine border, and ends on one or with the image.
    """
    first = begin // FINE_BYTES * FINE_DIGEST_BYTES
    return [
        begin + at
        for number, at in enumerate(range(0, part.nbytes, FINE_BYTES))
        if xxhash.xxh3_128_digest(part[at : at + FINE_BYTES])
        != digests[first + number * FINE_DIGEST_BYTES : first + (number + 1) * FINE_DIGEST_BYTES]
    ]


def fine_count(image_bytes: int) -> int:
    return -(-image_bytes // FINE_BYTES)


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
