"""The parity level of a node: joins its images (`images.py`), the agents of other nodes (`peers/`) and `parity/`.

Trainers say who the other nodes are (`listen`, `join`); from then on sealed images are protected by their group, and
images of other nodes can be fetched. Methods run on the loop unless they say so; what waits for peers has threads.
"""

import contextlib
import logging
import secrets
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeVar

from resilient.checkpoint.agent.images import Images
from resilient.checkpoint.agent.loop import Loop
from resilient.checkpoint.agent.snapshots import PARITY, Progress, Snapshot, Snapshots, Tell
from resilient.checkpoint.peers.transport import Address, Message
from resilient.checkpoint.record import Record
from resilient.errors import LevelFailed, ResilientError
from resilient.policy import Policy, parse_bytes

if TYPE_CHECKING:
    from resilient.checkpoint.parity.service import ParityService
    from resilient.checkpoint.peers.tcp import TcpTransport

T = TypeVar("T")
Failed = Callable[[ResilientError], None]
_LOOP_S = 60.0

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Member:
    """A node of the job, and where its agent listened when the job began."""

    node: str
    address: Address


class Host(Protocol):
    """What the agent does for its parity level."""

    def announce(self, tells: Sequence[Tell]) -> None: ...
    def tell_all(self, event: Message) -> None: ...
    def settle(self) -> None: ...


