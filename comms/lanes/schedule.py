"""Which chunk goes on which lane: by the plan first; an idle lane helps a late one; what a dead one had goes elsewhere.

Pure, so that a test can play every order of events. A lane is late when it will need far longer than the plan meant it
to, beside the lane that is done: on healthy paths that never happens, and the load stays what was planned.
"""

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from resilient.comms.lanes.messages import Piece
from resilient.comms.lanes.spans import Spans

CHUNK_BYTES = 1 << 18
LEAST_CHUNK = 1 << 15
_OF_A_PIECE = 8  # chunks: what others can take from it when it is late
LATE = 1.4  # times what the plan meant, beside the lane that is done
UNPLANNED = 2.0  # times as long as it has taken so far, where there is no plan
LATE_S = 0.03  # less is not worth it
MOMENT_S = 0.05  # what a busy machine may take of anything: so much of its time does not make a lane slow
_GUESS = 1e6  # bytes a second of a lane that has not moved anything yet: slow, so that it is helped


@dataclass(frozen=True, slots=True, eq=False)
class Chunk:
    """Bytes `offset` to `offset + len(view)` of a message; `owner` is what is told when they have arrived."""

    owner: object
    operation: int
    tag: int
    offset: int
    view: memoryview


@dataclass(slots=True, eq=False)
class Queue:
    """What one lane still has to send, and what of it has not been acknowledged yet.

    `moved` bytes since it `began`, when it was last empty; `planned_s`: how long the plan meant it to take; `took_s`:
    how long it did take, once it has only been helping others. `free`: since when it could serve the oldest chunk.
    """

    waiting: deque[Chunk] = field(default_factory=deque)
    flying: deque[Chunk] = field(default_factory=deque)
    began: float = 0.0
    moved: int = 0
    planned_s: float = 0.0
    took_s: float = 0.0
    free: float = 0.0

    @property
    def idle(self) -> bool:
        return not self.waiting and not self.flying

    @property
    def left(self) -> int:
        return sum(len(chunk.view) for chunk in self.waiting) + sum(len(chunk.view) for chunk in self.flying)

    def rate(self, now: float) -> float:
        """Bytes a second since it began to be busy."""
        busy = now - self.began
        return self.moved / busy if self.moved and busy > 0 else _GUESS

    def put(self, chunks: Iterable[Chunk], now: float, planned_s: float = 0.0) -> None:
        if self.idle:
            self.began, self.moved, self.planned_s = now, 0, 0.0
        self.took_s = 0.0
        self.planned_s += planned_s
        self.waiting.extend(chunks)

    def put_back(self, chunks: Iterable[Chunk], now: float) -> None:
        """What a dead lane had. In the order in which operations were begun: a receiver that has no room takes nothing
        of a later one while it waits for an earlier one."""
        self.put(chunks, now)
        self.waiting = deque(sorted(self.waiting, key=lambda chunk: (chunk.operation, chunk.tag)))

    def help(self, other: "Queue") -> None:
        """Take the last chunk of another that is late."""
        self.waiting.append(other.waiting.pop())

    def next(self) -> Chunk | None:
        """Take the next one to send; it flies from now on."""
        if not self.waiting:
            return None
        chunk = self.waiting.popleft()
        self.flying.append(chunk)
        return chunk

    def arrived(self, now: float) -> Chunk | None:
        """The oldest one that flies has arrived; None where nothing does, which a broken peer may claim."""
        if not self.flying:
            return None
        chunk = self.flying.popleft()
        self.moved += len(chunk.view)
        self.free = now
        if self.idle and not self.took_s:
            self.took_s = now - self.began
        return chunk

    def late(self, beside: "Queue", now: float) -> float:
        """Seconds that it still needs, if those are too many beside what another took for its share; else 0."""
        so_far = now - self.began
        left_s = self.left / self.moved * max(0.0, so_far - MOMENT_S) if self.moved else so_far
        if self.planned_s and beside.planned_s and beside.took_s:
            allowed_s = LATE * self.planned_s * beside.took_s / beside.planned_s
        else:
            allowed_s = UNPLANNED * so_far
        return left_s if so_far + left_s >= allowed_s and left_s > LATE_S else 0.0

    def empty(self) -> list[Chunk]:
        """Take all that has not arrived, in order."""
        chunks = [*self.flying, *self.waiting]
        self.flying.clear()
        self.waiting.clear()
        return chunks


def cut(
    owner: object, operation: int, tag: int, content: Spans, pieces: Sequence[Piece]
) -> list[tuple[int, list[Chunk]]]:
    """The chunks of each piece, with its path: equal ones of at most CHUNK_BYTES, cut again where memory is."""
    found = []
    for path, begin, end in pieces:
        size = min(CHUNK_BYTES, max(LEAST_CHUNK, (end - begin) // _OF_A_PIECE))
        count = -(-(end - begin) // size)
        at = [begin + (end - begin) * number // count for number in range(count + 1)] if count else []
        chunks, offset = [], begin
        for view in [view for one, other in pairwise(at) for view in content.within(one, other)]:
            chunks.append(Chunk(owner, operation, tag, offset, view))
            offset += len(view)
        found.append((path, chunks))
    return found


def help_late(idle: int, queues: Sequence[Queue | None], now: float) -> int | None:
    """The lane of the same peer from whose end the idle one should take a chunk, or None. None in `queues`: no lane."""
    worst, worst_s = None, 0.0
    for number, queue in enumerate(queues):
        if number == idle or queue is None or not queue.waiting:
            continue
        left_s = queue.late(_queue(queues, idle), now)
        if left_s > worst_s:
            worst, worst_s = number, left_s
    return worst


def spread(chunks: Sequence[Chunk], queues: Sequence[Queue | None], now: float) -> list[list[Chunk]]:
    """Share out what a dead lane had: each chunk to the lane that would be done with it first."""
    shares: list[list[Chunk]] = [[] for _ in queues]
    usable = [number for number, queue in enumerate(queues) if queue is not None]
    left = {number: float(_queue(queues, number).left) for number in usable}
    rates = [_queue(queues, number).rate(now) for number in usable if not _queue(queues, number).idle]
    usual = max(rates, default=_GUESS)  # an idle lane is taken to be as quick as the quickest
    speed = {n: usual if _queue(queues, n).idle else _queue(queues, n).rate(now) for n in usable}
    for chunk in chunks:
        best = min(usable, key=lambda number: ((left[number] + len(chunk.view)) / speed[number], number))
        shares[best].append(chunk)
        left[best] += len(chunk.view)
    return shares


def _queue(queues: Sequence[Queue | None], number: int) -> Queue:
    queue = queues[number]
    assert queue is not None
    return queue
