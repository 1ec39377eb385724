"""The trainer's link to its node's agent: connects, reconnects after a loss, hands out buffers, settles handles.

Used by the capture thread (`Buffers`), by the training thread (connect, restore, close) and by the client's listener
thread (events). If the agent dies, everything pending fails at once and the next capture starts another agent.
"""

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import torch

from resilient.checkpoint import device
from resilient.checkpoint.agent.client import AgentClient, Hello, Slot
from resilient.checkpoint.board import Board
from resilient.checkpoint.handle import Pending
from resilient.checkpoint.plan import Plan
from resilient.checkpoint.world import World
from resilient.errors import AgentLost, LevelFailed, OverBudget, RankFailed, ResilientError, SnapshotSkipped
from resilient.policy import Policy

_log = logging.getLogger("resilient")
_SLOTS = 2  # the newest complete image, and the one being filled (law 4)
_MOST_SLOTS = 8
_FIRST_PAUSE_S = 1.0  # after an agent could not be started; doubled each time, so that a broken node costs little
_LONGEST_PAUSE_S = 60.0


def hello_of(run_id: str, url: str, world: World, policy: Policy, launch: str | None = None) -> Hello:
    """How this rank introduces itself to its node's agent."""
    return Hello(
        run_id=run_id,
        url=url,
        rank=world.rank,
        world_size=world.world_size,
        node_ranks=world.node_ranks,
        policy=policy,
        node=world.node,
        launch=launch,
    )


