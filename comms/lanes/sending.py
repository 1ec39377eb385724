"""The lanes from one rank to one peer: opened when they are first needed, helped when late, replaced when dead.

A lane is dead when nothing of what it has sent has been acknowledged for SUSPECT_S, not even by the peer's kernel,
while the peer is heard elsewhere. Then others take its chunks, and it is opened again in the background.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum

from resilient.comms.lanes.connection import Connection
from resilient.comms.lanes.messages import POINT_TO_POINT
from resilient.comms.lanes.schedule import Chunk, Queue, help_late, spread
from resilient.comms.lanes.window import LEAST, UNSEEN, Seen, apply, first, resized, seen
from resilient.comms.lanes.wire import Header, Kind, frame

SUSPECT_S = 1.0
FIRST_RETRY_S = 1.0
LAST_RETRY_S = 30.0
_HEARD_S = 0.7  # a peer that was heard so recently is alive
_HOPELESS = 3.0


class State(Enum):
    CLOSED = "closed"
    OPENING = "opening"
    OPEN = "open"
    DEAD = "dead"


@dataclass(slots=True, eq=False)
class Lane:
    """One path to one peer. `retry_s`: how long after it died it is opened again."""

    peer: int
    path: int
    state: State = State.CLOSED
    connection: Connection | None = None
    queue: Queue = field(default_factory=Queue)
    moved_at: float = 0.0
    acknowledged: int = 0
    retry_s: float = FIRST_RETRY_S
    retry_at: float = 0.0
    asked_at: float = 0.0
    bytes: int = 0
    window: int = LEAST
    seen: Seen = UNSEEN


class Peer:
    """All lanes to one peer, over paths of `rates`, in bytes a second. Owned by the lanes' thread.

    `open_lane` starts opening one, in the background. `arrived`: the peer has a chunk, which the lane was free for from
    the time given on.
    """

    def __init__(
        self,
        rank: int,
        rates: Sequence[float],
        open_lane: Callable[[int, int], None],
        arrived: Callable[[Lane, Chunk, float], None],
    ) -> None:
        self.rank = rank
        self._rates = rates
        self.lanes = [Lane(rank, path) for path in range(len(rates))]
        self._open_lane = open_lane
        self._arrived = arrived

    @property
    def busy(self) -> bool:
        return any(not lane.queue.idle for lane in self.lanes)

    def put(self, path: int, chunks: Sequence[Chunk], now: float, planned_s: float = 0.0) -> None:
        """Queue chunks on the lane that they are planned for, or on others where it is dead."""
        lane = self.lanes[path]
        if lane.state is State.DEAD and (others := self._usable(lane)):
            self._share(chunks, others, now)
            return
        lane.queue.put(chunks, now, planned_s)
        self._needed(lane)

    def opened(self, path: int, connection: Connection, now: float) -> Lane:
        lane = self.lanes[path]
        lane.connection, lane.state, lane.moved_at, lane.retry_s = connection, State.OPEN, now, FIRST_RETRY_S
        lane.queue.began = lane.queue.free = now
        lane.window = first(self._rates[path])
        apply(connection.sock, lane.window)
        return lane

    def died(self, lane: Lane, now: float) -> None:
        """Close a lane and give its chunks to others. Where there are none, they wait until it can be opened again."""
        connection, lane.connection = lane.connection, None
        if connection is not None:
            connection.close()
        lane.state = State.DEAD
        lane.retry_at, lane.retry_s = now + lane.retry_s, min(2 * lane.retry_s, LAST_RETRY_S)
        chunks, others = lane.queue.empty(), self._usable(lane)
        if others:
            self._share(chunks, others, now)
        else:
            lane.queue.put(chunks, now)

    def feed(self, lane: Lane, now: float) -> None:
        """Give the socket what it takes. Raises OSError when the connection is broken."""
        connection = lane.connection
        assert connection is not None
        connection.flush()
        while not connection.unsent:
            chunk = lane.queue.next() or self._helped(lane, now)
            if chunk is None:
                return
            if len(lane.queue.flying) == 1:  # it is the first
                lane.moved_at = now
            header = Header(Kind.DATA, chunk.tag, chunk.operation, chunk.offset, len(chunk.view))
            connection.put(header.pack(), chunk.view)
            connection.flush()

    def acknowledged(self, lane: Lane, count: int, now: float) -> None:
        """`count` chunks more have arrived."""
        lane.moved_at = now
        for _ in range(count):
            free, chunk = lane.queue.free, lane.queue.arrived(now)
            if chunk is not None:
                lane.bytes += len(chunk.view)
                self._arrived(lane, chunk, free)

    def left(self, last: int) -> None:
        """The peer has gone, and says that it had all that operations up to `last` were to bring it.

        It would not have gone while it waited for a message to it alone.
        """
        for lane in self.lanes:
            for chunk in lane.queue.empty():
                if chunk.operation <= last or chunk.operation >= POINT_TO_POINT:
                    self._arrived(lane, chunk, lane.queue.free)
                else:
                    lane.queue.waiting.append(chunk)

    def check(self, now: float, heard_at: float) -> Iterable[Lane]:
        """Called a few times a second: lanes that are dead by now. Lanes whose time has come are opened again.

        `heard_at`: when the peer was last heard, on whatever connection.
        """
        for lane in self.lanes:
            if lane.state is State.DEAD and now >= lane.retry_at:
                self._open(lane)
            unsure = lane.queue.flying or (lane.connection is not None and lane.connection.unsent)
            if lane.state is State.OPEN and unsure and self._stuck(lane, now):
                self._ask(self._usable(lane), now)
                # An acknowledgement has a way of its own: with several ways broken, all lanes may be stuck though the
                # peer is there. Then the one that has been for longest gives way to a new connection.
                if now - heard_at < _HEARD_S or now - lane.moved_at > _HOPELESS * SUSPECT_S:
                    yield lane

    def resize(self) -> None:
        """Called a few times a second: windows of lanes that are busy are fitted to their paths."""
        for lane in self.lanes:
            if lane.connection is None or lane.connection.closed or not lane.queue.waiting:
                continue
            before, lane.seen = lane.seen, seen(lane.connection.sock)
            window = resized(lane.window, before, lane.seen)
            if window != lane.window:
                lane.window = window
                apply(lane.connection.sock, window)

    def ping(self) -> None:
        """Ask on all lanes that are open, and open one where none is."""
        usable = [lane for lane in self.lanes if lane.state is State.OPEN]
        for lane in usable:
            assert lane.connection is not None
            lane.connection.put(frame(Kind.PING))
        closed = next((lane for lane in self.lanes if lane.state is State.CLOSED), None)
        if not usable and closed is not None:
            self._open(closed)

    def _stuck(self, lane: Lane, now: float) -> bool:
        assert lane.connection is not None
        acknowledged = seen(lane.connection.sock).acknowledged
        if acknowledged != lane.acknowledged:
            lane.acknowledged, lane.moved_at = acknowledged, now
        return now - max(lane.moved_at, lane.connection.heard_at) > SUSPECT_S

    def _ask(self, lanes: Sequence[Lane], now: float) -> None:
        for lane in lanes:
            if lane.state is State.CLOSED:
                self._open(lane)
            elif lane.connection is not None and not lane.connection.unsent and now - lane.asked_at > _HEARD_S / 2:
                lane.asked_at = now
                lane.connection.put(frame(Kind.PING))

    def _usable(self, but: Lane) -> list[Lane]:
        return [lane for lane in self.lanes if lane is not but and lane.state is not State.DEAD]

    def _share(self, chunks: Sequence[Chunk], others: Sequence[Lane], now: float) -> None:
        """To lanes that are open, where there are any."""
        targets = [lane for lane in others if lane.state is State.OPEN] or list(others)
        for lane, share in zip(targets, spread(chunks, [lane.queue for lane in targets], now), strict=True):
            if share:
                lane.queue.put_back(share, now)
                self._needed(lane)

    def _needed(self, lane: Lane) -> None:
        if lane.state is State.CLOSED:
            self._open(lane)

    def _open(self, lane: Lane) -> None:
        lane.state = State.OPENING
        self._open_lane(self.rank, lane.path)

    def _helped(self, lane: Lane, now: float) -> Chunk | None:
        """Nothing is left for this lane: it takes from one that is late."""
        if lane.queue.flying:
            return None
        late = help_late(lane.path, [other.queue for other in self.lanes], now)
        if late is None:
            return None
        lane.queue.help(self.lanes[late].queue)
        return lane.queue.next()
