"""All connections of a rank: opened when they are first needed, read and fed, and hung up so that nothing is lost.

What frames mean is said by `On`, the callbacks that the engine gives. Runs in the lanes' thread, which it owns.
"""

import socket
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from resilient.comms.lanes.connection import Connection
from resilient.comms.lanes.doors import Doors
from resilient.comms.lanes.loop import READ, WRITE, Loop
from resilient.comms.lanes.meeting import Meeting
from resilient.comms.lanes.messages import Name, name
from resilient.comms.lanes.receiving import TooLong
from resilient.comms.lanes.schedule import Chunk
from resilient.comms.lanes.sending import Lane, Peer
from resilient.comms.lanes.wire import Garbled, Header, Kind, frame
from resilient.comms.lanes.wiring import Wiring

CLOSING_S = 1.0
_MOST_ANNOUNCED = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class On:
    """What the engine does. `place` and `take` as for `Connection.read`; `rates` of the paths to a rank; `fingerprint`
    of an operation; `opened` and `broken` a connection; `not_opened` a lane; `empty`: a rank's process has ended;
    `arrived`: the peer has a chunk, see `Peer`."""

    place: Callable[[Connection, Header], memoryview | None]
    take: Callable[[Connection, Header, bytes], None]
    rates: Callable[[int], Sequence[float]]
    fingerprint: Callable[[Name], str]
    opened: Callable[[Connection], None]
    broken: Callable[[Connection, Exception], None]
    not_opened: Callable[[Lane, Exception], None]
    empty: Callable[[int], None]
    arrived: Callable[[Lane, Chunk, float], None]
    tick: Callable[[float], None]
    crashed: Callable[[BaseException], None]
    ended: Callable[[], None]


