"""One rank's lanes in a group: what frames mean, and what is done when something breaks.

Everything runs in the group's own thread (`loop`), which others hand work to; they wait on transfers. When one rank
fails the group, it tells all that it has a connection with, and they pass it on: every rank's transfers fail with the
same error. It is written into the job's store as well, for those that nobody is connected with.
"""

import json
import socket
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from resilient.comms.fabric import Fabric
from resilient.comms.lanes.connection import Connection
from resilient.comms.lanes.doors import Doors
from resilient.comms.lanes.failing import Awaited, Verdict, blame, gone
from resilient.comms.lanes.loop import READ, WRITE, Loop
from resilient.comms.lanes.meeting import Meeting, Store, listen, meet
from resilient.comms.lanes.messages import Failure, Operation, Receive, Send, Transfer
from resilient.comms.lanes.rates import RETURNED, Rates
from resilient.comms.lanes.receiving import Receiver, TooLong
from resilient.comms.lanes.schedule import Chunk, cut
from resilient.comms.lanes.sending import Lane, Peer
from resilient.comms.lanes.wire import Garbled, Header, Kind, frame, heard, said
from resilient.comms.lanes.wiring import Wiring
from resilient.comms.lanes.works import Work, Works
from resilient.errors import UsageError

_ASK_S = 1.0  # how often a peer that keeps us waiting is asked whether it is there
_SILENT_S = 3.0  # a peer that has not answered for so long, at the end of the timeout, is gone
_GRACE_S = 2.0  # after the timeout, for others to say whose fault it is
_CLOSING_S = 1.0
_REMEMBERED = 4096  # operations whose fingerprints are known


