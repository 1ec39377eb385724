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


def hello_of(run_id: str, url: str, world: World, policy: Policy) -> Hello:
    """How this rank introduces itself to its node's agent."""
    return Hello(
        run_id=run_id,
        url=url,
        rank=world.rank,
        world_size=world.world_size,
        node_ranks=world.node_ranks,
        policy=policy,
        node=world.node,
    )


class AgentLink:
    """See the module. `board` hears what the agent says, for the other nodes."""

    def __init__(self, hello: Hello, policy: Policy, pending: Pending, board: Board) -> None:
        self._hello = hello
        self._policy = policy
        self._pending = pending
        self._board = board
        board.bind(self._connected)
        self._lock = threading.Lock()
        self._client: AgentClient | None = None
        self._registered: tuple[str, int] | None = None  # plan digest and capacity known to this agent
        self._pinned: list[int] = []

    def client(self) -> AgentClient:
        """The connected client; connects, starting an agent if need be. Blocks for that long; raises AgentLost."""
        with self._lock:
            if self._client is None or self._client.lost:
                self._registered = None
                self._pinned = []
                self._client = AgentClient.connect(self._hello, self._on_event, self._on_lost)
            return self._client

    # ---- Buffers, for the capture thread

    def take(self, plan: Plan, capacity: int, timeout_s: float, given_up: Callable[[], bool]) -> Slot:
        """A buffer for the next image. Waits at most `timeout_s` for one (back-pressure)."""
        client = self.client()
        self._register(client, plan, capacity)
        slot = client.take_free_slot(0)
        if slot is None and self._policy.on_pressure == "skip":
            raise SnapshotSkipped("no buffer was free (on_pressure = skip): older images are still being written")
        deadline = time.monotonic() + timeout_s
        while slot is None and not given_up() and time.monotonic() < deadline:
            slot = client.take_free_slot(0.1)
        if slot is None:
            raise SnapshotSkipped(
                f"no buffer became free within {timeout_s:g} s: a level below is too slow or a rank is stuck; "
                "raise memory_budget, write less often, or set on_pressure = skip"
            )
        return slot

    def begin(self, buffer: Any, step: int) -> None:
        self._connected().begin(buffer, step)

    def filled(self, buffer: Any, step: int, upto: int) -> None:
        self._connected().filled(buffer, step, upto)

    def seal(self, buffer: Any, step: int, image_bytes: int, levels: tuple[str, ...]) -> None:
        self._connected().seal(buffer, step, image_bytes, [level for level in levels if level != "memory"])

    def abort(self, buffer: Any | None, step: int, reason: str) -> None:
        client = self._connected()
        if buffer is not None:
            client.abort(buffer, step, reason)
        else:
            client.failed("memory", step, self._hello.rank, reason)

    # ---- the end

    def close(self, *, keep: bool, timeout_s: float) -> list[str]:
        """Wait for pending writes (at most `timeout_s`) and leave; without `keep` the agent ends with its last rank."""
        client = self._client
        if client is None or client.lost:
            return []
        problems: list[str] = []
        try:
            problems = client.flush(timeout_s)
        except ResilientError as error:
            problems = [f"pending writes: {error}"]
        self._unpin()
        client.close(keep)
        return problems

    def _connected(self) -> AgentClient:
        client = self._client
        if client is None or client.lost:
            raise AgentLost("the agent is gone")
        return client

    def _register(self, client: AgentClient, plan: Plan, capacity: int) -> None:
        """Tell the agent of a plan that it does not know yet, and map the buffers it gives."""
        if self._registered is not None and self._registered[0] == plan.digest and self._registered[1] >= capacity:
            return
        budget = self._policy.budget_bytes(capacity)
        slots = min(_MOST_SLOTS, budget // capacity)
        if slots < _SLOTS:
            raise OverBudget(
                f"memory_budget of {budget} bytes holds {slots} images of {capacity} bytes, and {_SLOTS} are needed so "
                f"that the newest complete one is never overwritten: set memory_budget to {2 * capacity} or more"
            )
        self._unpin()
        mapped = client.register_plan(
            plan_digest=plan.digest,
            capacity=capacity,
            slots=slots,
            budget_bytes=budget,
            pieces_text=plan.pieces_text,
            software={"torch": torch.__version__},
        )
        if plan.devices:
            self._pin(mapped)
        self._registered = (plan.digest, capacity)

    def _pin(self, slots: list[Slot]) -> None:
        for slot in slots:
            try:
                device.pin(slot.address, slot.capacity)
            except RuntimeError as error:
                _log.warning("copies from the device will be slow, the image cannot be page-locked: %s", error)
            else:
                self._pinned.append(slot.address)

    def _unpin(self) -> None:
        for address in self._pinned:
            device.unpin(address)
        self._pinned = []

    # ---- events, on the client's listener thread

    def _on_event(self, event: dict[str, Any]) -> None:
        kind = event.get("event")
        if kind == "complete":
            self._pending.complete(event["level"], event["step"])
        elif kind == "failed":
            self._pending.fail(event["level"], event["step"], self._failure(event))
        self._board.post(event)

    def _failure(self, event: dict[str, Any]) -> ResilientError:
        if event["rank"] == self._hello.rank:
            return LevelFailed(event["error"])
        who = "another rank" if event["rank"] is None else f"rank {event['rank']}"
        return RankFailed(f"{who}: {event['error']}")

    def _on_lost(self, error: AgentLost) -> None:
        _log.warning("rank %d: %s; the next save starts another agent", self._hello.rank, error)
        self._pending.fail_all(error)
