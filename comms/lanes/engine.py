"""One rank's lanes in a group: what frames mean, and what is done when something breaks.

Everything runs in the group's own thread (`loop`), which others hand work to; they wait on transfers. When one rank
fails the group, it tells all that it has a connection with, and they pass it on: every rank's transfers fail with the
same error. It is written into the job's store as well, for those that nobody is connected with.
"""

import socket
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from typing import Any

from resilient.comms.fabric import Fabric
from resilient.comms.lanes.connection import Connection
from resilient.comms.lanes.connections import Connections, On
from resilient.comms.lanes.failing import Awaited, Verdict, blame, gone
from resilient.comms.lanes.meeting import Meeting, Store, read_failure, write_failure
from resilient.comms.lanes.messages import POINT_TO_POINT, Failure, Name, Operation, Receive, Send, Transfer, name
from resilient.comms.lanes.rates import RETURNED, Rates, rates_between
from resilient.comms.lanes.receiving import Receiver, TooLong
from resilient.comms.lanes.schedule import Chunk, cut
from resilient.comms.lanes.sending import Lane
from resilient.comms.lanes.status import StatusFile
from resilient.comms.lanes.wire import Header, Kind, frame, heard, said
from resilient.comms.lanes.wiring import Wiring
from resilient.comms.lanes.works import Measured, Work, Works

_ASK_S = 1.0  # how often a peer that keeps us waiting is asked whether it is there
_SILENT_S = 3.0  # a peer that has not answered for so long, at the end of the timeout, is gone
_GRACE_S = 2.0  # after the timeout, for others to say whose fault it is
_REMEMBERED = 4096  # operations whose fingerprints are known
_MOST_TEXT = 4096  # characters: a message must fit a frame


