"""A placement made for links as they should be, mended where some are slow or have failed.

What such a link cannot carry within the bound is taken off it, and laid where it makes the least load: over several
paths at once as water finds its level, so that no path ends fuller than it must. Flows that do not cross such links
stay as they are, whole where they were whole; then what makes the fullest link is laid anew for as long as that helps.
Only sums, products and comparisons of numbers: all ranks come to the same.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from resilient.comms.fabric import Fabric
from resilient.comms.flows import Flow
from resilient.comms.pack import Part

_LEVELS = (0.0, 0.5, 0.75, 0.9)  # between the bound and what is reached: above it, links give up what they have
_GAIN = 0.002  # a try that wins less counts for nothing
_SLACK = 1e-6
_LEAST = 1 / 64  # of a flow: a smaller piece is not worth a cut, its path takes it with another
_STEPS = 40  # of a bisection

Shares = dict[int, dict[int, float]]  # of each flow, by path


@dataclass(frozen=True, slots=True)
class Repaired:
    """`load_s`: of the fullest link, in seconds."""

    parts: dict[int, list[Part]]
    load_s: float


def repair(
    fabric: Fabric, flows: Sequence[Flow], placed: Mapping[int, Sequence[Part]], bound_s: float, *, whole: bool
) -> Repaired:
    """The parts of the same flows. A flow without parts is laid from nothing. `whole`: no flow is cut."""
    shares = {number: {path: float(end - begin) for path, begin, end in parts} for number, parts in placed.items()}
    links = _Links(fabric, flows, shares)
    unlaid = {number: 1.0 for number, own in shares.items() if not own}
    links.lay(unlaid | links.take(links.overfull(bound_s), bound_s, whole=whole), whole=whole)
    best, best_s = shares, links.fullest_s()
    tries = iter(_LEVELS)
    while (between := next(tries, None)) is not None and best_s > bound_s * (1 + _SLACK):
        level_s = bound_s + between * (best_s - bound_s)
        again = {number: dict(own) for number, own in best.items()}
        links = _Links(fabric, flows, again)
        links.lay(links.take(links.overfull(level_s), level_s, whole=whole), whole=whole)
        if links.fullest_s() < best_s * (1 - _GAIN):
            best, best_s, tries = again, links.fullest_s(), iter(_LEVELS)
    return Repaired({number: _parts(own) for number, own in best.items()}, best_s)


class _Links:
    """How full every link is, in seconds, as `shares` have it; they change together."""

    def __init__(self, fabric: Fabric, flows: Sequence[Flow], shares: Shares) -> None:
        self._fabric = fabric
        self._flows = flows
        self._shares = shares
        self._bytes = {way: [[0.0] * fabric.paths for _ in range(fabric.leaves)] for way in ("up", "down")}
        for number, own in shares.items():
            for path, share in own.items():
                self._add(number, path, share)

    def overfull(self, level_s: float) -> list[tuple[str, int, int]]:
        """Links that are fuller than that, and those that have failed and carry something."""
        found = []
        for way, rows in self._bytes.items():
            for leaf, row in enumerate(rows):
                for path, nbytes in enumerate(row):
                    if nbytes > level_s * self._rate(way, leaf, path) * (1 + _SLACK) + _SLACK:
                        found.append((way, leaf, path))
        return found

    def fullest_s(self) -> float:
        times = (
            nbytes / self._rate(way, leaf, path)
            for way, rows in self._bytes.items()
            for leaf, row in enumerate(rows)
            for path, nbytes in enumerate(row)
            if nbytes > _SLACK
        )
        return max(times, default=0.0)

    def take(self, links: Iterable[tuple[str, int, int]], level_s: float, *, whole: bool) -> dict[int, float]:
        """Take off these links what is too much for the level; the shares of flows that have to go elsewhere."""
        taken: dict[int, float] = {}
        for way, leaf, path in links:
            surplus = self._bytes[way][leaf][path] - level_s * self._rate(way, leaf, path)
            for number in self._on(way, leaf, path, level_s):
                if surplus <= _SLACK:
                    break
                nbytes = self._flows[number].nbytes
                share = self._shares[number][path]
                part = share if whole or share * nbytes - surplus < _LEAST * nbytes else surplus / nbytes
                self._move(number, path, -part)
                taken[number] = taken.get(number, 0.0) + part
                surplus -= part * nbytes
        return taken

    def lay(self, loose: Mapping[int, float], *, whole: bool) -> None:
        """Lay shares of flows anew: those with the fewest paths to choose from first, then the largest."""
        order = sorted(loose, key=lambda number: (len(self._usable(number)), -self._flows[number].nbytes, number))
        for number in order:
            filled = self._level(number, loose[number], whole=whole)
            for path, share in filled.items():
                self._move(number, path, share)

    def _level(self, number: int, share: float, *, whole: bool) -> dict[int, float]:
        """How much of a share each path takes so that the fullest of them is as empty as can be."""
        nbytes = self._flows[number].nbytes
        usable = self._usable(number)
        if whole or share <= _LEAST:
            return {min(usable, key=lambda path: (self._after_s(number, path, share * nbytes), path)): share}
        low, high = 0.0, 1.0
        while sum(self._rooms(number, usable, high)) < share * nbytes:
            high *= 2
        for _ in range(_STEPS):
            middle = (low + high) / 2
            low, high = (low, middle) if sum(self._rooms(number, usable, middle)) >= share * nbytes else (middle, high)
        rooms = dict(zip(usable, self._rooms(number, usable, high), strict=True))
        kept = {path: room for path, room in rooms.items() if room >= _LEAST * nbytes} or {
            max(rooms, key=lambda path: (rooms[path], -path)): share * nbytes
        }
        total = sum(kept.values())
        return {path: share * room / total for path, room in kept.items()}

    def _rooms(self, number: int, usable: Sequence[int], level_s: float) -> list[float]:
        return [max(0.0, self._room(number, path, level_s)) for path in usable]

    def _after_s(self, number: int, path: int, nbytes: float) -> float:
        """How full the path's fuller link is with so many bytes more."""
        ends = self._ends(number)
        return max((self._bytes[way][leaf][path] + nbytes) / self._rate(way, leaf, path) for way, leaf in ends)

    def _room(self, number: int, path: int, level_s: float) -> float:
        """Bytes that the path takes until its fuller link is at the level."""
        ends = self._ends(number)
        return min(level_s * self._rate(way, leaf, path) - self._bytes[way][leaf][path] for way, leaf in ends)

    def _usable(self, number: int) -> list[int]:
        ends = self._ends(number)
        return [path for path in range(self._fabric.paths) if all(self._rate(way, leaf, path) for way, leaf in ends)]

    def _on(self, way: str, leaf: int, path: int, level_s: float) -> list[int]:
        """The flows on a link, those first that find the most room on other paths."""
        found = [number for number, own in self._shares.items() if own.get(path) and (way, leaf) in self._ends(number)]
        elsewhere = {number: [one for one in self._usable(number) if one != path] for number in found}
        room = {number: sum(self._rooms(number, paths, level_s)) for number, paths in elsewhere.items()}
        return sorted(found, key=lambda number: (-room[number], -len(elsewhere[number]), number))

    def _ends(self, number: int) -> tuple[tuple[str, int], tuple[str, int]]:
        one, other = self._fabric.ends(self._flows[number])
        return ("up", one), ("down", other)

    def _rate(self, way: str, leaf: int, path: int) -> float:
        return (self._fabric.up if way == "up" else self._fabric.down)[leaf][path]

    def _move(self, number: int, path: int, share: float) -> None:
        own = self._shares[number]
        own[path] = own.get(path, 0.0) + share
        if own[path] <= _SLACK * _SLACK:
            del own[path]
        self._add(number, path, share)

    def _add(self, number: int, path: int, share: float) -> None:
        for way, leaf in self._ends(number):
            self._bytes[way][leaf][path] += share * self._flows[number].nbytes


def _parts(own: Mapping[int, float]) -> list[Part]:
    """Shares end to end; what rounding has left over is the last one's."""
    paths = sorted(own)
    ends: list[Fraction] = []
    done = Fraction(0)
    for path in paths:
        done += Fraction(own[path])
        ends.append(min(done, Fraction(1)))
    ends[-1] = Fraction(1)
    begins = [Fraction(0), *ends[:-1]]
    return [(path, begin, end) for path, begin, end in zip(paths, begins, ends, strict=True) if end > begin]
