"""Transfers under way: what is missing of each, how long it may take, and what its lanes took for it."""

from collections import defaultdict
from collections.abc import Iterator, Mapping

from resilient.comms.lanes.messages import POINT_TO_POINT, Failure, Operation, Transfer
from resilient.comms.lanes.rates import LONG_S, Way

_MEASURED_BYTES = 1 << 16  # on a lane in one operation: less says nothing about its rate,
_MEASURED_S = 0.002  # and neither does what is over before a thread has woken up


class Work:
    """`left`: messages and chunks that are still missing. Lanes are called (peer, path)."""

    def __init__(self, operation: Operation, transfer: Transfer, now: float, timeout_s: float) -> None:
        self.operation, self.transfer, self.began, self.deadline = operation, transfer, now, now + timeout_s
        self.left = 0
        self._planned: dict[tuple[int, int], int] = defaultdict(int)
        self._factors: dict[tuple[int, int], float] = {}
        self._seen: dict[tuple[int, int], tuple[int, float]] = {}  # bytes that arrived, and how long the lane was at it

    def plan(self, peer: int, path: int, nbytes: int, factor: float) -> None:
        """`factor`: what the path was known for when this was planned, of its nominal rate."""
        self._planned[peer, path] += nbytes
        self._factors[peer, path] = factor

    def arrived(self, peer: int, path: int, nbytes: int, *, since: float, now: float) -> None:
        """A chunk has. `since`: when the lane was free for it; before this was posted, it served others."""
        count, busy_s = self._seen.get((peer, path), (0, 0.0))
        self._seen[peer, path] = (count + nbytes, busy_s + now - max(since, self.began))

    def measured(self) -> Iterator[tuple[int, dict[int, float], dict[int, float]]]:
        """For each peer how long its lanes were busy, and should have been at nominal rates for what they carried."""
        for peer in {peer for peer, _ in self._seen}:
            busy_s, expected_s = {}, {}
            for path, wanted_s in self.operation.expected_s.items():
                count, took_s = self._seen.get((peer, path), (0, 0.0))
                planned = self._planned.get((peer, path), 0)
                if min(count, planned) >= _MEASURED_BYTES and took_s >= _MEASURED_S:
                    busy_s[path] = took_s
                    expected_s[path] = self._factors[peer, path] * wanted_s * count / planned
            yield peer, busy_s, expected_s


class Measured:
    """What lanes took, added up over operations until it is long enough to tell a slow path from a busy machine."""

    def __init__(self) -> None:
        self._busy: dict[Way, float] = defaultdict(float)
        self._expected: dict[Way, float] = defaultdict(float)

    def add(self, leaf: int, busy_s: Mapping[int, float], expected_s: Mapping[int, float]) -> None:
        """How long the paths to a leaf were busy, and should have been."""
        for path in busy_s:
            self._busy[leaf, path] += busy_s[path]
            self._expected[leaf, path] += expected_s[path]

    def told(self) -> tuple[Mapping[Way, float], Mapping[Way, float]] | None:
        """Both since it was last said, by leaf and path, when that is long enough."""
        if max(self._busy.values(), default=0.0) < LONG_S:
            return None
        found = self._busy, self._expected
        self._busy, self._expected = defaultdict(float), defaultdict(float)
        return found


class Works:
    """All that is under way in a group. `last`: the highest operation of all ranks so far."""

    def __init__(self) -> None:
        self.last = 0
        self._works: dict[Work, None] = {}

    def add(self, work: Work) -> None:
        if work.operation.number < POINT_TO_POINT:
            self.last = max(self.last, work.operation.number)
        self._works[work] = None

    def one_less(self, work: Work) -> bool:
        """Whether that was all."""
        work.left -= 1
        if work.left or work not in self._works:
            return False
        del self._works[work]
        return True

    def any(self) -> bool:
        return bool(self._works)

    def oldest_s(self, now: float) -> float:
        """How long the oldest has been waiting."""
        return max((now - work.began for work in self._works), default=0.0)

    def overdue(self, now: float) -> Work | None:
        """The one that has been out of time for longest."""
        late = [work for work in self._works if now > work.deadline]
        return min(late, key=lambda work: work.deadline, default=None)

    def fail(self, failure: Failure) -> None:
        """End them all."""
        works, self._works = self._works, {}
        for work in works:
            work.transfer.finish(failure.error())