class Lanes:
    """One rank's lanes in a group; `open_lanes` makes it. Methods may be called from any thread."""

    def __init__(
        self,
        meeting: Meeting,
        wiring: Wiring,
        fabric: Fabric,
        store: Store,
        listening: Sequence[socket.socket],
        timeout_s: float,
    ) -> None:
        self.rank, self.size = meeting.rank, len(meeting.members)
        self._meeting, self._paths, self._store, self._timeout_s = meeting, wiring.paths, store, timeout_s
        self._rates = Rates(self.rank, fabric)
        self._fabric = fabric
        self._receiver = Receiver()
        self._works = Works()
        self._verdict = Verdict()
        self._peers: dict[int, Peer] = {}
        self._incoming: dict[int, list[Connection]] = defaultdict(list)
        self._fingerprints: dict[int, str] = {}
        self._told: dict[int, dict[int, str]] = defaultdict(dict)  # fingerprints of operations that are still to come
        self._pongs: dict[int, tuple[int, bool]] = {}  # what each peer said: the last it began, whether it waits
        self._asked_at = 0.0
        self._listening = list(listening)
        self._loop = Loop(
            f"lanes-{meeting.name}-{self.rank}",
            ready=self._ready,
            tick=self._tick,
            crashed=lambda error: self._fail(Failure("aborted", f"lanes of rank {self.rank}: {error!r}", self.rank)),
            ended=self._end,
        )
        self._doors = Doors(
            meeting,
            wiring,
            opened=self._opened,
            closed=self._closed,
            empty=self._empty,
        )
        for sock in self._listening:
            self._loop.watch(sock, READ, sock)
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
            "failure": None if failure is None else failure.text,
            "lanes": [
                {
                    "peer": lane.peer,
                    "path": lane.path,
                    "state": lane.state.value,
                    "bytes": lane.bytes,
                    "factor": self._rates.factor(self._leaf(lane.peer), lane.path),
                }
                for peer in list(self._peers.values())
                for lane in peer.lanes
            ],
        }

    def close(self) -> None:
        """End the thread and all connections; what is pending fails. Blocks for about a second at most."""
        self._loop.stop()

    def _opened(self, connection: Connection) -> None:
        if not self._loop.call(lambda: self._adopt(connection)):
            connection.close()

    def _closed(self, peer: int, path: int, error: Exception) -> None:
        self._loop.call(lambda: self._not_opened(peer, path, error))

    def _empty(self, peer: int) -> None:
        self._loop.call(lambda: self._gone(peer, "its process has ended"))

    # Everything below runs in the lanes' thread.

    # -- connections -----------------------------------------------------------------

    def _ready(self, what: Connection | socket.socket, events: int) -> None:
        if isinstance(what, socket.socket):
            with suppress(OSError):
                accepted, _ = what.accept()
                self._doors.welcome(accepted)
            return
        if events & READ:
            self._read(what)
        if events & WRITE:
            self._write(what)

    def _adopt(self, connection: Connection) -> None:
        if self._loop.stopping.is_set():
            connection.close()
            return
        peer, now = self._peer(connection.peer), time.monotonic()
        if connection.sending:
            if self._rates.factor(self._leaf(peer.rank), connection.path) == 0:
                self._tell(self._rates.report(self._leaf(peer.rank), {connection.path: RETURNED}))
            peer.opened(connection.path, connection, now)
        else:
            self._incoming[peer.rank].append(connection)
        if self._verdict.failure is not None:
            connection.put(said(Kind.ABORT, asdict(self._verdict.failure)))
        elif peer.rank in self._awaited():
            connection.put(frame(Kind.PING))
        self._write(connection)

    def _not_opened(self, rank: int, path: int, error: Exception) -> None:
        if isinstance(error, ConnectionRefusedError) and rank in self._awaited():
            self._doors.knock(rank)
        peer = self._peer(rank)
        peer.died(peer.lanes[path], time.monotonic())
        self._dead(rank, path)
        self._feed(peer)

    def _read(self, connection: Connection) -> None:
        if connection.closed:
            return
        try:
            if not connection.paused or connection.resume(self._place, self._take):
                connection.read(self._place, self._take)
        except (OSError, EOFError, Garbled, TooLong) as error:
            self._broken(connection, error)
            return
        self._watch(connection)

    def _write(self, connection: Connection) -> None:
        """Send what there is to send."""
        if connection.closed:
            return
        try:
            lane = self._lane_of(connection)
            if lane is not None and self._verdict.failure is None:
                self._announce(lane, connection)
                self._peer(connection.peer).feed(lane, time.monotonic())
            else:
                connection.flush()
        except OSError as error:
            self._broken(connection, error)
            return
        self._watch(connection)

    def _lane_of(self, connection: Connection) -> Lane | None:
        """The lane that a connection is, if it is one of ours and not a former one."""
        if not connection.sending:
            return None
        lane = self._peer(connection.peer).lanes[connection.path]
        return lane if lane.connection is connection else None

    def _announce(self, lane: Lane, connection: Connection) -> None:
        """Say what the operations are that this lane is about to carry."""
        for chunk in lane.queue.waiting:
            if chunk.operation not in connection.announced:
                connection.announced.add(chunk.operation)
                text = self._fingerprints.get(chunk.operation, "").encode()
                connection.put(frame(Kind.OPERATION, chunk.operation, text))

    def _watch(self, connection: Connection) -> None:
        """Ask for what the connection waits for."""
        if connection.closed:
            return
        events = 0 if connection.paused else READ
        lane = self._lane_of(connection)
        if connection.unsent or (lane is not None and lane.queue.waiting and self._verdict.failure is None):
            events |= WRITE
        self._loop.watch(connection.sock, events, connection)

    def _feed(self, peer: Peer) -> None:
        for lane in peer.lanes:
            if lane.connection is not None:
                self._write(lane.connection)

    def _connections(self) -> list[Connection]:
        lanes = [lane for peer in self._peers.values() for lane in peer.lanes]
        outgoing = [lane.connection for lane in lanes if lane.connection is not None]
        return outgoing + [connection for connections in self._incoming.values() for connection in connections]

    def _flood(self, raw: bytes) -> None:
        for connection in self._connections():
            connection.put(raw)
            self._write(connection)

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
        self._fingerprints[number] = operation.fingerprint
        self._fingerprints.pop(number - _REMEMBERED, None)
        for peer, text in self._told.pop(number, {}).items():
            self._compare(number, peer, text)
        for receive in receives:
            try:
                self._receiver.post(number, receive, lambda: self._one_less(work))
            except TooLong as error:
                self._mismatch(f"rank {receive.source} sent more than rank {self.rank} expects: {error}")
        for send in sends:
            self._send(work, send)
        self._one_less(work)
        for connection in [one for connections in self._incoming.values() for one in connections if one.paused]:
            self._read(connection)

    def _send(self, work: Work, send: Send) -> None:
        peer, operation = self._peer(send.target), work.operation
        for path, chunks in cut(work, operation.number, send.tag, send.view, send.pieces):
            if chunks:
                work.left += len(chunks)
                work.plan(send.target, path, sum(len(chunk.view) for chunk in chunks))
                peer.put(path, chunks, time.monotonic(), operation.expected_s.get(path, 0.0))
        self._feed(peer)

    def _one_less(self, work: Work) -> None:
        if self._works.one_less(work):
            self._measure(work)
            work.transfer.finish()

    def _arrived(self, lane: Lane, chunk: Chunk) -> None:
        work = chunk.owner
        assert isinstance(work, Work)
        work.arrived(lane.peer, lane.path, len(chunk.view), time.monotonic())
        self._one_less(work)

    def _measure(self, work: Work) -> None:
        """What the lanes took, beside what the plan meant them to."""
        for peer, busy_s, expected_s in work.measured():
            leaf = self._leaf(peer)
            if leaf == self._leaf(self.rank):
                continue
            report = self._rates.observe(leaf, busy_s, expected_s)
            if report is not None:
                self._tell(report)

    def _tell(self, report: dict[str, Any]) -> None:
        """Rates have changed."""
        self._fabric = self._rates.fabric()
        self._flood(said(Kind.REPORT, report))

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
                others = [one for one in self._incoming[connection.peer] if one is not connection]
                if self._verdict.failure is None:
                    self._receiver.arrived(connection, header, others)
                self._write(connection)
            case Kind.ACK:
                self._acknowledged(connection, header.operation)
            case Kind.OPERATION:
                self._compare(header.operation, connection.peer, payload.decode(errors="replace"))
            case Kind.PING:
                connection.put(frame(Kind.PONG, self._works.last, tag=int(self._works.any())))
                self._write(connection)
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

    def _acknowledged(self, connection: Connection, count: int) -> None:
        lane = self._lane_of(connection)
        if lane is None or self._verdict.failure is not None:
            return
        peer = self._peer(connection.peer)
        peer.acknowledged(lane, count - connection.chunks_in, time.monotonic())
        connection.chunks_in = count
        if peer.busy and lane.queue.idle:
            self._write(connection)  # it may help another

    def _compare(self, number: int, peer: int, text: str) -> None:
        """Whether a peer means the same by an operation as we do."""
        own = self._fingerprints.get(number)
        if own is None:
            self._told[number][peer] = text
        elif own != text:
            calls = sorted([(self.rank, own), (peer, text)])
            self._mismatch(" and ".join(f"rank {rank} called {what}" for rank, what in calls), number)

    def _mismatch(self, text: str, number: int | None = None) -> None:
        where = "" if number is None else f" as operation {number}"
        rule = "all ranks of a group must call the same collectives in the same order, with the same sizes and types"
        self._fail(Failure("mismatch", f"{text}{where}; {rule}"))

    # -- what breaks -----------------------------------------------------------------

    def _broken(self, connection: Connection, error: Exception) -> None:
        """A connection has ended. What it means shows when it is opened again, or nobody is there any more."""
        if connection.closed:
            return
        self._loop.forget(connection.sock)
        connection.close()
        self._receiver.dropped(connection)
        rank = connection.peer
        if isinstance(error, TooLong):
            self._mismatch(f"rank {rank} sent more than rank {self.rank} expects: {error}")
            return
        awaited = rank in self._awaited()
        lane = self._lane_of(connection)
        if lane is not None:
            self._lost(lane)
        elif not connection.sending:
            self._incoming[rank].remove(connection)
        if awaited and self._verdict.failure is None:
            self._doors.knock(rank)

    def _lost(self, lane: Lane) -> None:
        """A lane has died. If it was needed, everybody plans without it until it is there again."""
        peer, busy = self._peer(lane.peer), not lane.queue.idle
        if lane.connection is not None:
            self._loop.forget(lane.connection.sock)
        peer.died(lane, time.monotonic())
        if busy and self._verdict.failure is None:
            self._dead(lane.peer, lane.path)
            self._feed(peer)

    def _dead(self, peer: int, path: int) -> None:
        leaf = self._leaf(peer)
        if leaf != self._leaf(self.rank) and self._rates.factor(leaf, path):
            self._tell(self._rates.report(leaf, {path: 0.0}))

    def _gone(self, rank: int, why: str) -> None:
        self._fail(gone(rank, self._meeting.members[rank].host, why))

    def _awaited(self) -> list[int]:
        """The ranks that this one is waiting for."""
        return sorted(self._receiver.sources() | {rank for rank, peer in self._peers.items() if peer.busy})

    def _tick(self, now: float) -> None:
        if self._verdict.failure is not None:
            self._settle(now)
            return
        for peer in list(self._peers.values()):
            for lane in list(peer.check(now)):
                self._lost(lane)
            self._feed(peer)
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
            for connection in list(self._incoming[rank]):
                connection.put(frame(Kind.PING))
                self._write(connection)
            self._peer(rank).ping()
            self._feed(self._peer(rank))

    def _overdue(self, work: Work, now: float) -> None:
        """The timeout is over: say who is silent, or who has not come, or wait a little for others who know."""
        number, what = work.operation.number, f"operation {work.operation.number}, {work.operation.fingerprint}"
        ranks = self._awaited()
        failure = blame(number, [self._facts(rank, now) for rank in ranks], self._timeout_s, self._silent_s)
        if failure is None and now > work.deadline + _GRACE_S:
            failure = self._written() or Failure(
                "late", f"{what}, has not ended within {self._timeout_s:g} s; rank {self.rank} waits for {ranks}"
            )
        if failure is not None:
            self._fail(failure)

    @property
    def _silent_s(self) -> float:
        return min(_SILENT_S, self._timeout_s / 2)

    def _facts(self, rank: int, now: float) -> Awaited:
        own = [lane.connection.heard_at for lane in self._peer(rank).lanes if lane.connection is not None]
        heard_at = max([*own, *(connection.heard_at for connection in self._incoming[rank])], default=0.0)
        begun, waits = self._pongs.get(rank, (None, False))
        host = self._meeting.members[rank].host
        return Awaited(rank=rank, host=host, silent_s=now - heard_at, begun=begun, waits=waits)

    @property
    def _failed_key(self) -> str:
        return f"{self._meeting.name}/failed"

    def _written(self) -> Failure | None:
        """What somebody has written into the store."""
        with suppress(Exception):  # whatever a store raises: it may be what has gone
            if self._store.check([self._failed_key]):
                return Failure(**json.loads(self._store.get(self._failed_key)))
        return None

    def _write_down(self, failure: Failure) -> None:
        with suppress(Exception):  # as above
            if not self._store.check([self._failed_key]):
                self._store.set(self._failed_key, json.dumps(asdict(failure)))

    def _fail(self, failure: Failure) -> None:
        """The group has failed: tell all. What waits is ended when all had time to say what they know."""
        first = self._verdict.failure is None
        if not self._verdict.take(failure, time.monotonic()):
            return
        if first:
            self._receiver.forget()
            for lane in [lane for peer in self._peers.values() for lane in peer.lanes]:
                lane.queue.empty()
        self._loop.soon(self._verdict.at)
        self._flood(said(Kind.ABORT, asdict(failure)))

    def _settle(self, now: float) -> None:
        before = self._verdict.final
        failure = self._verdict.settle(now)
        if failure is None:
            self._loop.soon(self._verdict.at)
            return
        self._works.fail(failure)
        if not before:
            self._doors.submit(lambda: self._write_down(failure))

    # -- the end ---------------------------------------------------------------------

    def _peer(self, rank: int) -> Peer:
        if rank not in self._peers:
            self._peers[rank] = Peer(rank, self._paths, self._doors.open, self._arrived)
        return self._peers[rank]

    def _leaf(self, rank: int) -> int:
        return self._meeting.members[rank].leaf

    def _end(self) -> None:
        """Hang up so that what has been said still arrives: acknowledgements above all."""
        self._doors.close()
        for sock in self._listening:
            self._loop.forget(sock)
            sock.close()
        for connection in self._connections():
            with suppress(OSError):
                connection.flush()
                if not connection.unsent:
                    connection.sock.shutdown(socket.SHUT_WR)
        self._listen_out(time.monotonic() + _CLOSING_S)
        for connection in self._connections():
            self._loop.forget(connection.sock)
            connection.close()
        self._verdict.take(Failure("aborted", f"the group of rank {self.rank} is closed", self.rank), time.monotonic())
        failure = self._verdict.settle(float("inf"))
        assert failure is not None
        self._works.fail(failure)

    def _listen_out(self, deadline: float) -> None:
        """Read until the others hang up too: unread bytes would make the kernel throw away what we have sent."""
        talking = self._connections()
        while talking and time.monotonic() < deadline:
            for connection in list(talking):
                try:
                    connection.flush()
                    if not connection.sock.recv(1 << 16):
                        talking.remove(connection)
                except BlockingIOError:
                    continue
                except OSError:
                    talking.remove(connection)
            if talking:
                self._loop.pause(0.02)


def open_lanes(
    store: Store, rank: int, size: int, *, name: str, host: str, fabric: Fabric, wiring: Wiring, timeout_s: float
) -> Lanes:
    """Meet the other ranks and start. `fabric`: what is known before anything was measured; its leaves are the ranks'.

    Blocks until all ranks are there. Raises UsageError where they do not fit together, OSError for an address that
    cannot be listened at.
    """
    if len(fabric.leaf_of) != size or fabric.paths != wiring.paths:
        raise UsageError(
            f"the fabric has {len(fabric.leaf_of)} ranks and {fabric.paths} paths; "
            f"the group has {size}, and rank {rank} is wired to {wiring.paths}"
        )
    listening = listen(wiring.addresses)
    try:
        meeting = meet(
            store, rank, size, name=name, host=host, leaf=fabric.leaf_of[rank], wiring=wiring, listening=listening
        )
    except BaseException:
        for sock in listening:
            sock.close()
        raise
    return Lanes(meeting, wiring, fabric, store, listening, timeout_s)
