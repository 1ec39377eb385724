"""Images behind a network that several ranks of a node want: one of them reads, the others read its memory.

Which images, and who reads them, is decided by all from what all have told; so every rank knows the rounds.
"""

from collections.abc import Mapping, Sequence

WORTH = 1.5  # times the image that a node's ranks would read of it, together, if each read for itself

Shares = Mapping[int, int]
"""Of each image that a rank could read itself: how many bytes it needs of it."""


def rounds_of(told: Sequence[Shares], sizes: Mapping[int, int], nodes: Sequence[str]) -> list[dict[int, int]]:
    """In which round which rank reads which image for its node: a list of {rank: image}, the same on all ranks.

    `told[r]` is of rank r, `sizes` are those of the images in bytes. In a round a rank has one image in memory at most.
    """
    rounds: list[dict[int, int]] = []
    for node in dict.fromkeys(nodes):
        ranks = [rank for rank, other in enumerate(nodes) if other == node]
        wanted: dict[int, list[int]] = {}
        for rank in ranks:
            for image, nbytes in told[rank].items():
                wanted.setdefault(image, []).append(nbytes)
        shared = [
            image for image, counts in sorted(wanted.items()) if len(counts) > 1 and sum(counts) >= WORTH * sizes[image]
        ]
        for number, image in enumerate(shared):
            turn, reader = divmod(number, len(ranks))
            while len(rounds) <= turn:
                rounds.append({})
            rounds[turn][ranks[reader]] = image
    return rounds
