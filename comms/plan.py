"""Where to cut the flows of a step, and which path each piece takes: the load of packet spraying with few pieces.

Pure: every rank computes the same plan from the same fabric and flows, without a message (only sums, products and
comparisons of numbers, which are the same on all machines). How it decides:

    equal flows, paths of one rate at all leaves   colours (`colouring.py`) packed into the paths (`pack.py`): exact,
                                                   with the fewest cuts (Ethereal, arXiv 2407.00550, cuts up to 16 times
                                                   as often; its rule looks at one host alone)
    other sizes                                    each pair of leaves for itself, over all paths: exact, more cuts
    links of different rates, failed links         granules, each where it makes the least load
    messages below `least_bytes`                   whole: a piece costs more than it wins

What came out is said by a certificate (`certificate.py`), which looks at the pieces alone.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

from resilient.comms.certificate import Certificate, Piece, bound, certify
from resilient.comms.colouring import colour
from resilient.comms.fabric import Fabric
from resilient.comms.flows import Flow
from resilient.comms.pack import Part, pack

_EQUAL = 0.01  # flows whose sizes differ by less are equal: a tensor that does not divide
_SWEEPS = 8
_GAIN = 1e-3  # a sweep that wins less is the last
_GRANULES = 8  # for each path, of a flow, where links have different rates


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The pieces of all flows of a step, by flow and place in it; how they were decided, and what they promise."""

    pieces: tuple[Piece, ...]
    reason: str
    certificate: Certificate


def plan_step(fabric: Fabric, flows: Sequence[Flow], *, least_bytes: int = 0, item: int = 1) -> Plan:
    """Cut and place the flows of one step. Pieces begin at multiples of `item` bytes.

    `least_bytes`: no flow below it is cut. Raises UsageError where no path is left.
    """
    bound_s, limit = bound(fabric, flows)
    crossing = [number for number, flow in enumerate(flows) if fabric.crosses(flow.source, flow.target) and flow.nbytes]
    sizes = [flows[number].nbytes for number in crossing]
    placed, reason = _place(fabric, flows, crossing, bound_s, whole=bool(sizes) and max(sizes) < least_bytes)
    inside = set(range(len(flows))) - set(crossing)
    pieces = [
        Piece(number, None if not _crosses(fabric, flows[number]) else 0, 0, flows[number].nbytes) for number in inside
    ]
    for number in crossing:
        pieces += _pieces(number, flows[number].nbytes, placed[number], item)
    pieces.sort(key=lambda piece: (piece.flow, piece.begin))
    certificate = certify(fabric, flows, pieces)
    return Plan(pieces=tuple(pieces), reason=f"{reason}; limited by {limit}", certificate=certificate)


def _crosses(fabric: Fabric, flow: Flow) -> bool:
    return fabric.crosses(flow.source, flow.target)


def _place(
    fabric: Fabric, flows: Sequence[Flow], crossing: Sequence[int], bound_s: float, *, whole: bool
) -> tuple[dict[int, list[Part]], str]:
    sizes = [flows[number].nbytes for number in crossing]
    shares = fabric.shares()
    if not crossing:
        return {}, "nothing leaves its leaf"
    if shares is None:
        return _by_granules(
            fabric, flows, crossing, 1 if whole else _GRANULES * fabric.paths
        ), "links of different rates"
    if max(sizes) - min(sizes) > _EQUAL * max(sizes):
        return _by_pairs(fabric, flows, crossing, shares, whole=whole), "flows of different sizes"
    rates = [Fraction(rate) for rate in fabric.up[0]]
    room_of: Callable[[int], list[Fraction]] = (
        (lambda count: _whole_rooms(count, rates))
        if whole
        else (lambda count: _rooms(count, rates, Fraction(bound_s) / max(sizes)))
    )
    return _by_colours(fabric, flows, crossing, room_of), "equal flows" + (" below least_bytes" if whole else "")


def _rooms(count: int, rates: Sequence[Fraction], unit_s: Fraction) -> list[Fraction]:
    """How many units each path may carry: what it can within the bound, but all together no less than there are.

    `unit_s`: the bound, in units over the rate of 1. Where an interface sets the bound there is more room than needed.
    """
    total = sum(rates)
    exact = [count * rate / total for rate in rates]
    roomy = [unit_s * rate for rate in rates]
    return [max(*pair) for pair in zip(exact, roomy, strict=True)]


def _whole_rooms(count: int, rates: Sequence[Fraction]) -> list[Fraction]:
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
    edges = [(fabric.leaf_of[flows[n].source], fabric.leaf_of[flows[n].target]) for n in crossing]
    colours, count = colour(edges, fabric.leaves, fabric.leaves)
    parts = pack(count, rooms(count))
    return {number: parts[at] for number, at in zip(crossing, colours, strict=True)}


