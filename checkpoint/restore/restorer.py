"""Restore: facts from every rank, one decision, verified images, then into the live state.

    facts (agent, local store, durable store) → decide → open → propose → fill block by block → all well everywhere?
                                                  ▲        │                                          │ no
                                                  └────────┴──── what is damaged is left out ─────────┘
Every block is verified. In a fresh process, whose state is worth nothing yet, blocks go into the state meanwhile, and
damage sends all ranks to the next copy. A run that goes back has every image verified as a whole, on all ranks, before
it overwrites anything. Collective; on the training thread.
"""

import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

from resilient.checkpoint.agent.client import AgentClient
from resilient.checkpoint.agent.memory import private_memory
from resilient.checkpoint.extras import Extras
from resilient.checkpoint.leaves import Leaves, no_collection
from resilient.checkpoint.levels.image_io import read_image_range, read_record
from resilient.checkpoint.restore.blocks import LOST, why
from resilient.checkpoint.restore.decide import Damaged, Decision, Place, decide
from resilient.checkpoint.restore.exchange import receive_remote
from resilient.checkpoint.restore.images import Image
from resilient.checkpoint.restore.load import Proposal, is_cut_otherwise
from resilient.checkpoint.restore.looking import Lookout
from resilient.checkpoint.restore.reshape import Reshaper
from resilient.checkpoint.restore.same_shape import agreed_proposal
from resilient.checkpoint.restore.scatter import Scatter
from resilient.checkpoint.restore.source import InMemory, InStore
from resilient.checkpoint.world import World
from resilient.errors import ResilientError
from resilient.policy import Policy

_log = logging.getLogger("resilient")
_MIXED = "blocks of a damaged snapshot have been loaded: do not train on with this state, load or make it anew"
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Restored:
    """What a restore did. `levels[r]` is where the image came from of rank r of the job that made the snapshot;
    `seconds` from the call to the end. `read_bytes`: what this rank read of images; None where each rank read its own,
    whole. `read_records`: of how many images it has read the record, or been told of pieces.
    """

    step: int
    levels: dict[int, str]
    reason: str
    seconds: float
    bytes: int
    notes: tuple[str, ...] = ()
    read_bytes: int | None = None
    read_records: int = 0


class _CutOtherwise(Exception):
    """This job is cut otherwise than the one that made the snapshot. Never leaves this module."""


