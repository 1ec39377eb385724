"""What a plan promises, worked out from its pieces alone: independent of how it was made.

The bound is the load of ideal packet spraying: no placement can make a step quicker than its fullest leaf, its fullest
pair of leaves or its busiest interface allows. Loads are in seconds: bytes on a link over its rate.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from resilient.comms.fabric import Fabric, Link
from resilient.comms.flows import Flow
from resilient.errors import UsageError


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes `begin` to `end` of a flow, by its number in the step, on a path; None within a leaf."""

    flow: int
    path: int | None
    begin: int
    end: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Certificate:
    """`load_s`: of the fullest link, `link`; `bound_s`: what no plan can beat; `pieces`: all, `cut`: flows in several.

    `limit`: what the bound comes from.
    """

    load_s: float
    link: Link | None
    bound_s: float
    limit: str
    pieces: int
    cut: int

    @property
    def ratio(self) -> float:
        """Of the fullest link to the bound; 1 is as good as spraying."""
        return self.load_s / self.bound_s if self.bound_s else 1.0


def certify(fabric: Fabric, flows: Sequence[Flow], pieces: Sequence[Piece]) -> Certificate:
    """Check that the pieces are the flows, whole and once, and add up what they put on each link.

    Raises UsageError for pieces that overlap, leave a gap, or take a path that has failed.
    """
    _check_whole(flows, pieces)
    bytes_on: Counter[Link] = Counter()
    for piece in pieces:
        flow = flows[piece.flow]
        if (piece.path is not None) != fabric.crosses(flow):
            raise UsageError(f"flow {piece.flow}, {flow.source} to {flow.target}: its path is {piece.path}")
        for link in fabric.links(flow, piece.path):
            bytes_on[link] += piece.end - piece.begin
    failed = next((link for link, count in bytes_on.items() if count and not fabric.rate(link)), None)
    if failed is not None:
        raise UsageError(f"the plan uses a link that has failed: {failed}")
    seconds = {link: count / fabric.rate(link) for link, count in bytes_on.items() if count}
    fullest = max(seconds, key=lambda link: (seconds[link], link), default=None)
    bound_s, limit = bound(fabric, flows)
    return Certificate(
        load_s=0.0 if fullest is None else seconds[fullest],
        link=fullest,
        bound_s=bound_s,
        limit=limit,
        pieces=len(pieces),
        cut=sum(count > 1 for count in Counter(piece.flow for piece in pieces).values()),
    )


def _check_whole(flows: Sequence[Flow], pieces: Sequence[Piece]) -> None:
    reached = [0] * len(flows)
    for piece in sorted(pieces, key=lambda piece: (piece.flow, piece.begin)):
        if piece.begin != reached[piece.flow] or piece.end < piece.begin:
            raise UsageError(f"flow {piece.flow} is cut at {reached[piece.flow]}, and a piece begins at {piece.begin}")
        reached[piece.flow] = piece.end
    for number, (flow, end) in enumerate(zip(flows, reached, strict=True)):
        if end != flow.nbytes:
            raise UsageError(f"flow {number} has {flow.nbytes} bytes, and pieces for {end}")


def bound(fabric: Fabric, flows: Sequence[Flow]) -> tuple[float, str]:
    """The seconds that any placement needs for its fullest link, and what sets them.

    Raises UsageError when two leaves have no path left between them.
    """
    leaf: Counter[tuple[str, int]] = Counter()
    rank: Counter[tuple[str, int]] = Counter()
    pair: Counter[tuple[int, int]] = Counter()
    for flow in flows:
        rank["out", flow.source] += flow.nbytes
        rank["in", flow.target] += flow.nbytes
        if fabric.crosses(flow):
            one, other = fabric.ends(flow)
            leaf["up", one] += flow.nbytes
            leaf["down", other] += flow.nbytes
            pair[one, other] += flow.nbytes
    bounds = [*_of_leaves(fabric, leaf), *_of_pairs(fabric, pair)]
    bounds += [(count / fabric.rate((way, one, 0)), f"interface of rank {one}") for (way, one), count in rank.items()]
    return max(bounds, default=(0.0, "nothing to send"))


def _of_leaves(fabric: Fabric, leaf: Counter[tuple[str, int]]) -> Iterable[tuple[float, str]]:
    for (way, one), count in leaf.items():
        rate = sum((fabric.up if way == "up" else fabric.down)[one])
        if count and not rate:
            raise UsageError(f"leaf {one} has no path left: all its links {way} have failed")
        yield count / rate if rate else 0.0, f"leaf {one}, {way}"


def _of_pairs(fabric: Fabric, pair: Counter[tuple[int, int]]) -> Iterable[tuple[float, str]]:
    for (one, other), count in pair.items():
        rate = sum(map(min, fabric.up[one], fabric.down[other]))
        if count and not rate:
            raise UsageError(f"no path is left from leaf {one} to leaf {other}")
        yield count / rate if rate else 0.0, f"leaves {one} to {other}"
