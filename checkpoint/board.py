"""What the nodes of a job tell one another about snapshots: complete here, failed there.

Only the leader of each node (its lowest rank) talks, through the job's key-value store, from a thread of its own; a
job on one node needs none of it. A snapshot is complete everywhere when every node has said so; one node's failure
reaches all before their next save. Nothing here blocks the training thread.
"""

import json
import logging
import threading
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

import torch.distributed as dist

from resilient.checkpoint.world import World, job_store
from resilient.errors import AgentLost

_log = logging.getLogger("resilient")
_POLL_S = 0.02
_MOST_OPEN = 64


class Told(Protocol):
    """Whom the board tells: the node's agent, through the leader's client."""

    def complete(self, level: str, step: int, life: str | None = None) -> None: ...
    def failed(self, level: str, step: int, rank: int | None, reason: str) -> None: ...


class Board:
    """The board of a job on one node: there is nobody to tell."""

    @staticmethod
    def of(world: World, run_id: str) -> "Board":
        """The board that fits the world. Collective where there are several nodes."""
        if len(set(world.nodes)) <= 1:
            return Board()
        run = world.gather(run_id)[0]
        store = job_store(f"{run}/{_generation()}")
        leader = world.rank == min(world.node_ranks)
        nodes = list(dict.fromkeys(world.nodes))
        return NodeBoard(store, nodes=len(nodes), number=nodes.index(world.node)) if leader else Board()

    def bind(self, told: Callable[[], Told]) -> None:
        """Whom to tell from now on."""

    def post(self, event: dict[str, Any]) -> None:
        """An event from this node's agent. Returns at once."""

    def renew(self, life: str) -> None:
        """The ranks start anew, all together: steps that were told of will come again and are told of again."""

    def close(self) -> None:
        """End the thread, if there is one."""


_generations = 0


def _generation() -> int:
    """A number that is the same on all ranks for the same Checkpointer, since all make them in the same order."""
    global _generations
    _generations += 1
    return _generations


class NodeBoard(Board):
    """The board of one node's leader. `store` is shared by all nodes; this one is `number` of `nodes`."""

    def __init__(self, store: dist.Store, *, nodes: int, number: int) -> None:
        self._store = store
        self._nodes = nodes
        self._number = number
        self._told: Callable[[], Told] | None = None
        self._wake = threading.Event()
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._inbox: list[dict[str, Any]] = []
        self._life = ""
        self._open: dict[tuple[str, str, int], None] = {}
        self._failures_seen = 0
        # Each failure goes round once in a life.
        self._known_failed: deque[tuple[str, str, int]] = deque(maxlen=_MOST_OPEN)
        self._thread = threading.Thread(target=self._loop, name="resilient-board", daemon=True)
        self._thread.start()

    def bind(self, told: Callable[[], Told]) -> None:
        self._told = told

    def post(self, event: dict[str, Any]) -> None:
        if event.get("event") in ("node", "failed"):
            with self._lock:
                self._inbox.append(event)
            self._wake.set()

    def renew(self, life: str) -> None:
        self._life = life

    def close(self) -> None:
        self._ended.set()
        self._wake.set()
        self._thread.join(5)

    def _loop(self) -> None:
        while not self._ended.is_set():
            self._wake.wait(_POLL_S if self._open else 0.2)
            self._wake.clear()
            try:
                self._send()
                self._receive()
            except AgentLost:  # just now; what was not told yet is told to the next agent
                continue
            except (RuntimeError, dist.DistError) as error:  # the store went with its rank: the job is restarting
                _log.debug("board: %s", error)
                self._ended.wait(0.2)

    def _send(self) -> None:
        with self._lock:
            inbox, self._inbox = self._inbox, []
        for event in inbox:
            level, step = event["level"], event["step"]
            if event["event"] == "node":
                life = event["life"]
                self._store.set(_said(life, level, step, self._number), "1")
                self._open[life, level, step] = None
                while len(self._open) > _MOST_OPEN:  # a step that some node never finishes must not be asked for ever
                    self._open.pop(next(iter(self._open)))
            elif (self._life, level, step) not in self._known_failed:
                self._known_failed.append((self._life, level, step))
                number = self._store.add("failures", 1)
                said = {**{key: event[key] for key in ("level", "step", "rank", "error")}, "life": self._life}
                self._store.set(f"failure/{number}", json.dumps(said))

    def _receive(self) -> None:
        told = self._reach()
        if told is None:
            return
        for life, level, step in list(self._open):
            if self._store.check([_said(life, level, step, number) for number in range(self._nodes)]):
                told.complete(level, step, life)
                del self._open[life, level, step]
        for number in range(self._failures_seen + 1, self._store.add("failures", 0) + 1):
            if not self._store.check([f"failure/{number}"]):
                break
            said = json.loads(self._store.get(f"failure/{number}"))
            failure = (said["life"], said["level"], said["step"])
            self._open.pop(failure, None)
            if failure not in self._known_failed and said["life"] == self._life:
                told.failed(said["level"], said["step"], said["rank"], said["error"])
                self._known_failed.append(failure)
            self._failures_seen = number

    def _reach(self) -> Told | None:
        """The node's agent; None while it is gone: what there is to tell waits for the next one."""
        try:
            return None if self._told is None else self._told()
        except AgentLost:
            return None


def _said(life: str, level: str, step: int, number: int) -> str:
    """Under this key a node says, once or more often, that it has a step at a level."""
    return f"node/{life}/{level}/{step}/{number}"
