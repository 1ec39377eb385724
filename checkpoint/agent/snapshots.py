"""Which snapshots there are, how far each has come at each level, and which one must not be lost. Pure: no I/O.

A snapshot is one attempt at one step. A run that goes back to an earlier step tries steps again, so a step number can
stand for two snapshots at once; the older attempt is then `superseded`. A level's progress:

    DUE ──all ranks of this node──► NODE ──all ranks of the world──► COMPLETE
      └──────────────a failure─────────┴──► FAILED

Parity is such a level too: an image has arrived there when its node's parity group protects it.
Every change returns what has to be told to whom. Which slots hold the images is the business of `slots.py`.
"""

import enum
from collections.abc import Container
from dataclasses import dataclass, field
from typing import NamedTuple

from resilient.checkpoint.agent.protocol import Message

MEMORY, PARITY, LOCAL, DURABLE = "memory", "parity", "local", "durable"
LEVELS = (MEMORY, PARITY, LOCAL, DURABLE)
ALL, LEADER = -1, -2  # who is told, where it is not one rank
UNPROTECTED = 2  # so many failures to get parity in a row, and what last had it is too old to go back to
HELD = 256  # snapshots remembered at most: whatever a program does, this does not grow


class Tell(NamedTuple):
    """An event for one rank, for ALL connected ranks, or for the LEADER: the lowest of them."""

    to: int
    event: Message


class Progress(enum.Enum):
    DUE = "due"
    NODE = "node"
    COMPLETE = "complete"
    FAILED = "failed"

    @property
    def settled(self) -> bool:
        return self in (Progress.COMPLETE, Progress.FAILED)


@dataclass(slots=True, kw_only=True)
class Snapshot:
    """One attempt at one step.

    `sessions` are the connections of the ranks that take part in it, `final` the ranks of this node whose bytes are
    final, `arrived` those whose image is at a level. It is `gone` once an image of it has left the memory. `failures`
    are the events that told of what failed. `life` is known once an image is sealed (see `Record`).
    """

    key: int
    step: int
    world_size: int
    node_ranks: frozenset[int]
    life: str = ""
    adopted: bool = False
    superseded: bool = False
    gone: bool = False
    sessions: dict[int, int] = field(default_factory=dict)
    final: set[int] = field(default_factory=set)
    arrived: dict[str, set[int]] = field(default_factory=lambda: {MEMORY: set()})
    progress: dict[str, Progress] = field(default_factory=lambda: {MEMORY: Progress.DUE})
    failures: list[Message] = field(default_factory=list)

    def is_complete(self, level: str = MEMORY) -> bool:
        return self.progress.get(level) is Progress.COMPLETE

    def awaits_parity(self) -> bool:
        """Whether its parity is on its way, and worth having."""
        parity = self.progress.get(PARITY)
        return parity is not None and not parity.settled and not self.superseded and not self.gone


