"""The images in memory: joins what is decided (`slots.py`, `snapshots.py`) with the memory that holds them (`pool.py`).

Gives trainers their buffers within their budget, digests what they fill, seals it into records, lends sealed images to
readers, and gives memory back. Writing images to other levels is `writing.py`. Everything here runs on the loop.
"""

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Protocol

from resilient.checkpoint.agent.digesting import Digester
from resilient.checkpoint.agent.loop import Loop
from resilient.checkpoint.agent.pool import Plan, Pool
from resilient.checkpoint.agent.protocol import Message, ProtocolError
from resilient.checkpoint.agent.shelf import Shelf
from resilient.checkpoint.agent.slots import Slot, Slots, SlotState
from resilient.checkpoint.agent.snapshots import MEMORY, Snapshot, Snapshots, Tell
from resilient.checkpoint.image import data_start_of
from resilient.checkpoint.names import image_name
from resilient.checkpoint.record import Record, parse_record
from resilient.errors import LevelFailed

MAX_SLOTS = 32


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
        self._records: dict[int, Record] = {}
        self._pool = Pool(self.slots, snapshots, lambda slot: self._records.pop(slot.id, None))
        self._fills: dict[int, _Fill] = {}
        self._digesters: dict[int, Digester] = {}
        self._readers: dict[int, Counter[int]] = {}

    # --- buffers

    def plan(self, rank: int, plan: Plan) -> tuple[Message, list[int]]:
        """The buffers of a rank for images of this plan. Raises OverBudget.

        Where older images still take up the budget there are fewer at first, or none; they follow as `slot` events.
        """
        if not 0 < plan.slots <= MAX_SLOTS or plan.capacity <= 0:
            raise ProtocolError(f"{plan.slots} slots of {plan.capacity} bytes")
        planned = self._pool.plan(rank, plan)
        listed = [
            {"slot": each.id, "capacity": each.capacity, "free": each.state is SlotState.FREE} for each in planned
        ]
        return {"slots": listed}, [self._pool.fd(each) for each in planned]

    def scratch(self, rank: int, image_bytes: int, budget_bytes: int, taken: int | None) -> tuple[Message, list[int]]:
        """A buffer to read an image into: the free one that the trainer has `taken`, or one of its own. OverBudget."""
        if taken is not None:
            slot = self.slots.owned(taken, rank, SlotState.FREE)
        else:
            slot = self._pool.scratch(rank, image_bytes, budget_bytes)
        if slot.capacity < image_bytes or image_bytes <= 0:
            raise ProtocolError(f"an image of {image_bytes} bytes for a slot of {slot.capacity}")
        self.slots.load(slot)
        return {"slot": slot.id, "capacity": slot.capacity}, [self._pool.fd(slot)]

    def room(self, rank: int, image_bytes: int, budget_bytes: int) -> tuple[int, memoryview]:
        """A buffer for a thread of the agent to read an image into: its slot and its memory. Raises OverBudget.

        Nobody else gets it before `leave_room`, whatever becomes of the trainer.
        """
        slot = self._pool.scratch(rank, image_bytes, budget_bytes)
        self.slots.load(slot)
        slot.pins += 1
        return slot.id, self._pool.view(slot)

    def leave_room(self, rank: int, slot_id: int, *, keep: bool) -> None:
        """The thread is done with its buffer. `keep`: the image in it is whole, and its trainer still there."""
        slot = self.slots.owned(slot_id, rank, SlotState.LOADING)
        slot.pins -= 1
        if not keep:
            self._drop_fill(slot, rank, "")

    # --- one image

    def begin(self, rank: int, session: int, slot_id: int, step: int) -> None:
        slot = self.slots.owned(slot_id, rank, SlotState.FREE)
        plan = self._pool.plans.get(rank)
        if plan is None or not slot.planned:
            raise ProtocolError(f"rank {rank} began an image without a plan for slot {slot_id}")
        snapshot, tells = self.snapshots.begin(rank, step, session)
        self.slots.begin(slot, snapshot)
        fill = _Fill(plan=plan, ticket=(slot.id, slot.fill))
        self._fills[slot.id] = fill
        self._digester(rank).begin(fill.ticket, self._pool.view(slot))
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
            data_start=data_start_of(self._pool.view(slot)),
        )
        snapshot.life = record.life
        self._records[slot.id] = record
        self.slots.sealed(slot)
        self.shelf.put(slot.id, record, self._pool.view(slot)[: slot.image_bytes])
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
        return {"slot": slot.id, "record": record.text()}, [self._pool.read_only_fd(slot)]

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
        self.shelf.put(slot.id, record, self._pool.view(slot)[: record.image_bytes])

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
        return self._pool.view(slot)[: slot.image_bytes].toreadonly()

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
        self._pool.plans.pop(rank, None)
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
        for rank, made in self._pool.balance():
            for slot in made:
                event = {"event": "slot", "slot": slot.id, "capacity": slot.capacity}
                self._host.send(rank, event, [self._pool.fd(slot)])
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
        self._pool.stop()
        for digester in self._digesters.values():
            digester.stop()
        self.shelf.clear()
        self._pool.drop()

    # --- inside

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

    def _tell_free(self, slot: Slot) -> None:
        if slot.planned:
            self._host.send(slot.rank, {"event": "free", "slot": slot.id})
