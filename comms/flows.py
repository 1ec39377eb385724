"""What a collective sends, step by step: known to every rank from its schedule alone, before the first byte.

A schedule is a list of steps; the flows of a step run at the same time, and the next step needs what they bring. Sizes
are in bytes; where a tensor does not divide, the parts differ by a byte's multiple of `item`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from resilient.errors import UsageError


@dataclass(frozen=True, slots=True)
class Flow:
    """`nbytes` from one rank to another."""

    source: int
    target: int
    nbytes: int


Step = tuple[Flow, ...]


def bounds(nbytes: int, parts: int, item: int = 1) -> list[int]:
    """Where a buffer of whole items is cut into `parts`: parts + 1 offsets, the parts as equal as can be."""
    if nbytes % item:
        raise UsageError(f"{nbytes} bytes are no whole number of items of {item} bytes")
    count = nbytes // item
    return [count * part // parts * item for part in range(parts + 1)]


def ring_all_reduce(order: Sequence[int], nbytes: int, item: int = 1) -> list[Step]:
    """Reduce-scatter and then all-gather around a ring, n - 1 steps each (Patarasuk and Yuan, 2009)."""
    return [*_around(order, nbytes, item, 0), *_around(order, nbytes, item, 1)]


def ring_all_gather(order: Sequence[int], nbytes: int, item: int = 1) -> list[Step]:
    """`nbytes` is the size of the result; each rank begins with its part."""
    return _around(order, nbytes, item, 0)


def _around(order: Sequence[int], nbytes: int, item: int, ahead: int) -> list[Step]:
    """In step t the rank at place p passes the part number p + ahead - t on to its neighbour."""
    count, at = len(order), bounds(nbytes, len(order), item)

    def flow(place: int, step: int) -> Flow:
        part = (place + ahead - step) % count
        return Flow(order[place], order[(place + 1) % count], at[part + 1] - at[part])

    return [tuple(flow(place, step) for place in range(count)) for step in range(count - 1)]


def halving_doubling_all_reduce(ranks: int, nbytes: int) -> list[Step]:
    """Rabenseifner's: halves are exchanged at distance 1, 2, 4 and so on, and gathered on the way back.

    Raises UsageError unless `ranks` is a power of two.
    """
    if ranks < 1 or ranks & (ranks - 1):
        raise UsageError(f"halving-doubling needs a power of two of ranks, not {ranks}")
    distances = [1 << power for power in range(ranks.bit_length() - 1)]
    halving = [tuple(Flow(rank, rank ^ far, nbytes // (2 * far)) for rank in range(ranks)) for far in distances]
    return [*halving, *reversed(halving)]


def direct_all_to_all(ranks: int, nbytes: int) -> list[Step]:
    """Everybody to everybody at once; `nbytes` from each rank to each other."""
    return [tuple(Flow(one, other, nbytes) for one in range(ranks) for other in range(ranks) if one != other)]


def tree_broadcast(ranks: int, nbytes: int, root: int = 0) -> list[Step]:
    """Binomial: in each step all that have the tensor send it to one that has not."""
    steps: list[Step] = []
    have = 1
    while have < ranks:
        pairs = [(place, place + have) for place in range(min(have, ranks - have))]
        steps.append(tuple(Flow((one + root) % ranks, (other + root) % ranks, nbytes) for one, other in pairs))
        have *= 2
    return steps
