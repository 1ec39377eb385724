"""A network as data: which leaf each rank is on, which paths join the leaves, and how quick every link is.

One description for both fabrics that matter here. Leaf-spine: a path is a spine. Multi-plane: a path is a plane, and
every host is a leaf of its own. Rates are in bytes a second; a link that has failed has the rate 0. What flows there is
in `flows.py`, how they are cut and placed in `plan.py`.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from resilient.comms.flows import Flow
from resilient.errors import UsageError

Link = tuple[str, int, int]  # ("up", leaf, path), ("down", leaf, path), ("out", rank, 0), ("in", rank, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fabric:
    """`leaf_of[rank]`; `up[leaf][path]` towards the paths and `down[leaf][path]` from them; `nic`: of one rank, each
    way, None where it is no limit (its links are the leaf's own).

    Raises UsageError for shapes that do not fit together and rates below 0.
    """

    leaf_of: tuple[int, ...]
    up: tuple[tuple[float, ...], ...]
    down: tuple[tuple[float, ...], ...]
    nic: float | None = None

    def __post_init__(self) -> None:
        lengths = {len(row) for row in (*self.up, *self.down)}
        if len(self.up) != len(self.down) or len(lengths) != 1 or 0 in lengths:
            raise UsageError(f"a fabric needs the same paths up and down at each leaf; there are {sorted(lengths)}")
        if not all(0 <= leaf < len(self.up) for leaf in self.leaf_of):
            raise UsageError(f"ranks are on leaves {sorted(set(self.leaf_of))}, and there are {len(self.up)} leaves")
        if any(rate < 0 for row in (*self.up, *self.down) for rate in row) or (self.nic is not None and self.nic <= 0):
            raise UsageError("a rate of a link is below 0, or the rate of the ranks' interfaces is not above it")

    @property
    def leaves(self) -> int:
        return len(self.up)

    @property
    def paths(self) -> int:
        return len(self.up[0])

    def rate(self, link: Link) -> float:
        """Of any link, in bytes a second; infinite for an interface that is no limit."""
        kind, at, path = link
        if kind in ("up", "down"):
            return (self.up if kind == "up" else self.down)[at][path]
        return float("inf") if self.nic is None else self.nic

    def links(self, flow: Flow, path: int | None) -> Iterator[Link]:
        """The links that a flow crosses. `path` is None for ranks of one leaf."""
        yield ("out", flow.source, 0)
        yield ("in", flow.target, 0)
        if path is not None:
            one, other = self.ends(flow)
            yield ("up", one, path)
            yield ("down", other, path)

    def ends(self, flow: Flow) -> tuple[int, int]:
        """The leaf that a flow comes from, and the one that it goes to."""
        return self.leaf_of[flow.source], self.leaf_of[flow.target]

    def crosses(self, flow: Flow) -> bool:
        """Whether a flow leaves its leaf, and so has a path."""
        one, other = self.ends(flow)
        return one != other

    def shares(self) -> tuple[float, ...] | None:
        """Each path's share of the whole rate, where it is the same at all leaves and both ways; else None."""
        first = self.up[0]
        if any(row != first for row in (*self.up, *self.down)) or not any(first):
            return None
        return tuple(rate / sum(first) for rate in first)

    def nominal(self) -> "Fabric":
        """What it would be if no link were slow or failed: every path at the rate that most of its links have."""
        row = []
        for path in range(self.paths):
            counts = Counter(rates[path] for rates in (*self.up, *self.down) if rates[path])
            row.append(max(counts, key=lambda rate: (counts[rate], rate), default=0.0))
        rows = (tuple(row),) * self.leaves
        return replace(self, up=rows, down=rows)

    def with_rate(self, leaf: int, path: int, rate: float) -> "Fabric":
        """The same with one link, both ways, at another rate: 0 for one that has failed."""

        def changed(rows: tuple[tuple[float, ...], ...]) -> tuple[tuple[float, ...], ...]:
            row = rows[leaf]
            return (*rows[:leaf], (*row[:path], rate, *row[path + 1 :]), *rows[leaf + 1 :])

        return replace(self, up=changed(self.up), down=changed(self.down))


def leaf_spine(*, leaves: int, spines: int, hosts: int, rate: float, nic: float | None = None) -> Fabric:
    """`hosts` ranks a leaf, numbered leaf by leaf; every leaf joined to every spine at `rate`, in bytes a second."""
    rows = ((rate,) * spines,) * leaves
    return Fabric(leaf_of=tuple(rank // hosts for rank in range(leaves * hosts)), up=rows, down=rows, nic=nic)


def multi_plane(*, hosts: int, rates: Sequence[float]) -> Fabric:
    """`hosts` ranks, each with an interface into each plane; `rates[plane]` in bytes a second."""
    rows = (tuple(rates),) * hosts
    return Fabric(leaf_of=tuple(range(hosts)), up=rows, down=rows)
