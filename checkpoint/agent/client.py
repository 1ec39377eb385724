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
from typing import Self
from weakref import WeakSet, WeakValueDictionary

from resilient.checkpoint.agent.address import Address, address_of
from resilient.checkpoint.agent.asking import Asking, ImageInfo
from resilient.checkpoint.agent.buffers import MappedImage, Slot
from resilient.checkpoint.agent.connection import SEND_S, Connection, dial
from resilient.checkpoint.agent.memory import prefault
from resilient.checkpoint.agent.protocol import PROTOCOL, Message
from resilient.checkpoint.agent.start import POLL_S, start_agent
from resilient.errors import AgentLost, LevelFailed, OverBudget, ResilientError
from resilient.policy import Policy

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


class AgentClient(Asking):
    """A connection to the node's agent. Made by `connect`. All methods may be called from any thread."""

    def __init__(
        self,
        address: Address,
        hello: Hello,
        on_event: Callable[[Message], None],
        on_lost: Callable[[AgentLost], None],
    ) -> None:
        self.hello = hello
        self._who = f"rank {hello.rank}"
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

        While older images fill the budget there are fewer at first, or none. Slots of an earlier plan that are not
        among them must not be begun any more; give back what was taken before. Raises OverBudget, AgentLost.
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

    # --- the end

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
        self._connection = Connection(sock, self._who, self._take_event, self._lose)
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
