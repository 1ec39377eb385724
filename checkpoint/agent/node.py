"""What trainers may ask of the agent, and what it tells them. All of it runs on the loop; nothing waits.

Requests get a reply, the others none:

    hello     first of all; shows the token, says who it is      plan      buffers for images of a plan
    begin, filled, seal, abort   (no reply) one image            complete, failed   (no reply) what the leader heard
    images, map, unmap           reading sealed images           scratch, adopt, release   loading images
    token, listen, join          the agents of other nodes       recoverable, others, recover   images that those have
    restored  the image that the rank goes on from; its others are not needed
    write     a sealed image to the durable level, after all     flush     wait for this rank's writes
    status    what the agent holds and uses
    bye       a clean end: with keep = false from all ranks of the node the agent may end too

Events: sealed {step, rank} · complete {level, step} · failed {level, step, rank, error} · free {slot} · slot {slot,
capacity} with a descriptor · damage {what}, which the scrub found · node {level, step, life}, to the leader alone:
talk to the other nodes, then answer.
The life of the process is in `server.py`, frames in `protocol.py`, images in `images.py`, levels in `writing.py`.
"""

import hmac
import logging
import os
from collections.abc import Callable, Sequence
from typing import Any

from resilient.checkpoint.agent.claiming import Tenant, Tenure
from resilient.checkpoint.agent.images import Images
from resilient.checkpoint.agent.loop import Loop
from resilient.checkpoint.agent.other_nodes import NOTHING, Answer, OtherNodes, rank_of
from resilient.checkpoint.agent.pool import Plan
from resilient.checkpoint.agent.protecting import Protecting
from resilient.checkpoint.agent.protocol import (
    PROTOCOL,
    Message,
    ProtocolError,
    error_reply,
    text,
    texts,
    whole,
    wholes,
)
from resilient.checkpoint.agent.session import Session
from resilient.checkpoint.agent.slots import Slot
from resilient.checkpoint.agent.snapshots import (
    ALL,
    DURABLE,
    LEADER,
    LEVELS,
    LOCAL,
    PARITY,
    Progress,
    Snapshot,
    Snapshots,
    Tell,
)
from resilient.checkpoint.agent.status import status_of
from resilient.checkpoint.agent.writing import OpenStore, Stores, Writing
from resilient.checkpoint.record import Record
from resilient.errors import ResilientError, UrlInUse, UsageError
from resilient.policy import Policy

log = logging.getLogger(__name__)


