"""The buffers in shared memory as a pure state machine: what each holds, and when it may be used again. No I/O.

    FREE ──begin──► FILLING ──seal──► SEALING ──digested──► SEALED ──not needed, not pinned──► FREE
                       └──────────abort──────────┴──────────────────────────────────────────────►┘
    FREE ──scratch──► LOADING ──adopt──► SEALED

The law it keeps: the newest complete snapshot is never recycled (`Snapshots.is_needed` says which that is). Memory and
descriptors belong to `memory.py`, and the shell that joins the two is `images.py`.
"""

import enum
from collections.abc import Callable
from dataclasses import dataclass

from resilient.checkpoint.agent.protocol import ProtocolError
from resilient.checkpoint.agent.snapshots import Snapshot, Snapshots


class SlotState(enum.Enum):
    FREE = "free"
    FILLING = "filling"
    SEALING = "sealing"
    SEALED = "sealed"
    LOADING = "loading"


@dataclass(slots=True, kw_only=True)
class Slot:
    """One buffer. `rank` owns it; `image_rank` is whose image it holds (another's, if it was read for resharding).

    `fill` counts the uses of the buffer, so that a late answer about an earlier image is known as such. A slot that is
    not `planned` is given back to the system once it is free; one that is `released` is free once nobody reads it.
    """

    id: int
    rank: int
    capacity: int
    planned: bool = True
    state: SlotState = SlotState.FREE
    fill: int = 0
    pins: int = 0
    released: bool = False
    snapshot: Snapshot | None = None
    image_rank: int = 0
    image_bytes: int = 0


class Slots:
    """All buffers of the node. Not thread-safe: the agent's loop owns it. Misuse raises ProtocolError."""

    def __init__(self, snapshots: Snapshots) -> None:
        self._snapshots = snapshots
        self._held: dict[int, Slot] = {}
        self._next_id = 1

    def add(self, rank: int, capacity: int, *, planned: bool) -> Slot:
        slot = Slot(id=self._next_id, rank=rank, capacity=capacity, planned=planned)
        self._next_id += 1
        self._held[slot.id] = slot
        return slot

    def remove(self, slot: Slot) -> None:
        assert slot.state is SlotState.FREE, slot
        del self._held[slot.id]

    def all(self) -> list[Slot]:
        return list(self._held.values())

    def of(self, rank: int) -> list[Slot]:
        return [slot for slot in self._held.values() if slot.rank == rank]

    def owned(self, slot_id: int, rank: int, *states: SlotState) -> Slot:
        """The slot of this number, which a rank owns and which is in one of these states."""
        slot = self._held.get(slot_id)
        if slot is None or slot.rank != rank:
            raise ProtocolError(f"slot {slot_id} does not belong to rank {rank}")
        if slot.state not in states:
            raise ProtocolError(f"slot {slot_id} is {slot.state.value}")
        return slot

    def begin(self, slot: Slot, snapshot: Snapshot) -> None:
        self._fill(slot, SlotState.FILLING)
        slot.snapshot, slot.image_rank = snapshot, slot.rank

    def load(self, slot: Slot) -> None:
        self._fill(slot, SlotState.LOADING)

    def sealing(self, slot: Slot, image_bytes: int) -> None:
        if not 0 < image_bytes <= slot.capacity:
            raise ProtocolError(f"an image of {image_bytes} bytes in a slot of {slot.capacity}")
        slot.state, slot.image_bytes = SlotState.SEALING, image_bytes

    def sealed(self, slot: Slot) -> None:
        slot.state = SlotState.SEALED

    def adopted(self, slot: Slot, snapshot: Snapshot, image_rank: int, image_bytes: int) -> None:
        self.sealing(slot, image_bytes)
        slot.state, slot.snapshot, slot.image_rank = SlotState.SEALED, snapshot, image_rank

    def release(self, slot: Slot) -> None:
        """The owner wants no more of what it loaded. Raises ProtocolError for an image that was not loaded."""
        if slot.state is SlotState.SEALED and slot.snapshot is not None and not slot.snapshot.adopted:
            raise ProtocolError(f"slot {slot.id} holds an image of this run; it is freed when a newer one is complete")
        if slot.state is SlotState.LOADING:
            self.clear(slot)
        else:
            slot.released = True

    def clear(self, slot: Slot) -> None:
        """Forget the image. Its bytes may be overwritten from now on."""
        assert slot.pins == 0, slot
        if slot.snapshot is not None:
            slot.snapshot.gone = True
        slot.state, slot.snapshot, slot.image_bytes, slot.released = SlotState.FREE, None, 0, False

    def recycle(self, withdrawn: Callable[[Slot], bool] = lambda slot: True) -> list[Slot]:
        """Free every slot whose image is not needed any more; returns them. Safe to call at any time.

        `withdrawn(slot)` is asked last: whether nobody else reads the image either, from now on.
        """
        freed = [slot for slot in self._held.values() if self._recyclable(slot) and withdrawn(slot)]
        for slot in freed:
            self.clear(slot)
        return freed

    def sealed_images(self) -> list[Slot]:
        return [slot for slot in self._held.values() if slot.state is SlotState.SEALED]

    def find(self, image_rank: int, step: int, world_size: int | None, slot_id: int | None = None) -> Slot | None:
        """The slot with a sealed image; of several attempts at the step a complete one, and of these the latest."""

        def fits(slot: Slot) -> bool:
            snapshot = slot.snapshot
            assert snapshot is not None
            world_fits = world_size is None or snapshot.world_size == world_size
            fits_slot = slot_id is None or slot.id == slot_id
            return slot.image_rank == image_rank and snapshot.step == step and world_fits and fits_slot

        def merit(slot: Slot) -> tuple[bool, bool, int]:
            assert slot.snapshot is not None
            return slot.snapshot.is_complete(), not slot.snapshot.superseded, slot.snapshot.key

        return max(filter(fits, self.sealed_images()), key=merit, default=None)

    def _fill(self, slot: Slot, state: SlotState) -> None:
        assert slot.state is SlotState.FREE, slot
        slot.state, slot.fill = state, slot.fill + 1

    def _recyclable(self, slot: Slot) -> bool:
        if slot.state is not SlotState.SEALED or slot.pins:
            return False
        assert slot.snapshot is not None
        return slot.released or not self._snapshots.is_needed(slot.snapshot)
