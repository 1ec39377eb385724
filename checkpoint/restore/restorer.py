"""Restore: facts from every rank, one decision, verified images, then into the live state.

    facts (agent, local store, durable store) → decide → open and verify → all well on every rank? → load
                                                  ▲            │ no: what is damaged is left out
                                                  └────────────┘
Nothing of the live state is overwritten before every rank has verified its image. Collective; the training thread.
"""

import logging
import mmap
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from resilient import errors
from resilient.checkpoint.agent.client import AgentClient, Slot
from resilient.checkpoint.extras import Extras
from resilient.checkpoint.leaves import walk
from resilient.checkpoint.levels.image_io import read_image_range, read_record
from resilient.checkpoint.levels.open import open_store
from resilient.checkpoint.levels.store import Store
from resilient.checkpoint.names import complete_steps, records_by_step
from resilient.checkpoint.record import Record, parse_record
from resilient.checkpoint.restore.decide import Damaged, Decision, Facts, decide
from resilient.checkpoint.restore.exchange import receive_remote
from resilient.checkpoint.restore.images import Image, read_verified, stored_pieces, verify
from resilient.checkpoint.restore.load import Catalog, Proposal, propose, run_load
from resilient.checkpoint.world import World
from resilient.errors import DamagedImage, LevelFailed, ResilientError, RestoreError
from resilient.policy import Policy

_log = logging.getLogger("resilient")
_LOST = (DamagedImage, LevelFailed, FileNotFoundError)  # another level or step may still serve
T = TypeVar("T")