class AgentLink:
    """See the module. `board` hears what the agent says, for the other nodes."""

    def __init__(self, hello: Hello, policy: Policy, pending: Pending, board: Board) -> None:
        self._hello = hello
        self._policy = policy
        self._pending = pending
        self._board = board
        self._life = ""  # set by `renew` before anything is saved
        board.bind(self._connected)
        self._lock = threading.Lock()
        self._client: AgentClient | None = None
        self._registered: tuple[str, int] | None = None  # plan digest and capacity known to this agent
        self._pinned: dict[int, bool] = {}  # for each slot's address whether it could be page-locked
        self._starved = False
        self._pause_s = 0.0
        self._retry_at = 0.0
        self._giver: AgentClient | None = None  # who gave the buffer that is being filled
        self.introduce: Callable[[AgentClient], None] | None = None  # tells a new agent of its peers
        self.parity_sizes: tuple[int, int] | None = None  # k and m of this node's group

    def renew(self, life: str) -> None:
        """The ranks start anew, all together: what they save from now on belongs to another life."""
        self._life, self._registered = life, None
        self._board.renew(life)

    def client(self) -> AgentClient:
        """The connected client; connects, starting an agent if need be. Blocks for that long.

        Raises AgentLost or LevelFailed where no agent can be reached, and what a new connection may raise (UrlInUse).
        """
        with self._lock:
            if self._client is None or self._client.lost:
                self._let_go()
                self._client = AgentClient.connect(self._hello, self._on_event, self._on_lost)
                self._pause_s = 0.0
                self._introduce(self._client)
            return self._client

    def _introduce(self, client: AgentClient) -> None:
        """Without its peers the agent serves all other levels."""
        if self.introduce is None:
            return
        try:
            self.introduce(client)
        except (ResilientError, TimeoutError) as error:
            _log.warning("rank %d: its new agent cannot join the others, no parity: %s", self._hello.rank, error)

    # ---- Buffers, for the capture thread

    def take(self, plan: Plan, capacity: int, timeout_s: float, given_up: Callable[[], bool]) -> Slot:
        """A buffer for the next image. Waits at most `timeout_s` for one (back-pressure).

        A wait in vain is not repeated: until a buffer comes free, later captures give up at once, so that an agent or
        a level that hangs costs the training one such wait, and not one at every step.
        """
        client = self._client_to_save()
        self._register(client, plan, capacity)
        self._giver = client
        slot = client.take_free_slot(0)
        if slot is None and self._policy.on_pressure == "skip":
            raise SnapshotSkipped("no buffer was free (on_pressure = skip): older images are still being written")
        deadline = time.monotonic() + timeout_s
        while slot is None and not self._starved and not given_up() and time.monotonic() < deadline:
            slot = client.take_free_slot(0.1)
        waited = "none has become free since a save waited" if self._starved else "none became free within"
        self._starved = slot is None
        if slot is None:
            raise SnapshotSkipped(
                f"no buffer: {waited} {timeout_s:g} s; a level below is too slow, the agent hangs or a rank is stuck: "
                "raise memory_budget, write less often, or set on_pressure = skip"
            )
        if plan.devices and slot.address not in self._pinned:
            self._pinned[slot.address] = _pin(slot)
        return slot

    def begin(self, buffer: Any, step: int) -> None:
        self._gave().begin(buffer, step)

    def filled(self, buffer: Any, step: int, upto: int) -> None:
        self._gave().filled(buffer, step, upto)

    def seal(self, buffer: Any, step: int, image_bytes: int, levels: tuple[str, ...]) -> None:
        self._gave().seal(buffer, step, image_bytes, [level for level in levels if level != "memory"])

    def abort(self, buffer: Any | None, step: int, reason: str) -> None:
        if buffer is not None:
            self._gave().abort(buffer, step, reason)
        else:
            self._connected().failed("memory", step, self._hello.rank, reason)

    def make_durable(self, step: int) -> None:
        """As AgentClient.make_durable; on any thread. Raises AgentLost too."""
        self._connected().make_durable(step)

    # ---- the end

    def close(self, *, keep: bool, timeout_s: float) -> list[str]:
        """Wait for pending writes (at most `timeout_s`) and leave; without `keep` the agent ends with its last rank."""
        client = self._client
        if client is None or client.lost:
            self._let_go()
            return []
        problems: list[str] = []
        try:
            problems = client.flush(timeout_s)
        except ResilientError as error:
            problems = [f"pending writes: {error}"]
        self._unpin()
        client.close(keep)
        return problems

    def leave(self) -> None:
        """Go without waiting for writes; the agent finishes them, and keeps its memory. At the interpreter's end."""
        client, self._client = self._client, None
        if client is not None:
            client.close(keep=True)

    def _client_to_save(self) -> AgentClient:
        """As `client`, but where no agent could be started a while passes before it is tried again."""
        if time.monotonic() < self._retry_at and (self._client is None or self._client.lost):
            raise AgentLost(f"the agent is gone, and starting another failed; it is tried every {self._pause_s:g} s")
        try:
            return self.client()
        except (ResilientError, OSError) as error:
            self._pause_s = min(_LONGEST_PAUSE_S, max(_FIRST_PAUSE_S, 2 * self._pause_s))
            self._retry_at = time.monotonic() + self._pause_s
            if isinstance(error, ResilientError):
                raise
            raise LevelFailed(f"no agent can be reached: {error}") from error

    def _let_go(self) -> None:
        """Forget a client that is lost, and what was mapped of its agent."""
        lost, self._client = self._client, None
        self._registered = None
        self._starved = False
        self._unpin()
        if lost is not None:
            lost.close(keep=True)

    def _gave(self) -> AgentClient:
        """The client whose buffer is being filled: another agent would not know it. Raises AgentLost if it is gone."""
        return _alive(self._giver)

    def _connected(self) -> AgentClient:
        return _alive(self._client)

    def _register(self, client: AgentClient, plan: Plan, capacity: int) -> None:
        """Tell the agent of a plan that it does not know yet, and map the buffers it gives."""
        if self._registered is not None and self._registered[0] == plan.digest and self._registered[1] >= capacity:
            return
        budget = self._policy.budget_bytes(capacity, self.parity_sizes)
        slots = min(_MOST_SLOTS, budget // capacity)
        if slots < _SLOTS:
            k, m = self.parity_sizes or (1, 0)
            raise OverBudget(
                f"memory_budget has {budget} bytes for images and holds {slots} of {capacity} bytes; {_SLOTS} are "
                "needed so that the newest complete one is never overwritten: set memory_budget to "
                f"{-(-_SLOTS * capacity * (k + m) // k)} or more"
            )
        self._unpin()
        self._registered = None  # a plan that is refused takes the place of the one before, too
        client.register_plan(
            plan_digest=plan.digest,
            capacity=capacity,
            slots=slots,
            budget_bytes=budget,
            pieces_text=plan.pieces_text,
            software={"torch": torch.__version__},
            life=self._life,
        )
        self._registered = (plan.digest, capacity)

    def _unpin(self) -> None:
        for address, pinned in self._pinned.items():
            if pinned:
                device.unpin(address)
        self._pinned = {}

    # ---- events, on the client's listener thread

    def _on_event(self, event: dict[str, Any]) -> None:
        if event.get("superseded"):
            return  # of an earlier attempt at the step: `Pending.add` has settled what awaited that
        kind = event.get("event")
        if kind == "complete":
            self._pending.complete(event["level"], event["step"])
        elif kind == "failed":
            self._pending.fail(event["level"], event["step"], self._failure(event))
        elif kind == "damage":
            _log.warning("rank %d: %s", self._hello.rank, event["what"])
        self._board.post(event)

    def _failure(self, event: dict[str, Any]) -> ResilientError:
        if event["rank"] == self._hello.rank:
            return LevelFailed(event["error"])
        who = "another rank" if event["rank"] is None else f"rank {event['rank']}"
        return RankFailed(f"{who}: {event['error']}")

    def _on_lost(self, error: AgentLost) -> None:
        _log.warning("rank %d: %s; the next save starts another agent", self._hello.rank, error)
        for handle in self._pending.waiting():  # the other nodes would wait for these images for ever
            if "memory" in handle.levels and not handle.durable("memory").done():
                reason = f"rank {self._hello.rank} lost its agent"
                event = {"event": "failed", "level": "memory", "step": handle.step, "rank": self._hello.rank}
                self._board.post({**event, "error": reason})
        self._pending.fail_all(error)


def _alive(client: AgentClient | None) -> AgentClient:
    if client is None or client.lost:
        raise AgentLost("the agent is gone")
    return client


def _pin(slot: Slot) -> bool:
    """Page-lock a slot, once: for a device its first image is as slow as this takes, and later ones are quick."""
    try:
        device.pin(slot.address, slot.capacity)
    except RuntimeError as error:
        _log.warning("copies from the device will be slow, the image cannot be page-locked: %s", error)
        return False
    return True
