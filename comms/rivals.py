"""How others place flows, as pieces for the same certificate and simulation: ECMP, ECMP with k sub-flows, spraying, and
the rule of Ethereal's authors. Never used to send anything.
"""

import random
from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise
from math import gcd

from resilient.comms.certificate import Piece
from resilient.comms.fabric import Fabric
from resilient.comms.flows import Flow, bounds


def ecmp(fabric: Fabric, flows: Sequence[Flow], seed: int, subflows: int = 1) -> list[Piece]:
    """Each flow in `subflows` equal pieces (NCCL's queue pairs, MP-RDMA), each on a path that a hash chooses of those
    that have not failed. Hashes know nothing of rates.
    """
    rng = random.Random(seed)
    pieces = []
    for number, flow in enumerate(flows):
        usable = _usable(fabric, flow)
        at = bounds(flow.nbytes, subflows if usable else 1)
        pieces += [Piece(number, rng.choice(usable) if usable else None, begin, end) for begin, end in pairwise(at)]
    return pieces


def spraying(fabric: Fabric, flows: Sequence[Flow]) -> list[Piece]:
    """Packet spraying as a fluid: every flow over all paths that have not failed, in equal parts."""
    pieces = []
    for number, flow in enumerate(flows):
        usable: list[int | None] = [*_usable(fabric, flow)] or [None]
        at = bounds(flow.nbytes, len(usable))
        pieces += [Piece(number, path, at[turn], at[turn + 1]) for turn, path in enumerate(usable)]
    return pieces


def ethereal(fabric: Fabric, flows: Sequence[Flow], seed: int = 0) -> list[Piece]:
    """The rule of "Ethereal: Divide and Conquer Network Load Balancing" (arXiv 2407.00550), for each host by itself.

    Of the n flows of a host to a leaf over s paths, n - n mod s go whole, round robin; each of the others is cut into
    s / gcd(n mod s, s) equal pieces.
    """
    rng = random.Random(seed)
    groups: dict[tuple[int, int], list[int]] = defaultdict(list)
    pieces = []
    for number, flow in enumerate(flows):
        if fabric.crosses(flow):
            groups[flow.source, fabric.leaf_of[flow.target]].append(number)
        else:
            pieces.append(Piece(number, None, 0, flow.nbytes))
    for numbers in groups.values():
        paths = _usable(fabric, flows[numbers[0]])
        rng.shuffle(paths)
        rest = len(numbers) % len(paths)
        turn = 0
        for place, number in enumerate(numbers):
            cut = place >= len(numbers) - rest
            at = bounds(flows[number].nbytes, len(paths) // gcd(rest, len(paths)) if cut else 1)
            for begin, end in pairwise(at):
                pieces.append(Piece(number, paths[turn % len(paths)], begin, end))
                turn += 1
    return pieces


def _usable(fabric: Fabric, flow: Flow) -> list[int]:
    if not fabric.crosses(flow):
        return []
    one, other = fabric.ends(flow)
    up, down = fabric.up[one], fabric.down[other]
    return [path for path in range(fabric.paths) if up[path] and down[path]]