def _by_pairs(
    fabric: Fabric, flows: Sequence[Flow], crossing: Sequence[int], shares: Sequence[float], *, whole: bool
) -> dict[int, list[Part]]:
    """What goes from one leaf to another is spread over the paths by their shares: both see the load of spraying."""
    groups: dict[tuple[int, int], list[int]] = defaultdict(list)
    for number in crossing:
        groups[fabric.leaf_of[flows[number].source], fabric.leaf_of[flows[number].target]].append(number)
    if whole:
        return _by_granules(fabric, flows, crossing, 1)
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


def _by_granules(
    fabric: Fabric, flows: Sequence[Flow], crossing: Sequence[int], granules: int
) -> dict[int, list[Part]]:
    """Each flow in so many equal granules, which go one by one where the fuller of the two links stays emptiest.

    Flows with little choice come first, then the large ones; then each is placed anew, now that it is known what the
    others need, for as long as that helps.
    """
    links = _Links(fabric)
    order = sorted(crossing, key=lambda number: (len(links.usable(flows[number])), -flows[number].nbytes, number))
    placed = {number: links.place(flows[number], granules) for number in order}
    best, best_load = placed.copy(), links.fullest()
    for _ in range(_SWEEPS if granules > 1 else 0):
        for number in order:
            links.take_away(flows[number], placed[number], granules)
            placed[number] = links.place(flows[number], granules)
        if links.fullest() >= best_load * (1 - _GAIN):
            break
        best, best_load = placed.copy(), links.fullest()
    return {number: _in_order(counts, granules) for number, counts in best.items()}


class _Links:
    """What is placed on each link so far, in seconds."""

    def __init__(self, fabric: Fabric) -> None:
        self._fabric = fabric
        self._up = [[0.0] * fabric.paths for _ in range(fabric.leaves)]
        self._down = [[0.0] * fabric.paths for _ in range(fabric.leaves)]

    def usable(self, flow: Flow) -> list[int]:
        up, down = self._rates(flow)
        return [path for path in range(self._fabric.paths) if up[path] and down[path]]

    def place(self, flow: Flow, granules: int) -> dict[int, int]:
        """How many granules go on each path; they are there on return."""
        (up_rates, down_rates), (up, down) = self._rates(flow), self._loads(flow)
        size = flow.nbytes / granules
        paths = self.usable(flow)
        counts = dict.fromkeys(paths, 0)
        for _ in range(granules):
            path = min(
                paths, key=lambda path: max(up[path] + size / up_rates[path], down[path] + size / down_rates[path])
            )
            counts[path] += 1
            self._add(flow, path, size)
        return counts

    def take_away(self, flow: Flow, counts: dict[int, int], granules: int) -> None:
        for path, count in counts.items():
            self._add(flow, path, -count * flow.nbytes / granules)

    def fullest(self) -> float:
        return max(load for row in (*self._up, *self._down) for load in row)

    def _add(self, flow: Flow, path: int, nbytes: float) -> None:
        (up_rates, down_rates), (up, down) = self._rates(flow), self._loads(flow)
        up[path] += nbytes / up_rates[path]
        down[path] += nbytes / down_rates[path]

    def _rates(self, flow: Flow) -> tuple[tuple[float, ...], tuple[float, ...]]:
        leaf_of = self._fabric.leaf_of
        return self._fabric.up[leaf_of[flow.source]], self._fabric.down[leaf_of[flow.target]]

    def _loads(self, flow: Flow) -> tuple[list[float], list[float]]:
        leaf_of = self._fabric.leaf_of
        return self._up[leaf_of[flow.source]], self._down[leaf_of[flow.target]]


def _in_order(counts: dict[int, int], granules: int) -> list[Part]:
    parts: list[Part] = []
    done = 0
    for path, count in counts.items():
        if count:
            parts.append((path, Fraction(done, granules), Fraction(done + count, granules)))
            done += count
    return parts


def _pieces(number: int, nbytes: int, parts: Sequence[Part], item: int) -> list[Piece]:
    """Shares as bytes: cut at the item that is nearest below, and empty pieces are left out."""
    count = nbytes // item
    ends = [int(end * count) * item for _, _, end in parts[:-1]] + [nbytes]
    begins = [0, *ends[:-1]]
    rows = zip(parts, begins, ends, strict=True)
    return [Piece(number, path, begin, end) for (path, _, _), begin, end in rows if end > begin]