class Protecting:
    """See the module. `agent_id` tells one agent of a node from the next."""

    def __init__(self, host: Host, loop: Loop, images: Images, snapshots: Snapshots) -> None:
        self.agent_id = secrets.token_hex(16)
        self._host = host
        self._loop = loop
        self._images = images
        self._snapshots = snapshots
        self._listening: tuple[str, str, str] | None = None  # node, token, host
        self._transport: TcpTransport | None = None
        self._service: ParityService | None = None
        self._addresses: dict[str, Address] = {}
        self._open: set[tuple[str, int]] = set()

    # --- who the others are

    @property
    def token(self) -> str | None:
        return self._listening[1] if self._listening is not None else None

    def listen(self, node: str, token: str, host: str, policy: Policy) -> Address:
        """Listen for peers at one address of this node. Safe to repeat. Raises UsageError."""
        if self._transport is None or self._listening != (node, token, host):
            self.close()
            # Imported late: an agent without peers needs neither numpy nor the time that it takes.
            from resilient.checkpoint.parity.service import ParityService
            from resilient.checkpoint.peers.pacing import Pace
            from resilient.checkpoint.peers.tcp import TcpTransport

            rate = None if policy.peer_bandwidth is None else parse_bytes(policy.peer_bandwidth)
            transport = TcpTransport(node, token, self, host=host, pace=Pace(rate))
            transport.start()
            scrub = None if policy.scrub_bandwidth is None else parse_bytes(policy.scrub_bandwidth)
            self._service = ParityService(
                node, self, transport, scrub_bytes_per_s=scrub, on_damage=lambda found: self._damaged(str(found))
            )
            self._transport, self._listening = transport, (node, token, host)
        return self._transport.address

    def join(
        self, members: Sequence[Member], groups: Sequence[Sequence[int]], m: int, budget_bytes: int | None = None
    ) -> None:
        """The nodes of the job, and those of them, by number, that make a group. The others hear where we listen.

        `budget_bytes`: for the parity that is kept here; None: what the machine has.
        """
        if self._transport is None or self._service is None or self._listening is None:
            raise LevelFailed("the agent does not listen for its peers yet")
        me = self._listening[0]
        self._addresses = {member.node: member.address for member in members if member.node != me}
        self._transport.set_peers(self._addresses)
        mine = next((group for group in groups if members and me in (members[at].node for at in group)), ())
        everybody = [member.node for member in members]
        self._service.configure([everybody[at] for at in mine], m if mine else 0, everybody, budget_bytes)
        self._tell_where_we_are(self._transport)

    def _tell_where_we_are(self, transport: "TcpTransport") -> None:
        """An agent that was started anew listens elsewhere than the others were told."""
        message: Message = {"op": "moved", "host": transport.address.host, "port": transport.address.port}

        def tell(peer: str) -> None:
            with contextlib.suppress(ResilientError):  # it is gone, or just starting: then it is told by its trainer
                transport.call(peer, message)

        for peer in self._addresses:
            threading.Thread(target=tell, args=(peer,), name=f"moved-{peer}", daemon=True).start()

    def _moved(self, peer: str, address: Address) -> None:
        if self._transport is not None and self._addresses.get(peer) not in (None, address):
            self._addresses[peer] = address
            self._transport.set_peers(self._addresses)

    # --- snapshots of this node

    def whole(self, snapshot: Snapshot, records: dict[int, Record]) -> None:
        """All images of this node are sealed: their parity may be made, if it is due."""
        if snapshot.progress.get(PARITY) is not Progress.DUE or not snapshot.node_ranks:
            return
        if self._service is None:
            self._failed(snapshot, "the agent has not been told of its peers")
        elif any(record.life != snapshot.life for record in records.values()):
            self._failed(snapshot, "its images are of different lives of the job")
        else:
            self._open.add((snapshot.life, snapshot.step))
            self._service.sealed(snapshot.life, snapshot.step, snapshot.world_size, records)

    def keep(self) -> None:
        """Whatever has changed: drop parity that is not needed any more."""
        if self._service is None:
            return
        wanted = self._snapshots.wanted_parity()
        for life, step in self._open - wanted:
            self._open.discard((life, step))
            self._service.dropped(life, step)
        self._service.keep(wanted)

    def _failed(self, snapshot: Snapshot, reason: str) -> None:
        log.warning("step %d has no parity: %s", snapshot.step, reason)
        self._host.announce(self._snapshots.fail(snapshot.key, PARITY, None, reason))

    # --- images of other nodes

    def recoverable(self, rank: int, reply: Callable[[list[int]], None], failed: Failed) -> None:
        """The steps at which other nodes have the image of a rank, whole or in parity; they are asked by a thread."""
        service = self._service
        if service is None:
            reply([])
            return
        self._in_thread(
            f"recoverable-{rank}",
            lambda: sorted({step for step, _ in service.recoverable([rank]).get(rank, ())}),
            reply,
            failed,
        )

    def images_of_others(
        self, world_size: int, reply: Callable[[list[tuple[int, int, int]]], None], failed: Failed
    ) -> None:
        """(step, world size, rank) of all images that can be had of jobs of another size; a thread asks the nodes."""
        service = self._service
        if service is None:
            reply([])
            return
        self._in_thread("images-of-others", lambda: service.images_of_others(world_size), reply, failed)

    def recover(
        self,
        rank: int,
        step: int,
        world_size: int | None,
        make_room: Callable[[int], tuple[int, memoryview]],
        reply: Callable[[int, Record], None],
        failed: Callable[[int, ResilientError], None],
    ) -> None:
        """Fetch an image from other nodes. `make_room(bytes)` gives a slot and its memory.

        Then `reply(slot, record)`, or `failed(slot, error)`, where 0 means that no slot was made. All on the loop.
        """
        service = self._service
        if service is None:
            failed(0, LevelFailed("the agent has not been told of its peers"))
            return
        made: list[tuple[int, memoryview]] = []

        def room(nbytes: int) -> memoryview:
            if not made or made[-1][1].nbytes < nbytes:
                made.append(self._on_loop(lambda: make_room(nbytes)))
            return made[-1][1][:nbytes]

        self._in_thread(
            f"recover-{rank}",
            lambda: service.recover(rank, step, room, world_size=world_size),
            lambda record: reply(made[-1][0], record),
            lambda error: failed(made[-1][0] if made else 0, error),
        )

    def _in_thread(self, name: str, work: Callable[[], T], done: Callable[[T], None], failed: Failed) -> None:
        def run() -> None:
            try:
                result = work()
            except Exception as error:  # a trainer waits for the answer, whatever went wrong
                told = error if isinstance(error, ResilientError) else LevelFailed(f"{name}: {error!r}")
                if told is not error:
                    log.exception("%s", name)
                self._loop.post(lambda: failed(told))
            else:
                self._loop.post(lambda: done(result))

        threading.Thread(target=run, name=name, daemon=True).start()

    def _on_loop(self, call: Callable[[], T]) -> T:
        """The result of a call that is made on the loop. From other threads; blocks."""
        future: Future[T] = Future()

        def run() -> None:
            try:
                future.set_result(call())
            except BaseException as error:  # whatever it is: a thread waits for it, and would wait for ever
                future.set_exception(error)

        self._loop.post(run)
        try:
            return future.result(_LOOP_S)
        except TimeoutError as error:
            raise LevelFailed(f"the agent did not answer itself within {_LOOP_S:g} s: it is ending") from error

    # --- Served: what peers ask; any thread

    def answer(self, peer: str, message: Message) -> Message:
        if message.get("op") == "moved":
            address = Address(str(message.get("host")), int(message.get("port", 0)))
            self._loop.post(lambda: self._moved(peer, address))
            return {}
        return self._served().answer(peer, message)

    def lend(self, peer: str, name: str, offset: int, nbytes: int) -> AbstractContextManager[memoryview]:
        return self._served().lend(peer, name, offset, nbytes)

    def take(self, peer: str, name: str, offset: int, nbytes: int) -> AbstractContextManager[memoryview]:
        return self._served().take(peer, name, offset, nbytes)

    def _served(self) -> "ParityService":
        service = self._service
        if service is None:
            raise LevelFailed("this agent is just starting, or ending")
        return service

    # --- what the parity service needs; any thread, but for `on_parity`

    def lend_image(self, life: str, step: int, rank: int) -> AbstractContextManager[memoryview]:
        return self._images.shelf.lend(life, step, rank)

    def mend_image(self, life: str, step: int, rank: int, offset: int, block: memoryview) -> None:
        with self._images.shelf.lend(life, step, rank) as image:
            image[offset : offset + len(block)] = block

    def inventory(self) -> list[Record]:
        return self._images.shelf.records()

    def post(self, call: Callable[[], None]) -> None:
        self._loop.post(call)

    def on_parity(self, life: str, step: int, error: str | None) -> None:
        self._open.discard((life, step))
        for snapshot in self._snapshots.all():
            if (snapshot.life, snapshot.step) != (life, step) or PARITY not in snapshot.progress:
                continue
            if error is not None:
                self._failed(snapshot, error)
            else:
                for rank in snapshot.node_ranks:
                    self._host.announce(self._snapshots.arrive(snapshot.key, PARITY, rank))
        self._host.settle()

    def _damaged(self, what: str) -> None:
        """The scrub found something, and logged it. Any thread."""
        self._loop.post(lambda: self._host.tell_all({"event": "damage", "what": what}))

    # --- the end

    def status(self) -> Message | None:
        return None if self._service is None else self._service.status()

    def close(self) -> None:
        """Stop serving peers. What they were told of this agent does not hold any more."""
        transport, service = self._transport, self._service
        self._transport = self._service = self._listening = None
        if transport is not None:
            threading.Thread(target=transport.close, name="peers-close", daemon=True).start()
        if service is not None:
            service.close()