class Lanes:
    """One rank's lanes in a group; `opening.open_lanes` makes it. Methods may be called from any thread."""

    def __init__(
        self,
        meeting: Meeting,
        wiring: Wiring,
        fabric: Fabric,
        store: Store,
        listening: Sequence[socket.socket],
        timeout_s: float,
        status: StatusFile,
    ) -> None:
        self.rank, self.size = meeting.rank, len(meeting.members)
        self._meeting, self._store, self._timeout_s, self._status = meeting, store, timeout_s, status
        self._rates = Rates(self.rank, fabric)
        self._fabric = fabric
        self._receiver = Receiver()
        self._works, self._measured = Works(), Measured()
        self._verdict = Verdict()
        self._fingerprints: dict[Name, str] = {}
        self._told: dict[Name, dict[int, str]] = defaultdict(dict)  # fingerprints of operations that are still to come
        self._pongs: dict[int, tuple[int, bool]] = {}  # what each peer said: the last it began, whether it waits
        self._asked_at = 0.0
        on = On(
            place=self._place,
            take=self._take,
            rates=lambda rank: rates_between(fabric, self.rank, rank),
            fingerprint=lambda key: self._fingerprints.get(key, ""),
            opened=self._opened,
            broken=self._broken,
            not_opened=self._not_opened,
            empty=self._empty,
            arrived=self._arrived,
            tick=self._tick,
            crashed=lambda error: self._fail(Failure("aborted", f"lanes of rank {self.rank}: {error!r}", self.rank)),
            ended=self._end,
        )
        self._connections = Connections(meeting, wiring, listening, on)
        self._loop = self._connections.loop
        self._loop.start()

    @property
    def fabric(self) -> Fabric:
        """With the rates as they are known now: what the next operation is planned for."""
        return self._fabric

    def post(self, operation: Operation, sends: Sequence[Send], receives: Sequence[Receive]) -> Transfer:
        """Start to send and receive; does not block. Buffers belong to the lanes until the transfer is done.

        Operations are numbered upwards by all ranks alike. Several posts may belong to one, with different tags.
        """
        transfer = Transfer()
        if not self._loop.call(lambda: self._post(operation, sends, receives, transfer)):
            assert self._verdict.failure is not None
            transfer.finish(self._verdict.failure.error())
        return transfer

    def abort(self, reason: str) -> None:
        """Fail what is pending and all that comes later, on every rank, with CollectiveFailed."""
        host = self._meeting.members[self.rank].host
        text = f"rank {self.rank} ({host}) has aborted: {reason}"
        self._loop.call(lambda: self._fail(Failure("aborted", text, self.rank, host)))

    def report(self) -> dict[str, Any]:
        """State, bytes and rates of each lane so far, as plain data."""
        failure = self._verdict.failure
        return {
            "rank": self.rank,
            "ranks": self.size,
            "host": self._meeting.members[self.rank].host,
            "operations": self._works.last,
            "failure": None if failure is None else failure.text,
            "lanes": [
                {
                    "peer": lane.peer,
                    "path": lane.path,
                    "state": lane.state.value,
                    "bytes": lane.bytes,
                    "factor": self._rates.factor(self._leaf(lane.peer), lane.path),
                }
                for peer in list(self._connections.peers.values())
                for lane in peer.lanes
            ],
        }

    def close(self) -> None:
        """End the thread and all connections; what is pending fails. Blocks for about a second at most."""
        self._loop.stop()

    # Everything below runs in the lanes' thread.

    # -- transfers -------------------------------------------------------------------

    def _post(
        self, operation: Operation, sends: Sequence[Send], receives: Sequence[Receive], transfer: Transfer
    ) -> None:
        work = Work(operation, transfer, time.monotonic(), self._timeout_s)
        work.left = 1 + len(receives)
        self._works.add(work)
        if self._verdict.failure is not None:
            self._settle(time.monotonic())
            return
        number = operation.number
        tags = [send.tag for send in sends] + [receive.tag for receive in receives]
        key = name(number, tags[0] if tags else 0)
        self._fingerprints[key] = operation.fingerprint
        if len(self._fingerprints) > _REMEMBERED:
            del self._fingerprints[next(iter(self._fingerprints))]
        for peer, text in self._told.pop(key, {}).items():
            self._compare(key, peer, text)
        for receive in receives:
            try:
                self._receiver.post(number, receive, lambda: self._one_less(work))
            except TooLong as error:
                self._mismatch(f"rank {receive.source} sent more than rank {self.rank} expects: {error}")
        for send in sends:
            self._send(work, send)
        self._one_less(work)
        self._connections.resume()

    def _send(self, work: Work, send: Send) -> None:
        peer, operation = self._connections.peer(send.target), work.operation
        for path, chunks in cut(work, operation.number, send.tag, send.content, send.pieces):
            if chunks:
                work.left += len(chunks)
                factor = self._rates.factor(self._leaf(send.target), path)
                work.plan(send.target, path, sum(len(chunk.view) for chunk in chunks), factor)
                peer.put(path, chunks, time.monotonic(), operation.expected_s.get(path, 0.0))
        self._connections.feed(peer)

    def _one_less(self, work: Work) -> None:
        if self._works.one_less(work):
            self._measure(work)
            work.transfer.finish()

    def _arrived(self, lane: Lane, chunk: Chunk, free: float) -> None:
        work = chunk.owner
        assert isinstance(work, Work)
        work.arrived(lane.peer, lane.path, len(chunk.view), since=free, now=time.monotonic())
        self._one_less(work)

    def _measure(self, work: Work) -> None:
        """What the lanes took, beside what the plan meant them to."""
        for peer, busy_s, expected_s in work.measured():
            if self._leaf(peer) != self._leaf(self.rank):
                self._measured.add(self._leaf(peer), busy_s, expected_s)
        found = self._measured.told()
        for report in self._rates.observe(*found) if found is not None else ():
            self._tell(report)

    def _tell(self, report: dict[str, Any]) -> None:
        """Rates have changed."""
        self._fabric = self._rates.fabric()
        self._connections.flood(said(Kind.REPORT, report))

    # -- frames ----------------------------------------------------------------------

    def _place(self, connection: Connection, header: Header) -> memoryview | None:
        if self._verdict.failure is not None or connection.sending:
            return memoryview(bytearray(header.length))
        return self._receiver.place(connection, header)

    def _take(self, connection: Connection, header: Header, payload: bytes) -> None:
        match header.kind:
            case Kind.DATA:
                connection.chunks_in += 1
                connection.put(frame(Kind.ACK, connection.chunks_in))
                others = [one for one in self._connections.incoming[connection.peer] if one is not connection]
                if self._verdict.failure is None:
                    self._receiver.arrived(connection, header, others)
                self._connections.write(connection)
            case Kind.ACK:
                self._acknowledged(connection, header.operation)
            case Kind.OPERATION:
                self._compare((header.operation, header.tag), connection.peer, payload.decode(errors="replace"))
            case Kind.PING:
                connection.put(self._pong())
                self._connections.write(connection)
            case Kind.BYE:
                self._connections.peer(connection.peer).left(header.operation)
            case Kind.PONG:
                self._pongs[connection.peer] = (header.operation, bool(header.tag))
            case Kind.ABORT:
                with suppress(TypeError):
                    self._fail(Failure(**heard(payload)))
            case Kind.REPORT:
                report = heard(payload)
                with suppress(KeyError, TypeError, ValueError):
                    if self._rates.merge(report):
                        self._tell(report)

    def _pong(self) -> bytes:
        return frame(Kind.PONG, self._works.last, tag=int(self._works.any()))

    def _acknowledged(self, connection: Connection, count: int) -> None:
        lane = self._connections.lane_of(connection)
        if lane is None or self._verdict.failure is not None:
            return
        peer = self._connections.peer(connection.peer)
        peer.acknowledged(lane, count - connection.chunks_in, time.monotonic())
        connection.chunks_in = count
        if peer.busy and lane.queue.idle:
            self._connections.write(connection)  # it may help another

    def _compare(self, key: Name, peer: int, text: str) -> None:
        """Whether a peer means the same by an operation as we do."""
        own = self._fingerprints.get(key)
        if own is None:
            self._told[key][peer] = text
        elif own != text:
            calls = sorted([(self.rank, own), (peer, text)])
            self._mismatch(" and ".join(f"rank {rank} called {what}" for rank, what in calls), key[0])

    def _mismatch(self, text: str, number: int | None = None) -> None:
        where = "" if number is None or number >= POINT_TO_POINT else f" as operation {number}"
        rule = "all ranks of a group must call the same collectives in the same order, with the same sizes and types"
        self._fail(Failure("mismatch", f"{text}{where}; {rule}"))

    # -- what breaks -----------------------------------------------------------------

    def _opened(self, connection: Connection) -> None:
        leaf = self._leaf(connection.peer)
        if connection.sending and self._rates.factor(leaf, connection.path) == 0:
            self._tell(self._rates.report(leaf, {connection.path: RETURNED}))
        if self._verdict.failure is not None:
            connection.put(said(Kind.ABORT, asdict(self._verdict.failure)))
        elif connection.peer in self._awaited():
            connection.put(frame(Kind.PING))

    def _not_opened(self, lane: Lane, error: Exception) -> None:
        if isinstance(error, ConnectionRefusedError) and lane.peer in self._awaited():
            self._connections.doors.knock(lane.peer)
        self._connections.lost(lane)
        self._dead(lane)

    def _broken(self, connection: Connection, error: Exception) -> None:
        """A connection has ended. What it means shows when it is opened again, or nobody is there any more."""
        self._receiver.dropped(connection)
        rank = connection.peer
        if isinstance(error, TooLong):
            self._mismatch(f"rank {rank} sent more than rank {self.rank} expects: {error}")
            return
        if self._verdict.failure is None and rank in self._awaited():
            self._connections.doors.knock(rank)
        lane = self._connections.lane_of(connection)
        if lane is not None and self._connections.lost(lane):
            self._dead(lane)

    def _dead(self, lane: Lane) -> None:
        """A lane that was needed: everybody plans without it until it is there again."""
        if self._verdict.failure is not None:
            return
        leaf = self._leaf(lane.peer)
        if leaf != self._leaf(self.rank) and self._rates.factor(leaf, lane.path):
            self._tell(self._rates.report(leaf, {lane.path: 0.0}))
        self._connections.feed(self._connections.peer(lane.peer))

    def _empty(self, rank: int) -> None:
        if rank in self._awaited():  # it may have said goodbye
            self._gone(rank, "its process has ended")

    def _gone(self, rank: int, why: str) -> None:
        self._fail(gone(rank, self._meeting.members[rank].host, why))

    def _awaited(self) -> list[int]:
        """The ranks that this one is waiting for."""
        return sorted(self._receiver.sources() | self._connections.busy())

    def _tick(self, now: float) -> None:
        if self._status.due(now):
            self._status.write(self.report())
        if self._verdict.failure is not None:
            self._settle(now)
            return
        for peer in list(self._connections.peers.values()):
            for lane in list(peer.check(now, self._connections.heard_at(peer.rank))):
                self._connections.lost(lane)
                self._dead(lane)
            peer.resize()
            self._connections.feed(peer)
        self._connections.comfort(self._pong())
        if self._works.oldest_s(now) > min(_ASK_S, self._timeout_s / 4):
            self._ask(now)
        late = self._works.overdue(now)
        if late is not None:
            self._overdue(late, now)

    def _ask(self, now: float) -> None:
        """Ask peers that keep us waiting whether they are there."""
        if now - self._asked_at < min(_ASK_S, self._timeout_s / 4):
            return
        self._asked_at = now
        for rank in self._awaited():
            self._connections.ask(rank)

    def _overdue(self, work: Work, now: float) -> None:
        """The timeout is over: say who is silent, or who has not come, or wait a little for others who know."""
        number, what = work.operation.number, f"operation {work.operation.number}, {work.operation.fingerprint}"
        ranks = self._awaited()
        failure = blame(number, [self._facts(rank, now) for rank in ranks], self._timeout_s, self._silent_s)
        if failure is None and now > work.deadline + _GRACE_S:
            failure = read_failure(self._store, self._meeting.name) or Failure(
                "late", f"{what}, has not ended within {self._timeout_s:g} s; rank {self.rank} waits for {ranks}"
            )
        if failure is not None:
            self._fail(failure)

    @property
    def _silent_s(self) -> float:
        return min(_SILENT_S, self._timeout_s / 2)

    def _facts(self, rank: int, now: float) -> Awaited:
        begun, waits = self._pongs.get(rank, (None, False))
        host = self._meeting.members[rank].host
        return Awaited(rank=rank, host=host, silent_s=now - self._connections.heard_at(rank), begun=begun, waits=waits)

    def _fail(self, failure: Failure) -> None:
        """The group has failed: tell all. What waits is ended when all had time to say what they know."""
        first = self._verdict.failure is None
        failure = replace(failure, text=failure.text[:_MOST_TEXT])
        if not self._verdict.take(failure, time.monotonic()):
            return
        if first:
            self._receiver.forget()
            self._connections.forget_all()
        self._loop.soon(self._verdict.at)
        self._connections.flood(said(Kind.ABORT, asdict(failure)))

    def _settle(self, now: float) -> None:
        before = self._verdict.final
        failure = self._verdict.settle(now)
        if failure is None:
            self._loop.soon(self._verdict.at)
            return
        self._works.fail(failure)
        if not before:
            self._connections.doors.submit(lambda: write_failure(self._store, self._meeting.name, failure))

    def _leaf(self, rank: int) -> int:
        return self._meeting.members[rank].leaf

    def _end(self) -> None:
        self._status.remove()
        if self._verdict.failure is None and not self._works.any():
            self._connections.flood(frame(Kind.BYE, self._works.last))
        self._connections.hang_up()
        self._verdict.take(Failure("aborted", f"the group of rank {self.rank} is closed", self.rank), time.monotonic())
        failure = self._verdict.settle(float("inf"))
        assert failure is not None
        self._works.fail(failure)
