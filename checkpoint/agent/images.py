"""The images in memory: joins what is decided (`slots.py`, `snapshots.py`) with the memory that holds the bytes.

Gives trainers their buffers within their budget, digests what they fill, seals it into records, lends sealed images to
readers, and gives memory back. Writing images to other levels is `writing.py`. Everything here runs on the loop.
"""

import threading
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Protocol

from resilient.checkpoint.agent.digesting import Digester
from resilient.checkpoint.agent.loop import Loop
from resilient.checkpoint.agent.memory import PAGE_BYTES, Memory, available_bytes, check_room, prefault, whole_pages
from resilient.checkpoint.agent.protocol import Message, ProtocolError
from resilient.checkpoint.agent.shelf import Shelf
from resilient.checkpoint.agent.slots import Slot, Slots, SlotState
from resilient.checkpoint.agent.snapshots import MEMORY, Snapshot, Snapshots, Tell
from resilient.checkpoint.image import data_start_of
from resilient.checkpoint.names import image_name
from resilient.checkpoint.record import Record, parse_record
from resilient.errors import LevelFailed, OverBudget

MAX_SLOTS = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a rank's images have in common, and the memory it asked for."""

    plan_digest: str
    capacity: int
    slots: int
    budget_bytes: int
    pieces_text: str
    software: dict[str, str]
    life: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Fill:
    """What a slot is being filled with."""

    plan: Plan
    ticket: tuple[int, int]
    levels: tuple[str, ...] = ()


class Host(Protocol):
    """What the agent does for its images."""

    run_id: str

    def announce(self, tells: Sequence[Tell]) -> None: ...
    def send(self, rank: int, message: Message, fds: Sequence[int] = ()) -> None: ...
    def on_sealed(self, slot: Slot, record: Record, levels: Sequence[str]) -> None: ...
    def on_whole(self, snapshot: Snapshot, records: dict[int, Record]) -> None: ...
    def settle(self) -> None: ...