class Node:
    """The ranks of this node and what is held for them."""

    def __init__(self, loop: Loop, clock: Callable[[], float], open_store: OpenStore, token: str) -> None:
        self.run_id = ""
        self.policy: Policy | None = None
        self.by_rank: dict[int, Session] = {}
        self.snapshots = Snapshots()
        self.images = Images(self, loop, self.snapshots)
        self._stores = Stores(open_store)
        self.writing = Writing(loop, clock, self._stores, self.snapshots, self.images, self.announce, self.settle)
        self.protecting = Protecting(self, loop, self.images, self.snapshots)
        self.tenure = Tenure(loop, self._stores, lambda reason: self.writing.refuse(DURABLE, reason))
        self._token = token
        self._url: str | None = None
        self._byes: set[int] = set()
        self._flushing: list[tuple[Session, int]] = []
        self._operations: dict[str, Callable[[Session, Message], Answer | None]] = {
            "plan": self._plan,
            "begin": self._begin,
            "filled": self._filled,
            "seal": self._seal,
            "abort": self._abort,
            "complete": self._complete,
            "failed": self._failed,
            "images": lambda _session, _message: (self.images.listing(), []),
            "map": self._map,
            "unmap": self._unmap,
            "scratch": self._scratch,
            "adopt": self._adopt,
            "release": self._release,
            "restored": self._restored,
            **OtherNodes(self).operations(),
            "write": self._write,
            "flush": self._flush,
            "status": lambda _session, _message: (status_of(self), []),
            "bye": self._bye,
        }

    # --- connections

    @property
    def is_busy(self) -> bool:
        """Whether something is still being digested, written or deleted."""
        return self.writing.pending() > 0 or self.images.sealing()

    @property
    def is_dismissed(self) -> bool:
        """Whether all trainers of the node have ended cleanly and want nothing kept."""
        return bool(self._byes) and self._byes == self.snapshots.node_ranks and not self.by_rank

    def on_message(self, session: Session, message: Message) -> None:
        """Do what one message asks. Raises ProtocolError, upon which the connection is closed."""
        operation, request_id = message.get("op"), message.get("id")
        if request_id is not None and type(request_id) is not int:
            raise ProtocolError(f"id = {request_id!r}")
        try:
            answer = self._answer(session, operation, message)
        except ResilientError as error:
            if request_id is None:
                raise ProtocolError(f"{operation}: {error}") from error
            session.send(error_reply(request_id, error))
            if session.rank is None:
                session.close(f"it was refused: {error}")
            return
        if request_id is not None and answer is not None:
            reply, fds = answer
            session.send({**reply, "id": request_id, "ok": True}, fds)
        if operation == "map" and answer is not None:
            os.close(answer[1][0])
        if operation != "filled":
            self.settle()

    def on_closed(self, session: Session, reason: str) -> None:
        self._flushing = [each for each in self._flushing if each[0] is not session]
        self.tenure.forget(session)
        rank = session.rank
        log.info("rank %s (process %d) is gone: %s", rank, session.pid, reason)
        if rank is not None and self.by_rank.get(rank) is session:
            led = min(self.by_rank) == rank
            del self.by_rank[rank]
            self.tenure.tell(rank_0=0 in self.by_rank)
            self.images.leave(rank, session.number)
            if led:
                self.announce(self.snapshots.unanswered())
            self.settle()

    # --- what the images and the writers need

    def announce(self, tells: Sequence[Tell]) -> None:
        """Send events to whom they are for, and do what follows from them."""
        if tells:
            self.writing.cancel_failed()  # before anybody hears of it
        for to, event in tells:
            if to == ALL:
                self.tell_all(event)
            elif to == LEADER and self.by_rank:
                self.by_rank[min(self.by_rank)].send(event)
            else:
                self.send(to, event)
            if event["event"] == "complete" and event["level"] == DURABLE:
                self.writing.index(event["step"])
            if event["event"] == "complete" and event["level"] in (LOCAL, DURABLE):
                self.writing.retain(event["level"], event["step"])

    def tell_all(self, event: Message) -> None:
        for session in list(self.by_rank.values()):
            session.send(event)

    def send(self, rank: int, message: Message, fds: Sequence[int] = ()) -> None:
        if session := self.by_rank.get(rank):
            session.send(message, fds)

    def on_sealed(self, slot: Slot, record: Record, levels: Sequence[str]) -> None:
        if PARITY in levels and slot.snapshot is not None:
            self.announce(self.snapshots.due(slot.snapshot.key, PARITY))
        self.writing.write(slot, record, levels)

    def on_whole(self, snapshot: Snapshot, records: dict[int, Record]) -> None:
        self.protecting.whole(snapshot, records)

    def settle(self) -> None:
        """What may follow from any change: slots are free, flushes are over, the URL is not needed."""
        self.images.recycle()
        self.protecting.keep()
        self._give_url_back()
        for session, request_id in list(self._flushing):
            assert session.rank is not None
            if not self.images.sealing(session.rank) and not self.writing.pending(session.rank):
                self._flushing.remove((session, request_id))
                failures = self.writing.take_failures(session.rank)
                session.send({"id": request_id, "ok": True, "failures": failures})

    # --- hello

    def _answer(self, session: Session, operation: Any, message: Message) -> Answer | None:
        if operation == "hello" and session.rank is None:
            return self._hello(session, message)
        if session.rank is None:
            raise ProtocolError("it did not say hello")
        if not isinstance(operation, str) or operation not in self._operations:
            raise ProtocolError(f"there is no operation {operation!r}")
        return self._operations[operation](session, message)

    def _hello(self, session: Session, message: Message) -> Answer | None:
        """A trainer introduces itself. The answer waits until the URL is claimed, where that is to be done."""
        if not hmac.compare_digest(text(message, "token").encode(), self._token.encode()):
            raise UsageError("the token is wrong; it stands in the file `token` beside the agent's socket")
        if message.get("protocol") != PROTOCOL:
            raise UsageError(
                f"the agent of this run (process {os.getpid()}) has protocol {PROTOCOL}, this program has "
                f"{message.get('protocol')!r}: two versions of the library; end that process, then start again"
            )
        rank, world_size, ranks = (
            whole(message, "rank"),
            whole(message, "world_size"),
            frozenset(wholes(message, "node_ranks")),
        )
        if rank not in ranks or max(ranks) >= world_size:
            raise UsageError(f"rank {rank} of {world_size} does not fit this node's ranks {sorted(ranks)}")
        policy_keys = message.get("policy")
        policy = Policy.from_mapping(policy_keys if isinstance(policy_keys, dict) else {}, f"the policy of rank {rank}")
        run_id, launch = self._check_run(message), message.get("launch")
        if launch is not None and not isinstance(launch, str):
            raise ProtocolError("launch is not text")
        self._check_nobody_else(session, rank, world_size, ranks)
        reads = message.get("reads") is True
        self._enter(session, rank, world_size, ranks, (reads and self.policy) or policy)
        self.tenure.tell(rank_0=0 in self.by_rank)
        if rank == 0 and self._url is not None and not self.tenure.is_held and not reads:
            self.tenure.take_for(session, whole(message, "id"), Tenant(self._url, run_id, launch, policy.retries))
            return None
        return {"pid": os.getpid()}, []

    def _check_run(self, message: Message) -> str:
        run_id, url = text(message, "run_id"), message.get("url")
        if url is not None and not isinstance(url, str):
            raise ProtocolError("url is not text")
        if not self.run_id:
            self.run_id, self._url = run_id, url
        if (run_id, url) != (self.run_id, self._url):
            raise UrlInUse(f"this agent serves run {self.run_id!r} at {self._url}, not run {run_id!r} at {url}")
        return run_id

    def _check_nobody_else(self, session: Session, rank: int, world_size: int, ranks: frozenset[int]) -> None:
        """No other living process may serve the rank, or belong to a world of another size."""
        same_world = (world_size, ranks) == (self.snapshots.world_size, self.snapshots.node_ranks)
        for other_rank, other in list(self.by_rank.items()):
            if same_world and other_rank != rank:
                continue
            if other.pid == session.pid:
                other.close("its process connected again")
            elif not other.end_if_dead():
                what = f"rank {rank}" if same_world else f"rank {other_rank} of a world of {self.snapshots.world_size}"
                raise UrlInUse(
                    f"{what} is served by another living process, {other.pid}: a second job with the same run id and "
                    f"URL; end that process, or give this job its own URL or run_id"
                )

    def _enter(self, session: Session, rank: int, world_size: int, ranks: frozenset[int], policy: Policy) -> None:
        if (world_size, ranks) != (self.snapshots.world_size, self.snapshots.node_ranks):
            self._byes.clear()
        self._byes.discard(rank)
        self.policy = policy
        self.snapshots.set_world(world_size, ranks)
        self.writing.configure(policy, self._url, ranks)
        session.trust()
        session.rank = rank
        self.by_rank[rank] = session
        self.announce(self.snapshots.greet({each.number for each in self.by_rank.values()}))
        if rank == min(ranks):  # what the leaders of an earlier life may not have told one another any more
            self.announce(self.snapshots.unanswered())
        log.info("rank %d of %d is process %d", rank, world_size, session.pid)

    def _give_url_back(self) -> None:
        """Without trainers and with nothing to write, another job may have the URL; rank 0 claims it again."""
        # An index that is still being written belongs to a snapshot that is complete: another job does not wait for it.
        busy = self.writing.pending() > self.writing.indexing or self.images.sealing()
        if not (self.by_rank or busy or self.is_dismissed):
            self.tenure.give_back()

    # --- one image

    def _plan(self, session: Session, message: Message) -> Answer:
        software = message.get("software")
        plan = Plan(
            plan_digest=text(message, "plan_digest"),
            capacity=whole(message, "capacity"),
            slots=whole(message, "slots"),
            budget_bytes=whole(message, "budget_bytes"),
            pieces_text=text(message, "pieces_text"),
            software={str(key): str(value) for key, value in software.items()} if isinstance(software, dict) else {},
            life=text(message, "life"),
        )
        return self.images.plan(rank_of(session), plan)

    def _begin(self, session: Session, message: Message) -> Answer:
        self.images.begin(rank_of(session), session.number, whole(message, "slot"), whole(message, "step"))
        return NOTHING

    def _filled(self, session: Session, message: Message) -> Answer:
        self.images.filled(rank_of(session), whole(message, "slot"), whole(message, "step"), whole(message, "upto"))
        return NOTHING

    def _seal(self, session: Session, message: Message) -> Answer:
        slot, step = whole(message, "slot"), whole(message, "step")
        self.images.seal(rank_of(session), slot, step, whole(message, "image_bytes"), texts(message, "levels"))
        return NOTHING

    def _abort(self, session: Session, message: Message) -> Answer:
        self.images.abort(rank_of(session), whole(message, "slot"), text(message, "reason"))
        return NOTHING

    def _complete(self, session: Session, message: Message) -> Answer:
        self.announce(self.snapshots.complete(_level(message), whole(message, "step"), message.get("life")))
        return NOTHING

    def _failed(self, session: Session, message: Message) -> Answer:
        level, step = _level(message), whole(message, "step")
        rank = None if message.get("rank") is None else whole(message, "rank")  # of no single rank, say: of a group
        self.announce(self.snapshots.fail_step(level, step, rank, text(message, "reason")))
        return NOTHING

    # --- reading and loading

    def _map(self, session: Session, message: Message) -> Answer:
        world_size = whole(message, "world_size") if message.get("world_size") is not None else None
        slot = whole(message, "slot") if message.get("slot") is not None else None
        return self.images.map(session.number, whole(message, "rank"), whole(message, "step"), world_size, slot)

    def _unmap(self, session: Session, message: Message) -> Answer:
        self.images.unmap(session.number, whole(message, "slot"))
        return NOTHING

    def _scratch(self, session: Session, message: Message) -> Answer:
        taken = whole(message, "taken") if message.get("taken") is not None else None
        image_bytes, budget_bytes = whole(message, "image_bytes"), whole(message, "budget_bytes")
        return self.images.scratch(rank_of(session), image_bytes, budget_bytes, taken)

    def _adopt(self, session: Session, message: Message) -> Answer:
        self.images.adopt(rank_of(session), whole(message, "slot"), whole(message, "step"), text(message, "record"))
        return NOTHING

    def _release(self, session: Session, message: Message) -> Answer:
        self.images.release(rank_of(session), whole(message, "slot"))
        return NOTHING

    def _restored(self, session: Session, message: Message) -> Answer:
        self.images.restored(rank_of(session), whole(message, "slot"))
        return NOTHING

    # --- the rest

    def _write(self, session: Session, message: Message) -> Answer:
        rank, step = rank_of(session), whole(message, "step")
        slot, record = self.images.sealed_image(rank, step)
        snapshot = slot.snapshot
        assert snapshot is not None
        if snapshot.progress.get(DURABLE) is Progress.FAILED:
            raise UsageError(f"step {step} could not be made durable when it was due")
        if snapshot.is_complete(DURABLE):  # it was due, and has been told of: whoever asks now waits for it again
            self.send(rank, {"event": "complete", "level": DURABLE, "step": step})
        elif not self.writing.has(snapshot, rank, DURABLE):
            self.writing.write(slot, record, (DURABLE,))
        return NOTHING

    def _flush(self, session: Session, message: Message) -> None:
        self._flushing.append((session, whole(message, "id")))

    def _bye(self, session: Session, message: Message) -> Answer:
        if message.get("keep") is False:
            self._byes.add(rank_of(session))
        return NOTHING


def _level(message: Message) -> str:
    level = text(message, "level")
    if level not in LEVELS:
        raise ProtocolError(f"there is no level {level!r}")
    return level
