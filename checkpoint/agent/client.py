"""The trainer's side of the agent: buffers to fill, events, images to read. Thread-safe; never imports torch.

A daemon thread listens: it completes requests, feeds the list of free slots and calls `on_event`. What a training
thread calls for each step (`take_free_slot(0)`, `begin`, `filled`, `seal`) makes no round trip. When the agent dies,
everything that waits raises AgentLost at once; connect again, which starts another agent.
"""

import contextlib
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self
from weakref import WeakSet, WeakValueDictionary

from resilient.checkpoint.agent.address import Address, address_of
from resilient.checkpoint.agent.buffers import MappedImage, Slot
from resilient.checkpoint.agent.connection import SEND_S, Connection, dial
from resilient.checkpoint.agent.memory import prefault
from resilient.checkpoint.agent.protocol import PROTOCOL, Message
from resilient.checkpoint.agent.start import POLL_S, start_agent
from resilient.checkpoint.record import Record, parse_record
from resilient.errors import AgentLost, LevelFailed, OverBudget, ResilientError
from resilient.policy import Policy

PEERS_S = 60.0  # for the agents of other nodes to answer, or to be given up
CLAIM_S = 75.0  # a claim that another host left behind has to go stale first

log = logging.getLogger(__name__)

_connected: "WeakSet[AgentClient]" = WeakSet()