class Restorer:
    """One restore. Made and used on the training thread of every rank.

    Whatever fails on one rank is raised on all of them (`World.together`): a rank that left alone would hold up the
    others at their next collective.
    """

    def __init__(
        self,
        client: AgentClient,
        world: World,
        state: Mapping[str, object],
        found: Leaves,
        url: str,
        policy: Policy,
        *,
        fresh: bool,
        peers: bool = False,
        steps: Collection[int] | None = None,
    ) -> None:
        """`found`: the state as it is, walked. `fresh`: it is worth nothing yet, so blocks may be loaded before others
        are verified. `peers`: whether the agents of other nodes can be asked for images.
        `steps`: no others count; None: all do.
        """
        self._client = client
        self._world = world
        self._state = state
        self._found = found
        self._policy = policy
        self._lookout = Lookout(client, world, url, policy, peers=peers, steps=steps)
        self._fresh = fresh
        self._mixed = False  # whether blocks of an image that turned out to be damaged are in the state
        self._records = 0  # of how many images this rank knows the record, or some pieces
        self._slot = 0  # where this rank's opened image lies in the agent's memory
        self._adopted = 0  # the same, if it was read into there from another level or node

    def restore(self, extras: Extras) -> Restored | None:
        """Load the newest snapshot that every rank can verify; None where there is none. See Checkpointer.restore."""
        try:
            with no_collection():
                return self._restore(extras)
        except ResilientError as error:
            if self._mixed:
                error.add_note(_MIXED)
            raise

    def newest(self) -> int | None:
        """The step that `restore` would try first; no image is read. Raises as it does, too."""
        decision = decide(self._lookout.facts())
        if decision.action not in ("restore", "reshape"):
            self._refuse_or_say_nothing_is_there(decision)
            return None
        return decision.step

    def _restore(self, extras: Extras) -> Restored | None:
        began = time.perf_counter()
        facts = self._lookout.facts()
        damaged: Damaged = frozenset()
        while True:  # bounded: each turn adds to `damaged`, of which there are finitely many
            decision = decide(facts, damaged)
            if decision.action not in ("restore", "reshape"):
                self._refuse_or_say_nothing_is_there(decision)
                return None
            if decision.action == "reshape":
                restored, found = self._reshape(decision, extras, began)
            else:
                try:
                    restored, found = self._restore_as_it_was(decision, extras, began)
                except _CutOtherwise:  # on all ranks
                    restored, found = self._reshape(self._with_places(decision), extras, began)
            if restored is not None:
                return restored
            damaged |= found

    def _restore_as_it_was(self, decision: Decision, extras: Extras, began: float) -> tuple[Restored | None, Damaged]:
        """The snapshot of a job that was cut as this one is: each rank takes its own image. Raises _CutOtherwise."""
        with ExitStack() as opened:
            opened.callback(self._let_go)
            image, found = self._open_everywhere(decision, opened)
            if image is None or found:
                return None, found
            proposal, found = self._fill(decision, image)
            if found:
                return None, found
            notes = self._complete(decision, image, proposal, extras, opened)
            self._keep()
        restored = Restored(
            step=decision.step,
            levels=dict(enumerate(decision.levels)),
            reason=decision.reason,
            seconds=time.perf_counter() - began,
            bytes=sum(span.nbytes for span in proposal.flat),
            notes=tuple(notes),
            read_records=self._records,
        )
        return restored, frozenset()

    def _with_places(self, decision: Decision) -> Decision:
        """The same decision for a job of as many ranks that is cut otherwise: who can reach which image."""
        nodes = self._world.nodes
        places = []
        for rank, level in enumerate(decision.levels):
            near = tuple(other for other, node in enumerate(nodes) if node == nodes[rank])
            places.append(Place(level, {"durable": (), "parity": (rank,)}.get(level, near)))
        return replace(decision, action="reshape", places=tuple(places), reason=f"{decision.reason}, cut otherwise")

    def _reshape(self, decision: Decision, extras: Extras, began: float) -> tuple[Restored | None, Damaged]:
        """Take what this job needs of a snapshot that a job of another size has made."""
        stores = self._lookout.stores
        with ExitStack() as opened:
            reshaper = Reshaper(
                self._client, self._world, self._state, self._found, stores, decision, opened, self._policy
            )
            done, damaged = reshaper.run(extras, fresh=self._fresh)
        self._mixed = self._mixed or (reshaper.touched and bool(damaged))
        if done is None:
            return None, damaged
        levels = {rank: place.level for rank, place in enumerate(decision.places)}
        if "memory" not in levels.values():
            self._keep()
        if self._world.rank == 0:
            _log.info("restored: %s", decision.reason)
        for note in done.notes:
            _log.warning("rank %d: %s", self._world.rank, note)
        restored = Restored(
            step=decision.step,
            levels=levels,
            reason=decision.reason,
            seconds=time.perf_counter() - began,
            bytes=done.nbytes,
            notes=tuple(done.notes),
            read_bytes=done.read_bytes,
            read_records=done.records,
        )
        return restored, frozenset()

    def _refuse_or_say_nothing_is_there(self, decision: Decision) -> None:
        if decision.action == "refuse":
            raise decision.error(f"restore refused: {decision.reason}")
        if self._world.rank == 0:
            _log.info("nothing to restore: %s", decision.reason)

    # ---- opening

    def _open_everywhere(self, decision: Decision, opened: ExitStack) -> tuple[Image | None, Damaged]:
        """Open this rank's image; then agree. Returns the image and what is damaged on any rank."""
        world, step = self._world, decision.step
        image, problem = self._attempt(decision, lambda: self._open(step, decision.levels[world.rank], opened))
        outcomes = world.gather([problem, "" if image is None else image.record.life])
        found = {(step, rank, decision.levels[rank]) for rank, (text, _) in enumerate(outcomes) if text}
        lives = [life for text, life in outcomes if not text]
        if not found and len(set(lives)) > 1:
            # Ranks of two lives of the job wrote this step: it looks complete but is of two trajectories.
            found = {(step, rank, decision.levels[rank]) for rank, life in enumerate(lives) if life != max(lives)}
            _log.warning("step %d was written by two lives of the job; passed over", step)
        return image, frozenset(found)

    def _attempt(self, decision: Decision, work: Callable[[], T]) -> tuple[T | None, str]:
        """What `work` returns, or why this rank's image cannot be used. Anything else is raised, on all ranks."""

        def attempt() -> tuple[T | None, str]:
            try:
                return work(), ""
            except LOST as error:
                problem = why(error)
                rank, level = self._world.rank, decision.levels[self._world.rank]
                _log.warning("rank %d: step %d at level %s cannot be used: %s", rank, decision.step, level, problem)
                return None, problem

        return self._world.together(attempt)

    def _open(self, step: int, level: str, opened: ExitStack) -> Image:
        """This rank's image; only its header and objects are read and verified by now."""
        rank, size = self._world.rank, self._world.world_size
        if level in ("memory", "parity"):
            slot = self._recover(step) if level == "parity" else None
            mapped = opened.enter_context(self._client.map_image(rank, step, size, slot_id=slot))
            self._slot = mapped.slot_id
            return Image(InMemory(mapped.record, level, mapped.view, read=mapped.read))
        store = self._lookout.stores[level]
        record = read_record(store, step, rank, size)
        source = InStore(record, level, partial(read_image_range, store, record))
        opened.callback(source.close)
        if not is_cut_otherwise(record, self._found):
            source.begin()
        return Image(source)

    def _recover(self, step: int) -> int:
        """This rank's image, fetched from other nodes into the memory of this one's agent; the slot that it is in."""
        self._adopted = self._client.recover(step, self._policy.write_timeout_s)
        return self._adopted

    # ---- filling the state from this rank's image

    def _fill(self, decision: Decision, image: Image) -> tuple[Proposal, Damaged]:
        """Fill what this rank's own image has; then agree. Returns what is wanted, and what turned out damaged."""
        proposal, self._records = agreed_proposal(self._world, image, self._state, self._found)
        rows = self._world.gather([sorted({span.image_rank for span in proposal.flat}), proposal.cut_otherwise])
        if any(cut for _, cut in rows):
            raise _CutOtherwise
        needs = [ranks for ranks, _ in rows]
        shared = any(self._world.rank in ranks for rank, ranks in enumerate(needs) if rank != self._world.rank)
        if not self._fresh:
            damaged = self._agree(decision, lambda: self._hold(image, shared))
            if damaged:
                return proposal, damaged

        def fill() -> None:
            if shared and isinstance(image.source, InStore):
                self._hold(image, shared)
            proposal.install()
            image.source.load(Scatter(span for span in proposal.flat if span.image_rank == image.record.rank))

        damaged = self._agree(decision, fill)
        self._mixed = self._mixed or bool(damaged)
        return proposal, damaged

    def _agree(self, decision: Decision, work: Callable[[], None]) -> Damaged:
        """Do this rank's part; then all learn whose images cannot be used after all."""
        _, problem = self._attempt(decision, work)
        outcomes = self._world.gather(problem)
        return frozenset((decision.step, rank, decision.levels[rank]) for rank, text in enumerate(outcomes) if text)

    def _hold(self, image: Image, shared: bool) -> None:
        """Have the whole image in memory, verified; in the agent's, where other ranks of this node read it too."""
        source = image.source
        if isinstance(source, InMemory):
            source.verify()
        elif isinstance(source, InStore):
            size = image.record.image_bytes
            image.source = source.hold(self._shared_memory(size) if shared else private_memory(size))
            if shared:
                self._client.adopt(self._adopted, image.record.step, image.record)

    def _shared_memory(self, size: int) -> memoryview:
        """A buffer of the agent: the other ranks of this node read our image too, once it is adopted."""
        slot = self._client.scratch(size, self._policy.budget_bytes(size))
        self._adopted = self._slot = slot.id
        return slot.view[:size]

    def _let_go(self) -> None:
        """Give back the buffer of an image that is not used after all."""
        slot, self._adopted, self._slot = self._adopted, 0, 0
        if slot:
            with suppress(ResilientError):
                self._client.release(slot)

    def _keep(self) -> None:
        """The training goes on from the opened image: it stays, and this rank's other images need not."""
        self._adopted = 0
        with suppress(ResilientError):  # without its agent the rank still has its state; the next save finds another
            self._client.restored(self._slot)

    # ---- filling the rest

    def _complete(
        self, decision: Decision, image: Image, proposal: Proposal, extras: Extras, opened: ExitStack
    ) -> list[str]:
        """Fill what the images of other ranks have, which they have verified by now; then everything else."""
        rank, node = self._world.rank, self._world.node_ranks
        slots = self._world.gather(self._slot)
        self._world.together(lambda: self._fill_from_neighbours(decision.step, proposal, slots, opened))
        elsewhere = [span for span in proposal.flat if span.image_rank not in node]
        receive_remote(self._world, elsewhere, image.source if isinstance(image.source, InMemory) else None)
        # Together also because nobody may let go of an image that another rank still reads.
        notes = self._world.together(lambda: extras.apply(image.objects, self._found, image.groups()))
        if rank == 0:
            _log.info("restored: %s", decision.reason)
        for note in notes:
            _log.warning("rank %d: %s", rank, note)
        return notes

    def _fill_from_neighbours(self, step: int, proposal: Proposal, slots: Sequence[int], opened: ExitStack) -> None:
        """From the images of this node that are needed: the very ones that their ranks have verified."""
        needed = {span.image_rank for span in proposal.flat} & set(self._world.node_ranks) - {self._world.rank}
        for rank in sorted(needed):
            mapped = self._client.map_image(rank, step, self._world.world_size, slot_id=slots[rank])
            view = opened.enter_context(mapped).view
            scatter = Scatter(span for span in proposal.flat if span.image_rank == rank)
            InMemory(mapped.record, "memory", view, verified=True).stream(scatter.take)