class Images:
    """All images in the memory of this node."""

    def __init__(self, host: Host, loop: Loop, snapshots: Snapshots) -> None:
        self.snapshots = snapshots
        self.slots = Slots(snapshots)
        self.shelf = Shelf(lambda: loop.post(host.settle))
        self._host = host
        self._loop = loop
        self._memory: dict[int, Memory] = {}
        self._records: dict[int, Record] = {}
        self._fills: dict[int, _Fill] = {}
        self._plans: dict[int, Plan] = {}
        self._digesters: dict[int, Digester] = {}
        self._readers: dict[int, Counter[int]] = {}
        self._stopped = threading.Event()

    # --- buffers

    def plan(self, rank: int, plan: Plan) -> tuple[Message, list[int]]:
        """The buffers of a rank for images of this plan. Raises OverBudget.

        Where older images still take up the budget there are fewer at first; the others follow as `slot` events.
        """
        if not 0 < plan.slots <= MAX_SLOTS or plan.capacity <= 0:
            raise ProtocolError(f"{plan.slots} slots of {plan.capacity} bytes")
        _check_budget(plan.slots * plan.capacity, plan)
        self._plans[rank] = plan
        for slot in self.slots.of(rank):
            slot.planned = False
        self._reuse(rank, plan)
        self._give_back_unplanned()
        made = self._top_up(rank)
        planned = [slot for slot in self.slots.of(rank) if slot.planned]
        if not planned:
            raise OverBudget(
                f"rank {rank}: older images that are still needed take {self._bytes_of(rank)} bytes of its memory "
                f"budget of {plan.budget_bytes}, so that not one of {plan.capacity} bytes fits; raise memory_budget"
            )
        self._prefault(made)
        listed = [
            {"slot": each.id, "capacity": each.capacity, "free": each.state is SlotState.FREE} for each in planned
        ]
        return {"slots": listed}, [self._memory[each.id].fd for each in planned]

    def scratch(self, rank: int, image_bytes: int, budget_bytes: int, taken: int | None) -> tuple[Message, list[int]]:
        """A buffer to read an image into: the free one that the trainer has `taken`, or one of its own. OverBudget."""
        if taken is not None:
            slot = self.slots.owned(taken, rank, SlotState.FREE)
        else:
            slot = self._find_scratch(rank, image_bytes, budget_bytes)
        if slot.capacity < image_bytes or image_bytes <= 0:
            raise ProtocolError(f"an image of {image_bytes} bytes for a slot of {slot.capacity}")
        self.slots.load(slot)
        return {"slot": slot.id, "capacity": slot.capacity}, [self._memory[slot.id].fd]

    def room(self, rank: int, image_bytes: int, budget_bytes: int) -> tuple[int, memoryview]:
        """A buffer for a thread of the agent to read an image into: its slot and its memory. Raises OverBudget.

        Nobody else gets it before `leave_room`, whatever becomes of the trainer.
        """
        slot = self._find_scratch(rank, image_bytes, budget_bytes)
        self.slots.load(slot)
        slot.pins += 1
        return slot.id, self._memory[slot.id].view

    def leave_room(self, rank: int, slot_id: int, *, keep: bool) -> None:
        """The thread is done with its buffer. `keep`: the image in it is whole, and its trainer still there."""
        slot = self.slots.owned(slot_id, rank, SlotState.LOADING)
        slot.pins -= 1
        if not keep:
            self._drop_fill(slot, rank, "")

    def _find_scratch(self, rank: int, image_bytes: int, budget_bytes: int) -> Slot:
        idle = [slot for slot in self.slots.of(rank) if slot.state is SlotState.FREE and not slot.planned]
        for slot in sorted(idle, key=lambda each: each.capacity):
            if slot.capacity >= image_bytes:
                return slot
        capacity = whole_pages(image_bytes)
        while idle and self._bytes_of(rank) + capacity > budget_bytes + PAGE_BYTES:
            self._give_back(idle.pop())
        if self._bytes_of(rank) + capacity > budget_bytes + PAGE_BYTES:
            raise OverBudget(
                f"rank {rank}: an image of {image_bytes} bytes does not fit its memory budget of {budget_bytes} bytes, "
                f"of which {self._bytes_of(rank)} are taken; raise memory_budget"
            )
        slot = self._make(rank, capacity, planned=False)
        self._prefault([slot])
        return slot

    # --- one image

    def begin(self, rank: int, session: int, slot_id: int, step: int) -> None:
        slot = self.slots.owned(slot_id, rank, SlotState.FREE)
        plan = self._plans.get(rank)
        if plan is None or not slot.planned:
            raise ProtocolError(f"rank {rank} began an image without a plan for slot {slot_id}")
        snapshot, tells = self.snapshots.begin(rank, step, session)
        self.slots.begin(slot, snapshot)
        fill = _Fill(plan=plan, ticket=(slot.id, slot.fill))
        self._fills[slot.id] = fill
        self._digester(rank).begin(fill.ticket, self._memory[slot.id].view)
        self._host.announce(tells)

    def filled(self, rank: int, slot_id: int, step: int, upto: int) -> None:
        slot = self._filling(rank, slot_id, step)
        if upto > slot.capacity:
            raise ProtocolError(f"slot {slot_id} was filled up to {upto} of {slot.capacity} bytes")
        self._digester(rank).filled(self._fills[slot_id].ticket, upto)

    def seal(self, rank: int, slot_id: int, step: int, image_bytes: int, levels: tuple[str, ...]) -> None:
        slot = self._filling(rank, slot_id, step)
        self.slots.sealing(slot, image_bytes)
        assert slot.snapshot is not None
        self.snapshots.finish(slot.snapshot.key, rank)
        fill = self._fills[slot_id]
        self._fills[slot_id] = _Fill(plan=fill.plan, ticket=fill.ticket, levels=levels)
        self._digester(rank).seal(fill.ticket, image_bytes)

    def abort(self, rank: int, slot_id: int, reason: str) -> None:
        """Give an image up; on a slot that was only taken, give the slot back."""
        states = (SlotState.FREE, SlotState.FILLING, SlotState.SEALING, SlotState.LOADING)
        slot = self.slots.owned(slot_id, rank, *states)
        self._drop_fill(slot, rank, reason)

    def _drop_fill(self, slot: Slot, rank: int, reason: str) -> None:
        snapshot = slot.snapshot
        if fill := self._fills.pop(slot.id, None):
            self._digester(slot.rank).drop(fill.ticket)
        self.slots.clear(slot)
        if snapshot is not None:
            self._host.announce(self.snapshots.fail(snapshot.key, MEMORY, rank, reason))
        self._tell_free(slot)

    def _digested(self, rank: int, ticket: Hashable, blocks: tuple[str, ...]) -> None:
        found = [fill for fill in self._fills.values() if fill.ticket == ticket]
        if not found:
            return  # given up meanwhile
        fill = found[0]
        slot = self.slots.owned(fill.ticket[0], rank, SlotState.SEALING)
        snapshot = slot.snapshot
        assert snapshot is not None
        del self._fills[slot.id]
        record = Record(
            run_id=self._host.run_id,
            step=snapshot.step,
            rank=rank,
            world_size=snapshot.world_size,
            plan_digest=fill.plan.plan_digest,
            image_name=image_name(snapshot.step, rank, snapshot.world_size),
            image_bytes=slot.image_bytes,
            blocks=blocks,
            pieces_text=fill.plan.pieces_text,
            software=fill.plan.software,
            life=fill.plan.life,
            data_start=data_start_of(self._memory[slot.id].view),
        )
        snapshot.life = record.life
        self._records[slot.id] = record
        self.slots.sealed(slot)
        self.shelf.put(slot.id, record, self._memory[slot.id].view[: slot.image_bytes])
        self._host.send(rank, {"event": "sealed", "step": snapshot.step, "rank": rank})
        self._host.on_sealed(slot, record, fill.levels)  # pins the slot, before anything can free it
        self._host.announce(self.snapshots.arrive(snapshot.key, MEMORY, rank))
        if snapshot.arrived[MEMORY] == snapshot.node_ranks:
            self._host.on_whole(snapshot, self._records_of(snapshot))
        self._host.settle()

    def _records_of(self, snapshot: Snapshot) -> dict[int, Record]:
        slots = [slot for slot in self.slots.sealed_images() if slot.snapshot is snapshot]
        return {slot.image_rank: self._records[slot.id] for slot in slots}

    # --- reading

    def listing(self) -> Message:
        listed = []
        for slot in self.slots.sealed_images():
            record, snapshot = self._records[slot.id], slot.snapshot
            assert snapshot is not None
            listed.append(
                {
                    "rank": record.rank,
                    "step": record.step,
                    "world_size": record.world_size,
                    "plan_digest": record.plan_digest,
                    "image_bytes": record.image_bytes,
                    "complete": snapshot.is_complete(),
                }
            )
        return {"images": listed}

    def map(
        self, session: int, image_rank: int, step: int, world_size: int | None, slot_id: int | None = None
    ) -> tuple[Message, list[int]]:
        """Lend a sealed image; the descriptor is the caller's. Raises LevelFailed if it is not (or no more) there."""
        slot, record = self.sealed_image(image_rank, step, world_size, slot_id)
        slot.pins += 1
        self._readers.setdefault(session, Counter())[slot.id] += 1
        return {"slot": slot.id, "record": record.text()}, [self._memory[slot.id].read_only_fd()]

    def sealed_image(
        self, image_rank: int, step: int, world_size: int | None = None, slot_id: int | None = None
    ) -> tuple[Slot, Record]:
        """A sealed image. Raises LevelFailed if it is not (or no more) there."""
        slot = self.slots.find(image_rank, step, world_size, slot_id)
        if slot is None:
            raise LevelFailed(
                f"the image of rank {image_rank} at step {step} is not in this node's memory; use another level"
            )
        return slot, self._records[slot.id]

    def unmap(self, session: int, slot_id: int) -> None:
        lent = self._readers.get(session, Counter())
        if lent[slot_id] <= 0:
            raise ProtocolError(f"slot {slot_id} was not lent to this trainer")
        lent[slot_id] -= 1
        self.unpin(slot_id)

    def adopt(self, rank: int, slot_id: int, step: int, record_text: str) -> None:
        """Let others read an image that a trainer has read and verified. Raises the errors of `parse_record`."""
        slot = self.slots.owned(slot_id, rank, SlotState.LOADING)
        record = parse_record(record_text, f"the record that rank {rank} gave for slot {slot_id}")
        if record.step != step or record.image_bytes > slot.capacity:
            raise ProtocolError(f"slot {slot_id} cannot hold step {record.step} with {record.image_bytes} bytes")
        snapshot = self.snapshots.adopt(record.step, record.world_size)
        self.slots.adopted(slot, snapshot, record.rank, record.image_bytes)
        self._records[slot.id] = record
        self.shelf.put(slot.id, record, self._memory[slot.id].view[: record.image_bytes])

    def release(self, rank: int, slot_id: int) -> None:
        slot = self.slots.owned(slot_id, rank, SlotState.LOADING, SlotState.SEALED)
        self.slots.release(slot)
        if slot.state is SlotState.FREE:
            self._tell_free(slot)

    def restored(self, rank: int, slot_id: int) -> None:
        """The trainer goes on from one image (0: from none of these). Its others are damaged, or will be made again.

        An older one that has parity goes, too, even if this one still waits for it: there must be a buffer for the next
        snapshot, whatever becomes of that parity.
        """
        if slot_id:
            self.slots.owned(slot_id, rank, SlotState.SEALED)
        for slot in self.slots.of(rank):
            if slot.id != slot_id and slot.state in (SlotState.SEALED, SlotState.SEALING):
                slot.released = True

    def view(self, slot: Slot) -> memoryview:
        """The image of a sealed slot. Whoever keeps it has to pin the slot."""
        return self._memory[slot.id].view[: slot.image_bytes].toreadonly()

    def pin(self, slot: Slot) -> None:
        slot.pins += 1

    def unpin(self, slot_id: int) -> None:
        for slot in self.slots.all():
            if slot.id == slot_id:
                assert slot.pins > 0, slot
                slot.pins -= 1

    # --- ends

    def leave(self, rank: int, session: int) -> None:
        """A trainer is gone: its half-filled slots are free, its sealed images stay."""
        for slot_id in self._readers.pop(session, Counter()).elements():
            self.unpin(slot_id)
        self._plans.pop(rank, None)
        for slot in self.slots.of(rank):
            slot.planned = False
            if slot.state in (SlotState.FILLING, SlotState.LOADING) and not slot.pins:
                self._drop_fill(slot, rank, f"the trainer of rank {rank} ended before its image was whole")
        self._host.announce(self.snapshots.leave(rank))

    def recycle(self) -> None:
        """Free what is not needed any more, tell the owners, and give memory back that is in no plan."""
        for slot in self.slots.recycle(lambda slot: self.shelf.withdraw(slot.id)):
            self._records.pop(slot.id, None)
            self._tell_free(slot)
        self._give_back_unplanned()
        for rank in self._plans:
            for slot in self._top_up(rank):
                self._prefault([slot])
                event = {"event": "slot", "slot": slot.id, "capacity": slot.capacity}
                self._host.send(rank, event, [self._memory[slot.id].fd])
        for rank in [each for each in self._digesters if each not in self.snapshots.node_ranks]:
            if not any(slot.state is SlotState.SEALING for slot in self.slots.of(rank)):
                self._digesters.pop(rank).stop()
        self.snapshots.forget({slot.snapshot.key for slot in self.slots.all() if slot.snapshot is not None})

    def sealing(self, rank: int | None = None) -> bool:
        """Whether an image of a rank (of any rank) is still being digested."""
        slots = self.slots.all() if rank is None else self.slots.of(rank)
        return any(slot.state is SlotState.SEALING for slot in slots)

    def total_bytes(self) -> int:
        return sum(slot.capacity for slot in self.slots.all())

    def close(self) -> None:
        self._stopped.set()
        for digester in self._digesters.values():
            digester.stop()
        self.shelf.clear()
        for memory in self._memory.values():
            memory.drop()

    # --- memory

    def _filling(self, rank: int, slot_id: int, step: int) -> Slot:
        slot = self.slots.owned(slot_id, rank, SlotState.FILLING)
        if slot.snapshot is None or slot.snapshot.step != step:
            raise ProtocolError(f"slot {slot_id} is not being filled for step {step}")
        return slot

    def _digester(self, rank: int) -> Digester:
        if rank not in self._digesters:

            def on_digested(ticket: Hashable, blocks: tuple[str, ...]) -> None:
                self._loop.post(lambda: self._digested(rank, ticket, blocks))

            self._digesters[rank] = Digester(f"digest-{rank}", on_digested)
            self._digesters[rank].start()
        return self._digesters[rank]

    def _reuse(self, rank: int, plan: Plan) -> None:
        """Put buffers that are there into the plan: those with images first, for they cannot be given back."""
        loading = SlotState.LOADING
        there = [slot for slot in self.slots.of(rank) if slot.state is not loading and not self._is_foreign(slot)]
        fitting = [slot for slot in there if slot.capacity >= plan.capacity]
        fitting.sort(key=lambda each: (each.state is SlotState.FREE, each.capacity))
        total = self._bytes_of(rank, without_free=True)
        limit = plan.budget_bytes + plan.slots * PAGE_BYTES
        for slot in fitting[: plan.slots]:
            if slot.state is SlotState.FREE:
                if total + slot.capacity > limit or slot.capacity * plan.slots > limit:
                    continue  # so large that the others would not fit beside it
                total += slot.capacity
            slot.planned = True

    def _top_up(self, rank: int) -> list[Slot]:
        """New buffers, up to what the rank's plan and its budget say."""
        plan = self._plans[rank]
        made: list[Slot] = []
        capacity = whole_pages(plan.capacity)
        limit = plan.budget_bytes + plan.slots * PAGE_BYTES
        there = sum(slot.planned for slot in self.slots.of(rank))
        while there + len(made) < plan.slots and self._bytes_of(rank) + capacity <= limit:
            try:
                made.append(self._make(rank, capacity, planned=True))
            except OverBudget:
                if there + len(made) == 0:
                    raise
                break  # the node is short of memory: tried again after the next change
        return made

    def _make(self, rank: int, capacity: int, *, planned: bool) -> Slot:
        promised = sum(memory.missing_bytes() for memory in self._memory.values())
        check_room(capacity, available_bytes() - promised)
        memory = Memory(capacity, f"rank{rank}")
        slot = self.slots.add(rank, capacity, planned=planned)
        self._memory[slot.id] = memory
        return slot

    def _give_back_unplanned(self) -> None:
        """Free memory that no plan holds. A trainer keeps what it had until it plans: it will want the same."""
        for slot in self.slots.all():
            settled = slot.rank in self._plans or slot.rank not in self.snapshots.node_ranks
            if slot.state is SlotState.FREE and not slot.planned and not slot.pins and settled:
                self._give_back(slot)

    def _give_back(self, slot: Slot) -> None:
        self.slots.remove(slot)
        self._records.pop(slot.id, None)
        self._memory.pop(slot.id).drop()

    def _bytes_of(self, rank: int, *, without_free: bool = False) -> int:
        slots = [slot for slot in self.slots.of(rank) if not self._is_foreign(slot)]
        return sum(slot.capacity for slot in slots if not (without_free and slot.state is SlotState.FREE))

    def _is_foreign(self, slot: Slot) -> bool:
        """Whether it holds an image of a job with another number of ranks.

        Such a job has gone on from it, and it stays until a snapshot of the new job is complete; meanwhile it is
        beyond the budget, for larger than a rank's own it could leave no room for the first of these.
        """
        return slot.snapshot is not None and slot.snapshot.world_size not in (0, self.snapshots.world_size)

    def _tell_free(self, slot: Slot) -> None:
        if slot.planned:
            self._host.send(slot.rank, {"event": "free", "slot": slot.id})

    def _prefault(self, slots: Sequence[Slot]) -> None:
        views = [self._memory[slot.id].view for slot in slots]
        if views:
            threading.Thread(
                target=_prefault_all, args=(views, self._stopped.is_set), name="prefault", daemon=True
            ).start()


def _prefault_all(views: list[memoryview], stopped: Callable[[], bool]) -> None:
    for view in views:
        prefault(view, stopped)


def _check_budget(wanted_bytes: int, plan: Plan) -> None:
    if wanted_bytes > plan.budget_bytes:
        raise OverBudget(
            f"{plan.slots} images of {plan.capacity} bytes need {wanted_bytes} bytes, the memory budget is "
            f"{plan.budget_bytes}; raise memory_budget to at least that"
        )