__all__ = ["AgentClient", "Hello", "ImageInfo", "MappedImage", "Slot"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    """Who a trainer is. `node_ranks` are all ranks on this node; `node` stands in for the host name; `launch` is the
    start of the job, the same in all its lives, where a launcher knows it. `reads`: it will only read: it claims
    nothing, and the agent keeps the policy that it has.
    """

    run_id: str
    url: str | None
    rank: int
    world_size: int
    node_ranks: tuple[int, ...]
    policy: Policy
    node: str | None = None
    launch: str | None = None
    reads: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageInfo:
    """A sealed image in the node's memory. `complete`: the snapshot is known to be complete on all nodes."""

    rank: int
    step: int
    world_size: int
    plan_digest: str
    image_bytes: int
    complete: bool


class AgentClient:
    """A connection to the node's agent. Made by `connect`. All methods may be called from any thread."""

    def __init__(
        self,
        address: Address,
        hello: Hello,
        on_event: Callable[[Message], None],
        on_lost: Callable[[AgentLost], None],
    ) -> None:
        self.hello = hello
        self._address = address
        self._on_event = on_event
        self._on_lost = on_lost
        self._changed = threading.Condition()
        self._slots: dict[int, Slot] = {}
        self._free: deque[int] = deque()
        self._mappings: WeakValueDictionary[int, Slot] = WeakValueDictionary()
        self._prefaulting: list[threading.Thread] = []
        self._unmapping = threading.Event()
        self._connection: Connection
        self._greeted = False

    @classmethod
    def connect(
        cls,
        hello: Hello,
        on_event: Callable[[Message], None],
        on_lost: Callable[[AgentLost], None],
        timeout_s: float = 30.0,
    ) -> Self:
        """A connection to the agent of this run and node, which is started if there is none. Blocks.

        `on_event(event)` and `on_lost(error)` are called on the listening thread, the first perhaps before this
        returns; they must not make requests. Rank 0 may have to wait up to a minute longer for a claim on the URL that
        was left behind. Raises UrlInUse for a second job, UsageError, LevelFailed when no agent could be started.
        """
        address = address_of(hello.run_id, hello.url, hello.node)
        deadline = time.monotonic() + timeout_s
        while True:
            client = cls(address, hello, on_event, on_lost)
            try:
                if client._open(deadline):
                    _connected.add(client)
                    return client
                reason = "nobody listens"
            except AgentLost as error:  # it was just ending, or was killed: another one is started
                reason = str(error)
            if time.monotonic() > deadline:
                raise LevelFailed(f"no agent serves in {address.folder} ({reason}); see {address.log}")
            time.sleep(POLL_S)

    @classmethod
    def of_this_process(cls, address: Address) -> "AgentClient | None":
        """The client by which this process is connected there already: a second one of the rank would end it."""
        mine = (one for one in list(_connected) if one._address == address and one._connection.is_ours)
        return next((one for one in mine if not one.lost), None)

    @property
    def lost(self) -> bool:
        return self._connection.error is not None

    # --- saving

    def register_plan(
        self,
        *,
        plan_digest: str,
        capacity: int,
        slots: int,
        budget_bytes: int,
        pieces_text: str,
        software: dict[str, str],
        life: str = "",
    ) -> list[Slot]:
        """The buffers for images of a plan, of which those without a needed image are free to take. Blocks.

        While older images fill the budget there are fewer at first. Slots of an earlier plan that are not among them
        must not be begun any more; give back what was taken before. Raises OverBudget, AgentLost.
        """
        try:
            planned: list[Slot] = self._connection.request(
                "plan",
                take=self._take_plan,
                plan_digest=plan_digest,
                capacity=capacity,
                slots=slots,
                budget_bytes=budget_bytes,
                pieces_text=pieces_text,
                software=software,
                life=life,
            )
        except OverBudget:
            with self._changed:  # the earlier plan does not hold any more
                self._slots, self._free = {}, deque()
            raise
        return planned

    def take_free_slot(self, timeout_s: float) -> Slot | None:
        """A slot that may be filled; None if none came free in time. 0 does not wait. Raises AgentLost."""
        with self._changed:
            self._changed.wait_for(lambda: self._free or self.lost, timeout_s)
            self._connection.check()
            return self._slots[self._free.popleft()] if self._free else None

    def begin(self, slot: Slot, step: int) -> None:
        """The slot is being filled with the image of a step. This and the next three do not wait; raise AgentLost."""
        self._connection.send("begin", slot=slot.id, step=step)

    def filled(self, slot: Slot, step: int, upto: int) -> None:
        """All bytes of the image before `upto` are final."""
        self._connection.send("filled", slot=slot.id, step=step, upto=upto)

    def seal(self, slot: Slot, step: int, image_bytes: int, levels: Sequence[str]) -> None:
        """All bytes are final. `levels`: which of "local" and "durable" it is to be written to as well."""
        self._connection.send("seal", slot=slot.id, step=step, image_bytes=image_bytes, levels=list(levels))

    def abort(self, slot: Slot, step: int, reason: str) -> None:
        """Give the image up; the slot is free again. A slot that was only taken is given back."""
        self._connection.send("abort", slot=slot.id, step=step, reason=reason)

    def complete(self, level: str, step: int, life: str | None = None) -> None:
        """The leader's answer to a `node` event: every node has it."""
        self._connection.send("complete", level=level, step=step, life=life)

    def failed(self, level: str, step: int, rank: int | None, reason: str) -> None:
        """A step cannot become complete at a level; for memory also before any slot was begun for it.

        `rank`: whose fault it is; None where it is no single rank's.
        """
        self._connection.send("failed", level=level, step=step, rank=rank, reason=reason)

    def make_durable(self, step: int) -> None:
        """Have this rank's sealed image written to the durable level, where it was not due. Blocks until it is begun.

        Raises LevelFailed when the image is not in memory.
        """
        self._connection.request("write", step=step)

    def flush(self, timeout_s: float) -> list[str]:
        """Wait until none of this rank's writes is pending; what failed since the last flush. Raises LevelFailed."""
        try:
            reply = self._connection.request("flush", within_s=timeout_s)
        except TimeoutError as error:
            who = f"rank {self.hello.rank}"
            raise LevelFailed(f"{who}: images are still being written after {timeout_s:g} s") from error
        return [str(failure) for failure in reply["failures"]]

    # --- reading and loading

    def images(self) -> list[ImageInfo]:
        """The sealed images in this node's memory. Blocks. Raises AgentLost."""
        reply = self._connection.request("images")
        return [ImageInfo(**image) for image in reply["images"]]

    def map_image(self, rank: int, step: int, world_size: int | None = None, slot_id: int | None = None) -> MappedImage:
        """A sealed image, to read; with `slot_id` the one in that slot, where there are several of the step.

        It is not recycled before it is closed. Raises LevelFailed if it is not there.
        """
        where = f"the record of rank {rank} at step {step} in memory"

        def take(reply: Message, fds: list[int]) -> MappedImage:
            slot = reply["slot"]
            return MappedImage(parse_record(reply["record"], where), slot, fds[0], lambda: self._unmap(slot))

        wanted = {"rank": rank, "step": step, "world_size": world_size, "slot": slot_id}
        image: MappedImage = self._connection.request("map", take=take, **wanted)
        return image

    def scratch(self, image_bytes: int, budget_bytes: int) -> Slot:
        """A slot to read an image into; then `adopt` or `release` it. Blocks. Raises OverBudget, AgentLost."""
        taken = self._take_fitting(image_bytes)
        try:
            slot: Slot = self._connection.request(
                "scratch",
                take=lambda reply, fds: self._mapped(reply, fds[0]),
                image_bytes=image_bytes,
                budget_bytes=budget_bytes,
                taken=taken.id if taken else None,
            )
        except ResilientError:
            if taken is not None:
                self._put_back(taken.id)
            raise
        return slot

    def adopt(self, slot_id: int, step: int, record: Record) -> None:
        """Let other ranks map the image that was read, and verified, into a slot. Blocks."""
        self._connection.request("adopt", slot=slot_id, step=step, record=record.text())

    def release(self, slot_id: int) -> None:
        """The image in a scratch slot, or one that was recovered, is not needed any more. Blocks."""
        self._connection.request("release", slot=slot_id)

    def restored(self, slot_id: int) -> None:
        """The training goes on from the image in this slot: the rank's other images are not needed any more. Blocks."""
        self._connection.request("restored", slot=slot_id)

    # --- other nodes

    def token(self) -> str | None:
        """The secret that this agent shares with its peers already; None while it has none. Blocks."""
        return self._connection.request("token")["token"]  # type: ignore[no-any-return]

    def listen(self, node: str, token: str, host: str) -> tuple[str, int]:
        """Have the agent listen for its peers at an address of this node; where it does. Blocks. Raises LevelFailed."""
        reply = self._connection.request("listen", node=node, token=token, host=host)
        return reply["host"], reply["port"]

    def join(
        self,
        members: Sequence[tuple[str, str, int]],
        groups: Sequence[Sequence[int]],
        m: int,
        budget_bytes: int | None = None,
    ) -> None:
        """Tell the agent of all nodes, (name, host, port), and which of them make a parity group. Blocks.

        `budget_bytes`: what parity may take of this node's memory; None: what there is.
        """
        told = [{"node": node, "host": host, "port": port} for node, host, port in members]
        numbers = [list(group) for group in groups]
        self._connection.request("join", members=told, groups=numbers, m=m, budget_bytes=budget_bytes)

    def recoverable(self) -> list[int]:
        """Steps at which this rank's image can be had from other nodes' memory, whole or from parity. Blocks."""
        steps: list[int] = self._connection.request("recoverable", within_s=PEERS_S)["steps"]
        return steps

    def images_of_others(self, world_size: int) -> list[tuple[int, int, int]]:
        """(step, world size, rank) of all images that other nodes have, whole or in parity, of jobs of another size
        than `world_size`. Blocks."""
        reply = self._connection.request("others", within_s=PEERS_S, world_size=world_size)
        return [(step, size, rank) for step, size, rank in reply["images"]]

    def recover(self, step: int, within_s: float, rank: int | None = None, world_size: int | None = None) -> int:
        """Have the agent fetch this rank's image from other nodes, and verify it; the slot that holds it then. Blocks.

        With `rank` and `world_size` that of a rank of a job of another size.
        `release` it if it is not used. Raises LevelFailed or RestoreError where too little of it is left, DamagedImage,
        OverBudget.
        """
        try:
            reply = self._connection.request(
                "recover", within_s=within_s, step=step, image_rank=rank, world_size=world_size
            )
        except TimeoutError as error:
            raise LevelFailed(str(error)) from error
        slot: int = reply["slot"]
        return slot

    # --- the rest

    def status(self) -> dict[str, Any]:
        """What the agent holds and uses: slots, bytes, images, jobs, threads, fds, pid. Blocks."""
        status: dict[str, Any] = self._connection.request("status")
        return status

    def close(self, keep: bool) -> None:
        """End cleanly and unmap. `keep` = False from all ranks of the node ends the agent, after pending writes.

        Release views of slots and images first. Safe to repeat, and when the agent is lost. A forked child's call does
        nothing: the connection is its parent's.
        """
        if not self._connection.is_ours:
            return
        _connected.discard(self)
        with contextlib.suppress(ResilientError, TimeoutError):
            self._connection.request("bye", keep=keep, within_s=SEND_S)
        self._connection.hang_up()
        with self._changed:
            slots, self._slots = list(self._mappings.values()), {}
            self._free.clear()
            self._changed.notify_all()
        self._unmapping.set()
        for thread in self._prefaulting:
            thread.join()
        for slot in slots:
            slot.close()

    # --- inside

    def _open(self, deadline: float) -> bool:
        """Find or start an agent and say hello; False if none listens yet. Raises AgentLost when it goes away."""
        sock = dial(self._address.socket)
        if sock is None:
            start_agent(self._address, lambda: _answers(self._address), deadline)
            sock = dial(self._address.socket)
            if sock is None:
                return False
        self._connection = Connection(sock, f"rank {self.hello.rank}", self._take_event, self._lose)
        self._connection.start()
        try:
            self._greet(deadline)
        except BaseException:
            self._connection.hang_up()
            raise
        self._greeted = True
        self._connection.check()
        return True

    def _greet(self, deadline: float) -> None:
        hello = self.hello
        claims = hello.rank == 0 and hello.url is not None and not hello.reads
        patience_s = max(1.0, deadline - time.monotonic()) + (CLAIM_S if claims else 0.0)
        try:
            self._connection.request(
                "hello",
                within_s=patience_s,
                token=_read_token(self._address),
                protocol=PROTOCOL,
                run_id=hello.run_id,
                url=hello.url,
                launch=hello.launch,
                reads=hello.reads,
                rank=hello.rank,
                world_size=hello.world_size,
                node_ranks=list(hello.node_ranks),
                pid=os.getpid(),
                policy=asdict(hello.policy),
            )
        except TimeoutError as error:
            raise LevelFailed(f"{error}; see {self._address.log}") from error

    # --- on the listening thread

    def _lose(self, error: AgentLost) -> None:
        with self._changed:
            self._changed.notify_all()
        if self._greeted:
            self._on_lost(error)

    def _take_event(self, message: Message, fds: list[int]) -> None:
        if message["event"] == "slot":
            slot = self._mapped(message, fds[0])
            with self._changed:
                self._slots[slot.id] = slot
            self._put_back(slot.id)
        elif message["event"] == "free":
            self._put_back(message["slot"])
        else:
            try:
                self._on_event(message)
            except Exception:  # the caller's mistake in one event must not end the thread that hears of all others
                log.exception("handling the event %s failed", message)

    def _take_plan(self, reply: Message, fds: list[int]) -> list[Slot]:
        slots = [self._mapped(listed, fd) for listed, fd in zip(reply["slots"], fds, strict=True)]
        with self._changed:
            self._slots = {slot.id: slot for slot in slots}
            self._free = deque(listed["slot"] for listed in reply["slots"] if listed["free"])
            self._changed.notify_all()
        return slots

    def _mapped(self, listed: Message, fd: int) -> Slot:
        """The slot that a message speaks of; a new one's pages are made present in the background."""
        known = self._mappings.get(listed["slot"])
        if known is not None:
            os.close(fd)
            return known
        slot = Slot(listed["slot"], listed["capacity"], fd)
        self._mappings[slot.id] = slot
        thread = threading.Thread(
            target=prefault, args=(slot.view, self._unmapping.is_set), name="resilient-prefault", daemon=True
        )
        thread.start()
        self._prefaulting = [each for each in self._prefaulting if each.is_alive()] + [thread]
        return slot

    def _put_back(self, slot_id: int) -> None:
        with self._changed:
            if slot_id in self._slots and slot_id not in self._free:
                self._free.append(slot_id)
                self._changed.notify_all()

    def _unmap(self, slot_id: int) -> None:
        with contextlib.suppress(AgentLost):
            self._connection.send("unmap", slot=slot_id)

    def _take_fitting(self, image_bytes: int) -> Slot | None:
        """A free slot with room for an image, for another use than saving."""
        with self._changed:
            for slot_id in self._free:
                if self._slots[slot_id].capacity >= image_bytes:
                    self._free.remove(slot_id)
                    return self._slots[slot_id]
        return None


def _answers(address: Address) -> bool:
    sock = dial(address.socket)
    if sock is None:
        return False
    sock.close()
    return True


def _read_token(address: Address) -> str:
    try:
        return address.token.read_text()
    except FileNotFoundError:
        raise AgentLost(f"the agent in {address.folder} has just ended") from None