class Snapshots:
    """All snapshots that this node takes part in. Not thread-safe: the agent's loop owns it."""

    def __init__(self) -> None:
        self.world_size = 0
        self.node_ranks: frozenset[int] = frozenset()
        self._held: dict[int, Snapshot] = {}
        self._next_key = 1
        self._unprotected = 0  # snapshots without parity since the last one with it

    def __getitem__(self, key: int) -> Snapshot:
        return self._held[key]

    def __len__(self) -> int:
        return len(self._held)

    def get(self, key: int) -> Snapshot | None:
        return self._held.get(key)

    def all(self) -> list[Snapshot]:
        return list(self._held.values())

    # --- who takes part

    def set_world(self, world_size: int, node_ranks: frozenset[int]) -> None:
        """The world that new snapshots belong to. Those of another world stay until a newer one is complete."""
        self.world_size, self.node_ranks = world_size, node_ranks

    def greet(self, living: Container[int]) -> list[Tell]:
        """A trainer has started: what a dead session began cannot become whole with images of the new ones."""
        told = []
        for snapshot in self.all():
            memory = snapshot.progress[MEMORY]
            stale = any(session not in living for session in snapshot.sessions.values())
            stale = stale and snapshot.final != snapshot.node_ranks
            if memory is Progress.DUE and stale:
                told += self.fail(snapshot.key, MEMORY, None, "a trainer that took part in it has ended")
            if snapshot.progress[MEMORY] is Progress.FAILED:
                snapshot.superseded = True
        return told

    def leave(self, rank: int) -> list[Tell]:
        """The trainer of a rank is gone: what still needs its image fails. What it sealed others may make whole."""
        told = []
        for snapshot in self.all():
            missing = rank in snapshot.node_ranks and rank not in snapshot.final
            if missing and snapshot.progress[MEMORY] is Progress.DUE and not snapshot.adopted:
                reason = f"the trainer of rank {rank} ended before its image was whole"
                told += self.fail(snapshot.key, MEMORY, rank, reason)
        return told

    def begin(self, rank: int, step: int, session: int) -> tuple[Snapshot, list[Tell]]:
        """The snapshot that a rank's image of a step belongs to; a new one if there is none for it to join."""
        told = self._supersede(rank, step)
        found = self._open_at(step, rank)
        if found is None:
            found = self._new(step, self.world_size, self.node_ranks)
        found.sessions[rank] = session
        # What failed before this rank came to the step was told before it awaited anything of it: once more, then.
        return found, told + [Tell(rank, event) for event in found.failures]

    def adopt(self, step: int, world_size: int) -> Snapshot:
        """A place for images that were read from another level. It never counts as complete in memory."""
        for snapshot in self.all():
            if snapshot.adopted and (snapshot.step, snapshot.world_size) == (step, world_size):
                return snapshot
        snapshot = self._new(step, world_size, frozenset())
        snapshot.adopted = True
        return snapshot

    # --- how far it has come

    def finish(self, key: int, rank: int) -> None:
        """A rank has sealed its image: whatever becomes of its trainer, the image will arrive in memory."""
        self._held[key].final.add(rank)

    def due(self, key: int, level: str) -> list[Tell]:
        """An image of the snapshot is to be written to a level. That fails at once if the snapshot has failed."""
        snapshot = self._held[key]
        if level in snapshot.progress:
            return []
        snapshot.progress[level], snapshot.arrived[level] = Progress.DUE, set()
        if snapshot.progress[MEMORY] is Progress.FAILED:
            return self.fail(key, level, None, "the snapshot is not complete in memory")
        return []

    def arrive(self, key: int, level: str, rank: int) -> list[Tell]:
        """The image of a rank of this node is at a level."""
        snapshot = self._held[key]
        snapshot.arrived[level].add(rank)
        if snapshot.progress[level] is not Progress.DUE or snapshot.arrived[level] != snapshot.node_ranks:
            return []
        if snapshot.node_ranks == frozenset(range(snapshot.world_size)):
            return self._completed(snapshot, level)
        snapshot.progress[level] = Progress.NODE
        return [Tell(LEADER, _node(level, snapshot))]

    def complete(self, level: str, step: int, life: str | None = None) -> list[Tell]:
        """The leader has heard that every node has the step at a level. Nothing happens if this node has not."""
        for snapshot in reversed(self.all()):
            meant = snapshot.step == step and life in (None, snapshot.life)
            if meant and snapshot.progress.get(level) is Progress.NODE:
                return self._completed(snapshot, level)
        return []

    def fail(self, key: int, level: str, rank: int | None, reason: str) -> list[Tell]:
        """The snapshot will not become complete at a level; and at no other, if that level is memory."""
        snapshot = self._held[key]
        levels = [each for each in LEVELS if each in snapshot.progress] if level == MEMORY else [level]
        if snapshot.progress[level].settled:
            return []
        told = []
        for each in levels:
            if not snapshot.progress[each].settled:
                snapshot.progress[each] = Progress.FAILED
                self._unprotected += each == PARITY and level == PARITY
                told.append(_failed(each, snapshot.step, rank, reason))
                snapshot.failures.append(told[-1].event)
        return told

    def fail_step(self, level: str, step: int, rank: int | None, reason: str) -> list[Tell]:
        """A trainer says that a step has failed at a level, perhaps before any image of it was begun here.

        `rank`: whose fault it is; None where it is no single rank's.
        """
        for snapshot in reversed(self.all()):
            current = snapshot.step == step and not snapshot.superseded and not snapshot.adopted
            if current and level in snapshot.progress:
                return self.fail(snapshot.key, level, rank, reason)
        if level != MEMORY:
            return [_failed(level, step, rank, reason)]
        snapshot = self._new(step, self.world_size, self.node_ranks)
        if rank is not None and rank in self.node_ranks:
            snapshot.sessions[rank] = 0
        return self.fail(snapshot.key, level, rank, reason)

    def unanswered(self) -> list[Tell]:
        """What a new leader has to be asked again."""
        return [
            Tell(LEADER, _node(level, snapshot))
            for snapshot in self.all()
            for level, progress in snapshot.progress.items()
            if progress is Progress.NODE
        ]

    # --- what must be kept

    def newest_complete(self) -> Snapshot | None:
        """The snapshot to go back to: the newest of the latest attempt, else the newest of an earlier one."""
        return self._newest(MEMORY)

    def newest_protected(self) -> Snapshot | None:
        """The snapshot to go back to when nodes are lost; None where newer ones make do without parity."""
        newest, protected = self.newest_complete(), self._newest(PARITY)
        if protected is None or self._unprotected >= UNPROTECTED:
            return None
        goes_without = newest is not None and newest.key > protected.key and PARITY not in newest.progress
        return None if goes_without else protected

    def wanted_parity(self) -> set[tuple[str, int]]:
        """(life, step) of the snapshots whose parity is to be made, or to be kept."""
        protected = self.newest_protected()
        return {
            (each.life, each.step)
            for each in self._held.values()
            if each is protected or (each.life and self._may_be_protected(each, protected))
        }

    def is_needed(self, snapshot: Snapshot) -> bool:
        """Whether the images of a snapshot have to stay in memory (law 4, for data and parity together).

        Where there is parity, what has it is kept, and what may get it. A snapshot that failed to get it is kept only
        if none has it: with two buffers there would be none for the next one, which is to have it again.
        """
        newest, protected = self.newest_complete(), self.newest_protected()
        if snapshot is protected or (snapshot.is_complete() and self._may_be_protected(snapshot, protected)):
            return True
        if snapshot is newest:
            return protected is None or snapshot.progress.get(PARITY) is not Progress.FAILED
        if snapshot.progress[MEMORY].settled:
            return False  # it has failed, or a newer one is complete
        if newest is None:
            return not snapshot.superseded
        if snapshot.adopted:
            return newest.key < snapshot.key
        return not snapshot.superseded and (newest.superseded or newest.step < snapshot.step)

    def forget(self, in_use: Container[int]) -> None:
        """Drop what has no more meaning: no image in memory, nothing to come at a level, nobody to join it."""
        newest = self.newest_complete()
        for key, snapshot in list(self._held.items()):
            if key in in_use or snapshot is newest:
                continue
            settled = all(progress.settled for progress in snapshot.progress.values()) or snapshot.adopted
            passed = snapshot.is_complete() or snapshot.superseded or snapshot.adopted
            passed = passed or (newest is not None and newest.step > snapshot.step)
            if (settled and passed) or len(self._held) > HELD:
                del self._held[key]

    # --- inside

    def _newest(self, level: str) -> Snapshot | None:
        complete = [each for each in self._held.values() if each.is_complete(level) and not each.gone]
        return max(complete, key=_age, default=None)

    def _may_be_protected(self, snapshot: Snapshot, protected: Snapshot | None) -> bool:
        """Whether its parity may still come, and make it the one to go back to."""
        return snapshot.awaits_parity() and (protected is None or _age(snapshot) > _age(protected))

    def _new(self, step: int, world_size: int, node_ranks: frozenset[int]) -> Snapshot:
        snapshot = Snapshot(key=self._next_key, step=step, world_size=world_size, node_ranks=node_ranks)
        self._next_key += 1
        self._held[snapshot.key] = snapshot
        return snapshot

    def _open_at(self, step: int, rank: int) -> Snapshot | None:
        for snapshot in self.all():
            same_world = (snapshot.world_size, snapshot.node_ranks) == (self.world_size, self.node_ranks)
            joined = rank in snapshot.sessions or snapshot.superseded or snapshot.adopted
            if snapshot.step == step and same_world and not joined:
                return snapshot
        return None

    def _supersede(self, rank: int, step: int) -> list[Tell]:
        """A rank begins a step: what it, or another world, began from there on belongs to an earlier attempt."""
        told = []
        for snapshot in self.all():
            same_world = (snapshot.world_size, snapshot.node_ranks) == (self.world_size, self.node_ranks)
            earlier = rank in snapshot.sessions or not same_world
            if earlier and snapshot.step >= step and not snapshot.superseded and not snapshot.adopted:
                snapshot.superseded = True
                for level in LEVELS:
                    if level in snapshot.progress:
                        failed = self.fail(snapshot.key, level, None, f"the run went back to step {step}")
                        # Said so, for the same step number may already be awaited of the new attempt.
                        told += [Tell(to, {**event, "superseded": True}) for to, event in failed]
        return told

    def _completed(self, snapshot: Snapshot, level: str) -> list[Tell]:
        snapshot.progress[level] = Progress.COMPLETE
        if level == PARITY:
            self._unprotected = 0
        return [Tell(ALL, {"event": "complete", "level": level, "step": snapshot.step})]


def _age(snapshot: Snapshot) -> tuple[bool, int, int]:
    """What was left behind by a run that went back is older than what came of it."""
    return not snapshot.superseded, snapshot.step, snapshot.key


def _node(level: str, snapshot: Snapshot) -> Message:
    return {"event": "node", "level": level, "step": snapshot.step, "life": snapshot.life}


def _failed(level: str, step: int, rank: int | None, reason: str) -> Tell:
    return Tell(ALL, {"event": "failed", "level": level, "step": step, "rank": rank, "error": reason})
