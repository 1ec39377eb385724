"""Transfers under way: what is missing of each, how long it may take, and what its lanes took for it."""

from collections import defaultdict
from collections.abc import Iterator

from resilient.comms.lanes.messages import POINT_TO_POINT, Failure, Operation, Transfer

_MEASURED_BYTES = 1 << 16  # on a lane in one operation: less says nothing about its rate,
_MEASURED_S = 0.002  # and neither does what is over before a thread has woken up


class Work:
    """`left`: messages and chunks that are still missing. Lanes are called (peer, path)."""

    def __init__(self, operation: Operation, transfer: Transfer, now: float, timeout_s: float) -> None:
        self.operation, self.transfer, self.began, self.deadline = operation, transfer, now, now + timeout_s
        self.left = 0
        self._planned: dict[tuple[int, int], int] = defaultdict(int)
        self._seen: dict[tuple[int, int], tuple[int, float]] = {}  # bytes that arrived, and when the last of them did

    def plan(self, peer: int, path: int, nbytes: int) -> None:
        self._planned[peer, path] += nbytes

    def arrived(self, peer: int, path: int, nbytes: int, now: float) -> None:
        count, _ = self._seen.get((peer, path), (0, 0.0))
        self._seen[peer, path] = (count + nbytes, now)

    def measured(self) -> Iterator[tuple[int, dict[int, float], dict[int, float]]]:
        """For each peer how long its lanes were busy, and should have been by the plan for what they carried."""
        for peer in {peer for peer, _ in self._seen}:
            busy_s, expected_s = {}, {}
            for path, wanted_s in self.operation.expected_s.items():
                count, last = self._seen.get((peer, path), (0, 0.0))
                planned = self._planned.get((peer, path), 0)
                if min(count, planned) >= _MEASURED_BYTES and last - self.began >= _MEASURED_S:
                    busy_s[path] = last - self.began
                    expected_s[path] = wanted_s * count / planned
            yield peer, busy_s, expected_s


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