def _private_memory(size: int) -> memoryview:
    """A buffer of this process, in huge pages where they are to be had: four times quicker to fill than shared ones."""
    memory = mmap.mmap(-1, max(1, size), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(memory)


@dataclass(frozen=True, slots=True, kw_only=True)
class Restored:
    """What a restore did. `levels[r]` is where rank r's image came from; `seconds` from the call to the end."""

    step: int
    levels: dict[int, str]
    reason: str
    seconds: float
    bytes: int
    notes: tuple[str, ...] = ()


class Restorer:
    """One restore. Made and used on the training thread of every rank.

    Whatever fails on one rank is raised on all of them (`_together`): a rank that left alone would hold up the others
    at their next collective.
    """

    def __init__(
        self, client: AgentClient, world: World, state: Mapping[str, object], url: str, policy: Policy
    ) -> None:
        self._client = client
        self._world = world
        self._state = state
        self._policy = policy
        self._urls = {"durable": url} | ({} if policy.local is None else {"local": policy.local})
        self._stores: dict[str, Store] = {}
        self._slot = 0  # where this rank's opened image lies in the agent's memory
        self._adopted: Slot | None = None  # the same, if it was read into there from a lower level

    def restore(self, extras: Extras) -> Restored | None:
        """Load the newest snapshot that every rank can verify; None where there is none. See Checkpointer.restore."""
        began = time.perf_counter()
        facts = self._facts()
        damaged: Damaged = frozenset()
        while True:  # bounded: each turn adds to `damaged`, of which there are finitely many
            decision = decide(facts, damaged)
            if decision.action != "restore":
                self._refuse_or_say_nothing_is_there(decision)
                return None
            with ExitStack() as opened:
                opened.callback(self._let_go)
                image, found = self._open_everywhere(decision, opened)
                if image is not None and not found:
                    loaded, notes = self._load(decision, image, extras, opened)
                    self._keep()
                    return Restored(
                        step=decision.step,
                        levels=dict(enumerate(decision.levels)),
                        reason=decision.reason,
                        seconds=time.perf_counter() - began,
                        bytes=loaded,
                        notes=tuple(notes),
                    )
            damaged |= found

    def _together(self, work: Callable[[], T]) -> T:
        """Do this rank's part; return when all ranks have done theirs, and raise on all if it failed on any."""
        results: list[T] = []
        failure: Exception | None = None
        try:
            results.append(work())
        except Exception as error:  # whatever it is, a user's load_state_dict's too, the other ranks must not wait
            failure = error
        outcomes = self._world.gather(None if failure is None else [type(failure).__name__, str(failure)])
        if failure is not None:
            raise failure
        for rank, outcome in enumerate(outcomes):
            if outcome is not None:
                raise _error_named(outcome[0])(f"rank {rank}: {outcome[1]}")
        return results[0]

    # ---- facts

    def _facts(self) -> list[Facts]:
        """Where every rank's images are. Only rank 0 lists the durable level, for all."""
        world = self._world
        rows = world.gather(self._together(self._look))
        durable = dict(rows[0]["durable"])
        ours = tuple(step for step, size in durable.items() if size == world.world_size)
        others = {step: size for step, size in durable.items() if size != world.world_size}
        return [
            Facts(
                rank=rank,
                steps={"memory": tuple(row["memory"]), "local": tuple(row["local"]), "durable": ours},
                other_worlds=others,
                unseen=tuple(row["unseen"]),
            )
            for rank, row in enumerate(rows)
        ]

    def _look(self) -> dict[str, Any]:
        """What this rank can see: steps in memory and on the local level, and on rank 0 what is durable."""
        rank, size = self._world.rank, self._world.world_size
        self._stores = {level: open_store(url, retries=self._policy.retries) for level, url in self._urls.items()}
        images = self._client.images()
        unseen: list[str] = []
        local = records_by_step(self._names("local", unseen))
        durable = complete_steps(self._names("durable", unseen)) if rank == 0 else {}
        return {
            "memory": sorted({image.step for image in images if (image.rank, image.world_size) == (rank, size)}),
            "local": [step for step, sizes in local.items() if rank in sizes.get(size, ())],
            "durable": list(durable.items()),
            "unseen": unseen,
        }

    def _names(self, level: str, unseen: list[str]) -> list[str]:
        """What a level lists. One that is out of reach is noted, for the others may still serve."""
        try:
            return self._stores[level].list() if level in self._stores else []
        except LevelFailed as error:
            unseen.append(f"rank {self._world.rank}: {error}")
            _log.warning("rank %d: level %s cannot be looked at: %s", self._world.rank, level, error)
            return []

    def _refuse_or_say_nothing_is_there(self, decision: Decision) -> None:
        if decision.action == "refuse":
            raise decision.error(f"restore refused: {decision.reason}")
        if self._world.rank == 0:
            _log.info("nothing to restore: %s", decision.reason)

    # ---- opening

    def _open_everywhere(self, decision: Decision, opened: ExitStack) -> tuple[Image | None, Damaged]:
        """Open this rank's image; then agree. Returns the image and what is damaged on any rank."""
        world, step = self._world, decision.step
        image, problem = self._together(lambda: self._try_to_open(step, decision.levels[world.rank], opened))
        outcomes = world.gather([problem, "" if image is None else image.record.life])
        found = {(step, rank, decision.levels[rank]) for rank, (text, _) in enumerate(outcomes) if text}
        lives = [life for text, life in outcomes if not text]
        if not found and len(set(lives)) > 1:
            # Ranks of two lives of the job wrote this step: it looks complete but is of two trajectories.
            found = {(step, rank, decision.levels[rank]) for rank, life in enumerate(lives) if life != max(lives)}
            _log.warning("step %d was written by two lives of the job; passed over", step)
        return image, frozenset(found)

    def _try_to_open(self, step: int, level: str, opened: ExitStack) -> tuple[Image | None, str]:
        """This rank's image, or why it cannot be used. Raises what somebody has to look at."""
        try:
            return self._open(step, level, opened), ""
        except _LOST as error:
            problem = str(error) or type(error).__name__
            _log.warning("rank %d: step %d at level %s cannot be used: %s", self._world.rank, step, level, problem)
            return None, problem

    def _open(self, step: int, level: str, opened: ExitStack) -> Image:
        """This rank's verified image, in memory."""
        rank, size = self._world.rank, self._world.world_size
        if level == "memory":
            mapped = opened.enter_context(self._client.map_image(rank, step, size))
            verify(mapped.view, mapped.record, level)
            self._slot = mapped.slot_id
            return Image(mapped.record, mapped.view)
        store = self._stores[level]
        record = read_record(store, step, rank, size)
        alone = len(self._world.node_ranks) == 1
        view = _private_memory(record.image_bytes) if alone else self._shared_memory(record.image_bytes)
        read_verified(lambda offset, part: read_image_range(store, record, offset, part), record, view, level)
        if self._adopted is not None:
            self._client.adopt(self._adopted, step, record)
        return Image(record, view)

    def _shared_memory(self, size: int) -> memoryview:
        """A buffer of the agent: the other ranks of this node read our image too, once it is adopted."""
        slot = self._client.scratch(size, self._policy.budget_bytes(size))
        self._adopted, self._slot = slot, slot.id
        return slot.view[:size]

    def _let_go(self) -> None:
        """Give back the buffer of an image that is not used after all."""
        slot, self._adopted = self._adopted, None
        if slot is not None:
            with suppress(ResilientError):
                self._client.release(slot)

    def _keep(self) -> None:
        """The training goes on from the opened image: it stays, and this rank's other images need not."""
        self._adopted = None
        with suppress(ResilientError):  # without its agent the rank still has its state; the next save finds another
            self._client.restored(self._slot)

    # ---- loading

    def _load(self, decision: Decision, image: Image, extras: Extras, opened: ExitStack) -> tuple[int, list[str]]:
        sources = self._sources(image)

        def prepare() -> tuple[Any, Proposal, dict[int, memoryview]]:
            objects = image.objects()
            pieces = [piece for source in sources for piece in stored_pieces(source.record, source.begins)]
            proposal = propose(self._state, Catalog(pieces, self._world.rank), objects)
            return objects, proposal, self._views(proposal, image, sources, decision.step, opened)

        objects, proposal, views = self._together(prepare)
        here = [span for span in proposal.ranges if span.image_rank in views]
        elsewhere = [span for span in proposal.ranges if span.image_rank not in views]

        def fill() -> int:
            proposal.install()
            return run_load(here, views)

        loaded = self._together(fill) + receive_remote(self._world, elsewhere, image)
        # Together also because nobody may let go of an image that another rank still reads.
        notes = self._together(lambda: extras.apply(objects, walk(self._state), image.groups()))
        if self._world.rank == 0:
            _log.info("restored: %s", decision.reason)
        for note in notes:
            _log.warning("rank %d: %s", self._world.rank, note)
        return loaded, notes

    def _sources(self, image: Image) -> list["_Source"]:
        """The images of all ranks."""
        if self._world.world_size == 1:
            return [_Source(image.record, image.data_start, self._slot)]
        rows = self._world.gather([image.record.text(), image.data_start, self._slot])
        return [
            _Source(parse_record(text, f"the record of rank {rank}"), begins, slot)
            for rank, (text, begins, slot) in enumerate(rows)
        ]

    def _views(
        self, proposal: Proposal, image: Image, sources: Sequence["_Source"], step: int, opened: ExitStack
    ) -> dict[int, memoryview]:
        """The images of this node that are needed: the very ones that their ranks have verified."""
        views = {self._world.rank: image.view}
        needed = {span.image_rank for span in proposal.ranges} & set(self._world.node_ranks)
        for rank in sorted(needed - views.keys()):
            mapped = self._client.map_image(rank, step, self._world.world_size, slot_id=sources[rank].slot)
            views[rank] = opened.enter_context(mapped).view
        return views


@dataclass(frozen=True, slots=True)
class _Source:
    """One rank's image: its record, where its data begins, and where it lies in the memory of that rank's agent."""

    record: Record
    begins: int
    slot: int


def _error_named(name: str) -> type[Exception]:
    """The class of another rank's error, where it is one of ours."""
    kind = getattr(errors, name, None)
    return kind if isinstance(kind, type) and issubclass(kind, ResilientError) else RestoreError