class Connections:
    """`silent`: nothing but control frames is sent any more."""

    def __init__(self, meeting: Meeting, wiring: Wiring, listening: Sequence[socket.socket], on: On) -> None:
        self.silent = False
        self.peers: dict[int, Peer] = {}
        self.incoming: dict[int, list[Connection]] = defaultdict(list)
        self._listening, self._on = list(listening), on
        self.loop = Loop(
            f"lanes-{meeting.name}-{meeting.rank}",
            ready=self._ready,
            tick=on.tick,
            crashed=on.crashed,
            ended=on.ended,
        )
        self.doors = Doors(meeting, wiring, opened=self._opened, closed=self._closed, empty=self._empty)
        for sock in self._listening:
            self.loop.watch(sock, READ, sock)

    # These three are called by the doors' threads.

    def _opened(self, connection: Connection) -> None:
        if not self.loop.call(lambda: self._adopt(connection)):
            connection.close()

    def _closed(self, rank: int, path: int, error: Exception) -> None:
        self.loop.call(lambda: self._on.not_opened(self.peer(rank).lanes[path], error))

    def _empty(self, rank: int) -> None:
        self.loop.call(lambda: self._on.empty(rank))

    # Everything below runs in the lanes' thread.

    def peer(self, rank: int) -> Peer:
        if rank not in self.peers:
            self.peers[rank] = Peer(rank, self._on.rates(rank), self.doors.open, self._on.arrived)
        return self.peers[rank]

    def busy(self) -> set[int]:
        """The ranks that something is on its way to."""
        return {rank for rank, peer in self.peers.items() if peer.busy}

    def heard_at(self, rank: int) -> float:
        """When anything was last heard of a rank; 0.0: never."""
        lanes = self.peers[rank].lanes if rank in self.peers else []
        own = [lane.connection.heard_at for lane in lanes if lane.connection is not None]
        return max([*own, *(connection.heard_at for connection in self.incoming[rank])], default=0.0)

    def ask(self, rank: int) -> None:
        """Whether a rank is there: on all connections with it, or a new one."""
        for connection in list(self.incoming[rank]):
            connection.put(frame(Kind.PING))
            self.write(connection)
        self.peer(rank).ping()
        self.feed(self.peer(rank))

    def comfort(self, pong: bytes) -> None:
        """Say on connections that are not read for now that somebody is there."""
        for connection in [one for connections in self.incoming.values() for one in connections if one.paused]:
            connection.put(pong)
            self.write(connection)

    def flood(self, raw: bytes) -> None:
        """Tell all that there is a connection with."""
        for connection in self._all():
            connection.put(raw)
            self.write(connection)

    def feed(self, peer: Peer) -> None:
        for lane in peer.lanes:
            if lane.connection is not None:
                self.write(lane.connection)

    def resume(self) -> None:
        """Read on where something had no place so far."""
        for connection in [one for connections in self.incoming.values() for one in connections if one.paused]:
            self._read(connection)

    def lost(self, lane: Lane) -> bool:
        """A lane has died; others take what it had. Whether it had anything."""
        peer, busy = self.peer(lane.peer), not lane.queue.idle
        if lane.connection is not None:
            self.loop.forget(lane.connection.sock)
        peer.died(lane, time.monotonic())
        return busy

    def lane_of(self, connection: Connection) -> Lane | None:
        """The lane that a connection is, if it is one of ours and not a former one."""
        if not connection.sending:
            return None
        lane = self.peer(connection.peer).lanes[connection.path]
        return lane if lane.connection is connection else None

    def write(self, connection: Connection) -> None:
        """Send what there is to send."""
        if connection.closed:
            return
        try:
            lane = self.lane_of(connection)
            if lane is not None and not self.silent:
                self._announce(lane, connection)
                self.peer(connection.peer).feed(lane, time.monotonic())
            else:
                connection.flush()
        except OSError as error:
            self._broken(connection, error)
            return
        self._watch(connection)

    def forget_all(self) -> None:
        """Drop what is still to be sent, and touch nobody's buffers any more."""
        self.silent = True
        for lane in [lane for peer in self.peers.values() for lane in peer.lanes]:
            lane.queue.empty()
        for connection in self._all():
            connection.let_go()
        self.resume()

    def hang_up(self) -> None:
        """So that what has been said still arrives: acknowledgements above all."""
        self.doors.close()
        for sock in self._listening:
            self.loop.forget(sock)
            sock.close()
        for connection in self._all():
            with suppress(OSError):
                connection.flush()
                if not connection.unsent:
                    connection.sock.shutdown(socket.SHUT_WR)
        self._listen_out(time.monotonic() + CLOSING_S)
        for connection in self._all():
            self.loop.forget(connection.sock)
            connection.close()

    def _all(self) -> list[Connection]:
        lanes = [lane for peer in self.peers.values() for lane in peer.lanes]
        outgoing = [lane.connection for lane in lanes if lane.connection is not None]
        return outgoing + [connection for connections in self.incoming.values() for connection in connections]

    def _ready(self, what: Connection | socket.socket, events: int) -> None:
        if isinstance(what, socket.socket):
            with suppress(OSError):
                accepted, _ = what.accept()
                self.doors.welcome(accepted)
            return
        if events & READ:
            self._read(what)
        if events & WRITE:
            self.write(what)

    def _adopt(self, connection: Connection) -> None:
        if self.loop.stopping.is_set():
            connection.close()
            return
        if connection.sending:
            self.peer(connection.peer).opened(connection.path, connection, time.monotonic())
        else:
            self.incoming[connection.peer].append(connection)
        self._on.opened(connection)
        self.write(connection)

    def _read(self, connection: Connection) -> None:
        if connection.closed:
            return
        try:
            if not connection.paused or connection.resume(self._on.place, self._on.take):
                connection.read(self._on.place, self._on.take)
        except (OSError, EOFError, Garbled, TooLong) as error:
            self._broken(connection, error)
            return
        self._watch(connection)

    def _broken(self, connection: Connection, error: Exception) -> None:
        if connection.closed:
            return
        self.loop.forget(connection.sock)
        connection.close()
        if not connection.sending:
            self.incoming[connection.peer].remove(connection)
        self._on.broken(connection, error)

    def _announce(self, lane: Lane, connection: Connection) -> None:
        """Say what the operations are that this lane is about to carry."""
        for chunk in lane.queue.waiting:
            key = name(chunk.operation, chunk.tag)
            if key not in connection.announced:
                if len(connection.announced) > _MOST_ANNOUNCED:
                    connection.announced.clear()  # to announce again is harmless
                connection.announced.add(key)
                connection.put(frame(Kind.OPERATION, chunk.operation, self._on.fingerprint(key).encode(), key[1]))

    def _watch(self, connection: Connection) -> None:
        """Ask for what the connection waits for."""
        if connection.closed:
            return
        events = 0 if connection.paused else READ
        lane = self.lane_of(connection)
        if connection.unsent or (lane is not None and lane.queue.waiting and not self.silent):
            events |= WRITE
        self.loop.watch(connection.sock, events, connection)

    def _listen_out(self, deadline: float) -> None:
        """Read until the others hang up too: unread bytes would make the kernel throw away what we have sent."""
        talking = self._all()
        while talking and time.monotonic() < deadline:
            for connection in list(talking):
                try:
                    connection.flush()
                    ended = not connection.sock.recv(1 << 16)
                except BlockingIOError:
                    continue
                except OSError:
                    ended = True
                if ended:
                    talking.remove(connection)
                    self.loop.forget(connection.sock)
            if talking:
                self.loop.pause(0.02)
