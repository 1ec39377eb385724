"""The memory of the images: how much each rank has within its budget, made, kept, given back. Joins slots with memory.

Decides by the plans of the ranks, and by what older images still take. Buffers that are made get their pages in the
background. What is in a buffer is the business of `images.py`. Everything here runs on the loop.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from resilient.checkpoint.agent.memory import PAGE_BYTES, Memory, available_bytes, check_room, prefault, whole_pages
from resilient.checkpoint.agent.slots import Slot, Slots, SlotState
from resilient.checkpoint.agent.snapshots import Snapshots
from resilient.errors import OverBudget


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


class Pool:
    """All buffers of this node, by slot. `plans`: of the ranks that are there; `forget` is told what is given back."""

    def __init__(self, slots: Slots, snapshots: Snapshots, forget: Callable[[Slot], object]) -> None:
        self.plans: dict[int, Plan] = {}
        self._slots = slots
        self._snapshots = snapshots
        self._forget = forget
        self._memory: dict[int, Memory] = {}
        self._budgets: dict[int, int] = {}  # of each slot: the budget that it was made under
        self._stopped = threading.Event()

    def plan(self, rank: int, plan: Plan) -> list[Slot]:
        """The buffers of a rank for images of this plan, as many as fit its budget by now.

        There may be none yet, where an image is only waited for to be written. Raises OverBudget where none would come.
        """
        _check_budget(plan.slots * plan.capacity, plan)
        self.plans[rank] = plan
        for slot in self._slots.of(rank):
            slot.planned = False
        self._reuse(rank, plan)
        self._give_back_unplanned()
        made, problem = self._top_up(rank)
        planned = [slot for slot in self._slots.of(rank) if slot.planned]
        if not planned and (problem or not self._will_fit(rank, plan)):
            del self.plans[rank]
            raise problem or OverBudget(
                f"rank {rank}: older images that are still needed take {self._bytes_of(rank)} bytes of its memory "
                f"budget of {plan.budget_bytes}, so that not one of {plan.capacity} bytes fits; raise memory_budget"
            )
        self._prefault(made)
        return planned

    def scratch(self, rank: int, image_bytes: int, budget_bytes: int) -> Slot:
        """A free buffer of a rank that is in no plan, with room for an image. Raises OverBudget."""
        idle = [slot for slot in self._slots.of(rank) if slot.state is SlotState.FREE and not slot.planned]
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
        slot = self._make(rank, capacity, budget_bytes, planned=False)
        self._prefault([slot])
        return slot

    def balance(self) -> list[tuple[int, list[Slot]]]:
        """Give memory back that is in no plan; the buffers that are made of what there is room for now, by rank."""
        self._give_back_unplanned()
        made = [(rank, self._top_up(rank)[0]) for rank in self.plans]
        self._prefault([slot for _, slots in made for slot in slots])
        return made

    def fd(self, slot: Slot) -> int:
        return self._memory[slot.id].fd

    def read_only_fd(self, slot: Slot) -> int:
        """A new descriptor that can be mapped for reading only."""
        return self._memory[slot.id].read_only_fd()

    def view(self, slot: Slot) -> memoryview:
        return self._memory[slot.id].view

    def stop(self) -> None:
        """Let the threads that make pages end."""
        self._stopped.set()

    def drop(self) -> None:
        """Give all memory back, as soon as nobody looks at it any more."""
        for memory in self._memory.values():
            memory.drop()

    def _reuse(self, rank: int, plan: Plan) -> None:
        """Put buffers that are there into the plan: those with images first, for they cannot be given back."""
        loading = SlotState.LOADING
        there = [slot for slot in self._slots.of(rank) if slot.state is not loading and not self._is_foreign(slot)]
        fitting = [slot for slot in there if slot.capacity >= plan.capacity]
        fitting.sort(key=lambda each: (each.state is SlotState.FREE, each.capacity))
        total = self._bytes_of(rank, without_free=True)
        limit = plan.budget_bytes + plan.slots * PAGE_BYTES
        for slot in fitting[: plan.slots]:
            if slot.capacity * plan.slots > limit:
                continue  # so large that the others would not fit beside it: it goes when its image is not needed
            if slot.state is SlotState.FREE:
                if total + slot.capacity > limit:
                    continue
                total += slot.capacity
            slot.planned = True

    def _top_up(self, rank: int) -> tuple[list[Slot], OverBudget | None]:
        """New buffers, up to what the rank's plan and its budget say, and why there are no more of them.

        Where the node is short of memory it is tried again after the next change.
        """
        plan = self.plans[rank]
        made: list[Slot] = []
        capacity = whole_pages(plan.capacity)
        limit = self._limit(rank, plan)
        there = sum(slot.planned for slot in self._slots.of(rank))
        while there + len(made) < plan.slots and self._bytes_of(rank) + capacity <= limit:
            try:
                made.append(self._make(rank, capacity, plan.budget_bytes, planned=True))
            except OverBudget as error:
                return made, error
        return made, None

    def _limit(self, rank: int, plan: Plan) -> int:
        """What a rank's buffers may take. Where the state has become smaller, an image of the larger one stays within
        the budget that it was made under until it is not needed any more: beside it there must be room for the next.
        """
        older = [self._budgets[slot.id] for slot in self._older(rank)]
        return max([plan.budget_bytes, *older]) + plan.slots * PAGE_BYTES

    def _older(self, rank: int) -> list[Slot]:
        """The buffers that hold images of this job, or are being filled."""
        used = [slot for slot in self._slots.of(rank) if slot.state is not SlotState.FREE]
        return [slot for slot in used if not self._is_foreign(slot)]

    def _will_fit(self, rank: int, plan: Plan) -> bool:
        """Whether there is room for an image once only one of the older ones is needed, as it is in the end."""
        older = [slot.capacity for slot in self._older(rank)]
        return max(older, default=0) + whole_pages(plan.capacity) <= self._limit(rank, plan)

    def _make(self, rank: int, capacity: int, budget_bytes: int, *, planned: bool) -> Slot:
        promised = sum(memory.missing_bytes() for memory in self._memory.values())
        check_room(capacity, available_bytes() - promised)
        memory = Memory(capacity, f"rank{rank}")
        slot = self._slots.add(rank, capacity, planned=planned)
        self._memory[slot.id] = memory
        self._budgets[slot.id] = budget_bytes
        return slot

    def _give_back_unplanned(self) -> None:
        """Free memory that no plan holds. A trainer keeps what it had until it plans: it will want the same."""
        for slot in self._slots.all():
            settled = slot.rank in self.plans or slot.rank not in self._snapshots.node_ranks
            if slot.state is SlotState.FREE and not slot.planned and not slot.pins and settled:
                self._give_back(slot)

    def _give_back(self, slot: Slot) -> None:
        self._slots.remove(slot)
        self._forget(slot)
        del self._budgets[slot.id]
        self._memory.pop(slot.id).drop()

    def _bytes_of(self, rank: int, *, without_free: bool = False) -> int:
        slots = [slot for slot in self._slots.of(rank) if not self._is_foreign(slot)]
        return sum(slot.capacity for slot in slots if not (without_free and slot.state is SlotState.FREE))

    def _is_foreign(self, slot: Slot) -> bool:
        """Whether it holds an image of a job with another number of ranks.

        Such a job has gone on from it, and it stays until a snapshot of the new job is complete; meanwhile it is
        beyond the budget, for larger than a rank's own it could leave no room for the first of these.
        """
        return slot.snapshot is not None and slot.snapshot.world_size not in (0, self._snapshots.world_size)

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
