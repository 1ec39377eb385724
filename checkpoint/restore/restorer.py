"""Restore: facts from every rank, one decision, verified images, then into the live state.

    facts (agent, local store, durable store) → decide → open and verify → all well on every rank? → load
                                                  ▲            │ no: what is damaged is left out
                                                  └────────────┘
Nothing of the live state is overwritten before every rank has verified its image. Collective; the training thread.
"""

import logging
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass

from resilient.checkpoint.agent.client import AgentClient
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
from resilient.checkpoint.restore.load import Catalog, plan_load, run_load
from resilient.checkpoint.world import World
from resilient.errors import DamagedImage, LayoutMismatch, LevelFailed, NewerFormat, NotACheckpoint, RestoreError
from resilient.policy import Policy

_log = logging.getLogger("resilient")
_LOST = (DamagedImage, LevelFailed, FileNotFoundError)  # another level or step may still serve
_HOPELESS = (NewerFormat, NotACheckpoint)  # somebody has to look at this


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
    """One restore. Made and used on the training thread of every rank."""

    def __init__(
        self, client: AgentClient, world: World, state: Mapping[str, object], url: str, policy: Policy
    ) -> None:
        self._client = client
        self._world = world
        self._state = state
        self._policy = policy
        self._stores: dict[str, Store] = {"durable": open_store(url, retries=policy.retries)}
        if policy.local is not None:
            self._stores["local"] = open_store(policy.local, retries=policy.retries)

    def restore(self, extras: Extras) -> Restored | None:
        """Load the newest snapshot that every rank can verify; None where there is none. See Checkpointer.restore."""
        began = time.perf_counter()
        facts = [Facts.from_json(raw) for raw in self._world.gather(self._facts().to_json())]
        damaged: Damaged = frozenset()
        while True:  # bounded: each turn adds to `damaged`, of which there are finitely many
            decision = decide(facts, damaged)
            if decision.action != "restore":
                self._refuse_or_say_nothing_is_there(decision)
                return None
            with ExitStack() as opened:
                image, found = self._open_everywhere(decision, opened)
                if image is not None and not found:
                    loaded, notes = self._load(decision, image, extras, opened)
                    return Restored(
                        step=decision.step,
                        levels=dict(enumerate(decision.levels)),
                        reason=decision.reason,
                        seconds=time.perf_counter() - began,
                        bytes=loaded,
                        notes=tuple(notes),
                    )
            damaged |= found

    # ---- facts

    def _facts(self) -> Facts:
        """Where this rank's images are. Only rank 0 lists the durable level, for all."""
        world = self._world
        listed = None
        if world.rank == 0:
            listed = [[step, size] for step, size in complete_steps(self._stores["durable"].list()).items()]
        durable = dict(next(rows for rows in world.gather(listed) if rows is not None))
        steps = {"durable": tuple(step for step, size in durable.items() if size == world.world_size)}
        steps["memory"] = tuple(
            image.step
            for image in self._client.images()
            if image.rank == world.rank and image.world_size == world.world_size
        )
        if "local" in self._stores:
            steps["local"] = tuple(
                step
                for step, sizes in records_by_step(self._stores["local"].list()).items()
                if world.rank in sizes.get(world.world_size, set())
            )
        others = {step: size for step, size in durable.items() if size != world.world_size}
        return Facts(rank=world.rank, steps=steps, other_worlds=others)

    def _refuse_or_say_nothing_is_there(self, decision: Decision) -> None:
        if decision.action == "refuse":
            known = decision.reason.startswith("the newest complete snapshot")
            raise (LayoutMismatch if known else RestoreError)(f"restore refused: {decision.reason}")
        if self._world.rank == 0:
            _log.info("nothing to restore: %s", decision.reason)

    # ---- opening

    def _open_everywhere(self, decision: Decision, opened: ExitStack) -> tuple[Image | None, Damaged]:
        """Open this rank's image; then agree. Returns the image and what is damaged on any rank."""
        world, step, level = self._world, decision.step, decision.levels[self._world.rank]
        image: Image | None = None
        problem, hopeless, life = "", "", ""
        try:
            image = self._open(step, level, opened)
            life = image.record.life
        except _LOST as error:
            problem = str(error) or type(error).__name__
            _log.warning("rank %d: step %d at level %s cannot be used: %s", world.rank, step, level, problem)
        except _HOPELESS as error:
            hopeless = f"rank {world.rank}: {error}"
        outcomes = world.gather([problem, hopeless, life])
        for _, text, _ in outcomes:
            if text:
                raise NotACheckpoint(text)
        found = {(step, rank, decision.levels[rank]) for rank, (text, _, _) in enumerate(outcomes) if text}
        lives = [life for text, _, life in outcomes if not text]
        if not found and len(set(lives)) > 1:
            # Ranks of two lives of the job wrote this step: it looks complete but is of two trajectories.
            found = {(step, rank, decision.levels[rank]) for rank, life in enumerate(lives) if life != max(lives)}
            _log.warning("step %d was written by two lives of the job; passed over", step)
        return image, frozenset(found)

    def _open(self, step: int, level: str, opened: ExitStack) -> Image:
        """This rank's verified image, in memory. From a lower level it becomes an image of the memory level too."""
        if level == "memory":
            mapped = opened.enter_context(self._client.map_image(self._world.rank, step))
            verify(mapped.view, mapped.record, level)
            return Image(mapped.record, mapped.view)
        store = self._stores[level]
        record = read_record(store, step, self._world.rank, self._world.world_size)
        slot = self._client.scratch(record.image_bytes, self._policy.budget_bytes(record.image_bytes))
        view = slot.view[: record.image_bytes]
        try:
            read_verified(lambda offset, part: read_image_range(store, record, offset, part), record, view, level)
        except BaseException:
            self._client.release(slot)
            raise
        self._client.adopt(slot, step, record)
        return Image(record, view)

    # ---- loading

    def _load(self, decision: Decision, image: Image, extras: Extras, opened: ExitStack) -> tuple[int, list[str]]:
        records = self._records(image)
        pieces = [piece for record, begins in records for piece in stored_pieces(record, begins)]
        objects = image.objects()
        ranges = plan_load(self._state, Catalog(pieces, self._world.rank), objects)
        needed = {span.image_rank for span in ranges}
        views = {self._world.rank: image.view}
        for rank in sorted(needed & set(self._world.node_ranks) - {self._world.rank}):
            views[rank] = opened.enter_context(self._client.map_image(rank, decision.step)).view
        loaded = run_load([span for span in ranges if span.image_rank in views], views)
        loaded += receive_remote(self._world, [span for span in ranges if span.image_rank not in views], image)
        notes = extras.apply(objects, walk(self._state), image.groups())
        self._world.gather(None)  # nobody lets go of an image that another rank still reads
        if self._world.rank == 0:
            _log.info("restored: %s", decision.reason)
        for note in notes:
            _log.warning("rank %d: %s", self._world.rank, note)
        return loaded, notes

    def _records(self, image: Image) -> list[tuple[Record, int]]:
        """Every rank's record, and where the data of its image begins."""
        if self._world.world_size == 1:
            return [(image.record, image.data_start)]
        rows = self._world.gather([image.record.text(), image.data_start])
        return [(parse_record(text, f"the record of rank {rank}"), begins) for rank, (text, begins) in enumerate(rows)]
