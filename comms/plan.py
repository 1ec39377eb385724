"""Where to cut the flows of a step, and which path each piece takes: the load of packet spraying with few pieces.

Pure: every rank computes the same plan from the same fabric and flows, without a message (only sums, products and
comparisons of numbers, which are the same on all machines). How it decides:

    equal flows, paths of one rate at all leaves   colours (`colouring.py`) packed into the paths (`pack.py`): exact,
                                                   with the fewest cuts (Ethereal, arXiv 2407.00550, cuts up to 16 times
                                                   as often; its rule looks at one host alone)
    other sizes                                    each pair of leaves for itself, over all paths: exact, more cuts
    some links slow or failed                      as if they were not, then `repair.py`: what is too much for them
                                                   goes where it makes the least load
    messages below `least_bytes`                   whole: a piece costs more than it wins

What came out is said by a certificate (`certificate.py`), which looks at the pieces alone.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial

from resilient.comms.certificate import Certificate, Piece, bound, certify
from resilient.comms.colouring import colour
from resilient.comms.fabric import Fabric
from resilient.comms.flows import Flow
from resilient.comms.pack import Part, pack
from resilient.comms.repair import repair

_NEAR = 1.02  # of the bound: what is won by more cuts is not worth them
_EQUAL = 0.01  # flows whose sizes differ by less are equal: a tensor that does not divide


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The pieces of all flows of a step, by flow and place in it; how they were decided, and what they promise."""

    pieces: tuple[Piece, ...]
    reason: str
    certificate: Certificate


def plan_step(fabric: Fabric, flows: Sequence[Flow], *, least_bytes: int = 0, item: int = 1) -> Plan:
    """Cut and place the flows of one step. Pieces begin at multiples of `item` bytes.

    `least_bytes`: where all flows are below it none is cut. Raises UsageError where no path is left.
    """
    bound_s, limit = bound(fabric, flows)
    crossing = [number for number, flow in enumerate(flows) if fabric.crosses(flow) and flow.nbytes]
    sizes = [flows[number].nbytes for number in crossing]
    placed, reason = _place(fabric, flows, crossing, bound_s, whole=bool(sizes) and max(sizes) < least_bytes)
    pieces: list[Piece] = []
    for number, flow in enumerate(flows):
        if number in placed:
            pieces += _pieces(number, flow.nbytes, placed[number], item)
        else:  # within a leaf, or of no bytes
            pieces.append(Piece(number, 0 if fabric.crosses(flow) else None, 0, flow.nbytes))
    certificate = certify(fabric, flows, pieces)
    return Plan(pieces=tuple(pieces), reason=f"{reason}; limited by {limit}", certificate=certificate)


def _place(
    fabric: Fabric, flows: Sequence[Flow], crossing: Sequence[int], bound_s: float, *, whole: bool
) -> tuple[dict[int, list[Part]], str]:
    if not crossing:
        return {}, "nothing leaves its leaf"
    shares = fabric.shares()
    if shares is None:
        nominal = fabric.nominal()
        placed, reason = _place(nominal, flows, crossing, bound(nominal, flows)[0], whole=whole)
        reason += ", around links of other rates"
        found = repair(fabric, flows, placed, bound_s, whole=whole)
        if whole or found.load_s <= bound_s * _NEAR:
            return found.parts, reason
        spread = _by_pairs(nominal, flows, crossing, nominal.shares() or (), whole=False)
        other = repair(fabric, flows, spread, bound_s, whole=False)
        return (other.parts, f"{reason}, all spread") if other.load_s < found.load_s / _NEAR else (found.parts, reason)
    sizes = [flows[number].nbytes for number in crossing]
    if max(sizes) - min(sizes) > _EQUAL * max(sizes):
        return _by_pairs(fabric, flows, crossing, shares, whole=whole), "flows of different sizes"
    rates = [Fraction(rate) for rate in fabric.up[0]]
    if whole:
        return _by_colours(fabric, flows, crossing, partial(_whole_rooms, rates)), "equal flows below least_bytes"
    return _by_colours(fabric, flows, crossing, partial(_rooms, rates, Fraction(bound_s) / max(sizes))), "equal flows"


