"""Where rows are cut, and in which order a rank takes its peers: pure."""

LEAST_ROWS = 256  # below, a matmul takes longer for each row (measured on CPUs and GPUs alike)


def most(rows: int) -> int:
    """The most chunks that `rows` may be cut into."""
    return max(1, rows // LEAST_ROWS)


def cut(rows: int, chunks: int) -> list[tuple[int, int]]:
    """[begin, end) of each chunk: as even as can be, none empty, so perhaps fewer than `chunks`."""
    chunks = max(1, min(chunks, rows))
    return [(rows * number // chunks, rows * (number + 1) // chunks) for number in range(chunks)]


def peers_of(rank: int, world: int) -> list[int]:
    """The other ranks, beginning with the next: at any time each rank is sent to by one other."""
    return [(rank + step) % world for step in range(1, world)]
