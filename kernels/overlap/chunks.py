"""Where rows are cut, and in which order a rank takes its peers: pure."""

from itertools import pairwise

LEAST_ROWS = 256  # below, a matmul takes longer for each row (measured on CPUs and GPUs alike)


def most(rows: int) -> int:
    """The most chunks that `rows` may be cut into."""
    return max(1, rows // LEAST_ROWS)


def cut(rows: int, chunks: int) -> list[tuple[int, int]]:
    """[begin, end) of each chunk: as even as can be, none empty, so perhaps fewer than `chunks`."""
    chunks = max(1, min(chunks, rows))
    return [(rows * number // chunks, rows * (number + 1) // chunks) for number in range(chunks)]


def tapered(rows: int, chunks: int) -> list[tuple[int, int]]:
    """As `cut`, but the first and the last are half as long, so there is one more.

    Of an all-reduce nothing hides the first one's matmul and the last one's communication.
    """
    if chunks < 2 or rows < 2 * chunks:
        return cut(rows, chunks)
    edges = [0, *(rows * (2 * number - 1) // (2 * chunks) for number in range(1, chunks + 1)), rows]
    return list(pairwise(edges))


def peers_of(rank: int, world: int) -> list[int]:
    """The other ranks, beginning with the next: at any time each rank is sent to by one other."""
    return [(rank + step) % world for step in range(1, world)]