def _rooms(rates: Sequence[Fraction], unit_s: Fraction, count: int) -> list[Fraction]:
    """How many of `count` units each path may carry: what it can within the bound, together no less than there are.

    `unit_s`: the bound, in units over the rate of 1. Where an interface sets the bound there is more room than needed.
    """
    unit_of = max(count / sum(rates, Fraction()), unit_s)
    return [unit_of * rate for rate in rates]


def _whole_rooms(rates: Sequence[Fraction], count: int) -> list[Fraction]:
    """Whole units only: one after the other to the path that is done with it first."""
    rooms = [0] * len(rates)
    usable = [path for path, rate in enumerate(rates) if rate]
    for _ in range(count):
        rooms[min(usable, key=lambda path: ((rooms[path] + 1) / rates[path], path))] += 1
    return [Fraction(room) for room in rooms]


def _by_colours(
    fabric: Fabric, flows: Sequence[Flow], crossing: Sequence[int], rooms: Callable[[int], list[Fraction]]
) -> dict[int, list[Part]]:
    """No two flows of a colour share a leaf, so a colour may be laid into the paths as if it were one flow."""
    colours, count = colour([fabric.ends(flows[number]) for number in crossing], fabric.leaves, fabric.leaves)
    parts = pack(count, rooms(count))
    return {number: parts[at] for number, at in zip(crossing, colours, strict=True)}


def _by_pairs(
    fabric: Fabric, flows: Sequence[Flow], crossing: Sequence[int], shares: Sequence[float], *, whole: bool
) -> dict[int, list[Part]]:
    """What goes from one leaf to another is spread over the paths by their shares: both see the load of spraying."""
    if whole:
        return repair(fabric, flows, {number: [] for number in crossing}, 0.0, whole=True).parts
    groups: dict[tuple[int, int], list[int]] = defaultdict(list)
    for number in crossing:
        groups[fabric.ends(flows[number])].append(number)
    placed: dict[int, list[Part]] = {}
    for turn, numbers in enumerate(groups.values()):
        total = sum(flows[number].nbytes for number in numbers)
        # Each pair begins with another path, or all would cut their first flow on the same one.
        order = [(path + turn) % fabric.paths for path in range(fabric.paths)]
        rooms = {path: Fraction(shares[path]) * total for path in order if shares[path]}
        rooms[order[-1] if shares[order[-1]] else next(reversed(rooms))] += total - sum(rooms.values())
        placed |= _laid(numbers, flows, list(rooms.items()))
    return placed


def _laid(numbers: Sequence[int], flows: Sequence[Flow], rooms: list[tuple[int, Fraction]]) -> dict[int, list[Part]]:
    """Flows of any sizes end to end into rooms of bytes."""
    placed: dict[int, list[Part]] = {}
    at = 0
    path, left = rooms[at]
    for number in numbers:
        size = flows[number].nbytes
        parts: list[Part] = []
        done = Fraction(0)
        while done < size:
            if left <= 0 and at + 1 < len(rooms):
                at += 1
                path, left = rooms[at]
                continue
            taken = size - done if at + 1 == len(rooms) else min(size - done, left)
            parts.append((path, done / size, (done + taken) / size))
            done, left = done + taken, left - taken
        placed[number] = parts
    return placed


def _pieces(number: int, nbytes: int, parts: Sequence[Part], item: int) -> list[Piece]:
    """Shares as bytes: cut at the item that is nearest below, and empty pieces are left out."""
    count = nbytes // item
    ends = [int(end * count) * item for _, _, end in parts[:-1]] + [nbytes]
    begins = [0, *ends[:-1]]
    rows = zip(parts, begins, ends, strict=True)
    return [Piece(number, path, begin, end) for (path, _, _), begin, end in rows if end > begin]
