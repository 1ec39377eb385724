"""How quick paths have been, and what that makes of the fabric: pure.

Each sender knows how long each of its lanes was busy, and how long it would have been at its nominal rate. The
quotient, beside that of the quickest path, says how slow a path is, whatever the unit of the fabric's rates. Two bad
ones in a row count (one may be a busy processor). A path that is nearly as quick as it should be is left as it was:
other shares would only cut flows more often. Every rank gets everybody's reports, in any order.
"""

from collections import deque
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from resilient.comms.fabric import Fabric

NEAR = 0.7  # of the nominal rate: above it a path is as good as it should be
LEAST = 0.02
LONG_S = 0.2  # what took less is not found slow: a busy machine takes a tenth of a second of anything
RETURNED = 0.25  # what a lane that was dead is taken for at first
_LATELY = 8  # operations
_SAME = 0.15

Way = tuple[int, int]  # a path to a leaf: leaf, path


class Rates:
    """Of one rank on `leaf`; what others report is merged in. Not thread-safe: the lanes' thread owns it."""

    def __init__(self, rank: int, fabric: Fabric) -> None:
        self._rank = rank
        self._nominal = fabric
        self._best: deque[float] = deque(maxlen=_LATELY)
        self._last: dict[Way, float] = {}  # a single bad observation
        self._factors: dict[tuple[int, int, int], tuple[int, float]] = {}  # (rank, leaf, path) -> (sequence, factor)
        self._sequence = 0

    def observe(self, busy_s: Mapping[Way, float], expected_s: Mapping[Way, float]) -> list[dict[str, Any]]:
        """How long paths were busy, and should have been at nominal rates. Reports of leaves where that is news.

        The quickest path is the measure of the others; of one alone, the quickest lately.
        """
        usable = [way for way in busy_s if expected_s.get(way) and self.factor(*way)]
        speeds = {way: expected_s[way] / busy_s[way] for way in usable}
        if not speeds:
            return []
        self._best.append(max(speeds.values()))
        best = max(speeds.values()) if len(speeds) > 1 else max(self._best)
        news: dict[int, dict[int, float]] = {}
        for (leaf, path), speed in speeds.items():
            found = max(LEAST, speed / best)
            found = 1.0 if found > NEAR else found
            slower = found < self.factor(leaf, path)
            if not (slower and busy_s[leaf, path] < LONG_S) and self._settled((leaf, path), found):
                news.setdefault(leaf, {})[path] = found
        return [self.report(leaf, factors) for leaf, factors in news.items()]

    def _settled(self, key: Way, found: float) -> bool:
        """Whether to believe it: what is near to what is known is no news; else the second one in a row counts."""
        before = self.factor(*key)
        if abs(found - before) <= _SAME * max(found, before):
            self._last.pop(key, None)
            return False
        last = self._last.pop(key, None)
        if last is not None and (last < before) == (found < before):
            return True
        self._last[key] = found
        return False

    def report(self, leaf: int, factors: Mapping[int, float]) -> dict[str, Any]:
        """Note factors of paths to a leaf (0: dead) and make the report for the other ranks."""
        self._sequence += 1
        report = {
            "rank": self._rank,
            "sequence": self._sequence,
            "leaf": leaf,
            "factors": {str(path): factor for path, factor in factors.items()},
        }
        self.merge(report)
        return report

    def merge(self, report: Mapping[str, Any]) -> bool:
        """Whether it said anything new. Raises KeyError, TypeError, ValueError for what is no report."""
        rank, sequence, leaf = int(report["rank"]), int(report["sequence"]), int(report["leaf"])
        news = False
        for path, factor in report["factors"].items():
            key = (rank, leaf, int(path))
            if not 0 <= int(path) < self._nominal.paths or not 0 <= rank < len(self._nominal.leaf_of):
                raise ValueError(f"there is no path {path} or no rank {rank}")
            if key not in self._factors or self._factors[key][0] < sequence:
                self._factors[key] = (sequence, float(factor))
                news = True
        return news

    def factor(self, leaf: int, path: int) -> float:
        """Of this rank's own path to a leaf: 1 as it should be, 0 dead."""
        return self._factors.get((self._rank, leaf, path), (0, 1.0))[1]

    def fabric(self) -> Fabric:
        """The fabric as far as reports tell: a link is as quick as the best that anybody has seen over it."""
        up = self._best_of({(self._nominal.leaf_of[rank], path): [] for rank, _, path in self._factors}, True)
        down = self._best_of({(leaf, path): [] for _, leaf, path in self._factors}, False)
        if not up:
            return self._nominal
        return _passable(
            self._nominal,
            replace(self._nominal, up=_scaled(self._nominal.up, up), down=_scaled(self._nominal.down, down)),
        )

    def _best_of(self, seen: dict[tuple[int, int], list[float]], from_here: bool) -> dict[tuple[int, int], float]:
        for (rank, leaf, path), (_, factor) in self._factors.items():
            seen[(self._nominal.leaf_of[rank] if from_here else leaf), path].append(factor)
        return {key: max(factors) for key, factors in seen.items()}


def _scaled(
    rows: tuple[tuple[float, ...], ...], factors: Mapping[tuple[int, int], float]
) -> tuple[tuple[float, ...], ...]:
    return tuple(
        tuple(rate * factors.get((leaf, path), 1.0) for path, rate in enumerate(row)) for leaf, row in enumerate(rows)
    )


def _passable(nominal: Fabric, found: Fabric) -> Fabric:
    """Where no path seems to be left from one leaf to another, all are kept, slow: better to try than to give up."""
    hurt = [leaf for leaf in range(found.leaves) if 0.0 in found.up[leaf]]
    hurt_below = [leaf for leaf in range(found.leaves) if 0.0 in found.down[leaf]]
    for one in hurt:
        for other in hurt_below:
            if one != other and not any(up * down for up, down in zip(found.up[one], found.down[other], strict=True)):
                found = _tried(nominal, found, one, other)
    return found


def _tried(nominal: Fabric, found: Fabric, one: int, other: int) -> Fabric:
    up = tuple(rate or LEAST * usual for rate, usual in zip(found.up[one], nominal.up[one], strict=True))
    down = tuple(rate or LEAST * usual for rate, usual in zip(found.down[other], nominal.down[other], strict=True))
    return replace(
        found,
        up=(*found.up[:one], up, *found.up[one + 1 :]),
        down=(*found.down[:other], down, *found.down[other + 1 :]),
    )


def rates_between(fabric: Fabric, one: int, other: int) -> tuple[float, ...]:
    """Of each path from one rank to another, in bytes a second; infinite within a leaf, where no link is shared."""
    if fabric.leaf_of[one] == fabric.leaf_of[other]:
        return (float("inf"),) * fabric.paths
    up, down = fabric.up[fabric.leaf_of[one]], fabric.down[fabric.leaf_of[other]]
    return tuple(min(rates) for rates in zip(up, down, strict=True))
