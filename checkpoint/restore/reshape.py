"""Reshaping restore: a snapshot of a job with another number of ranks, or another mesh, into this job's live state.

    the index of all images (`indexing.py`) → what this rank needs (`reshaped.py`) → its blocks, from wherever they are
    (`blocks.py`) → live tensors

No rank reads every record: only those of the images that it reads. Every block is verified before it is used; a state
that is worth something is touched only when all of them have been. Collective; on the training thread.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

from resilient.checkpoint.agent.client import AgentClient
from resilient.checkpoint.catalog.catalog import Tensor as DescribedTensor
from resilient.checkpoint.catalog.index import Index, Member
from resilient.checkpoint.catalog.table import FILE, OFFSET, START, STOP
from resilient.checkpoint.digest import block_count, digest
from resilient.checkpoint.extras import Extras
from resilient.checkpoint.leaves import Leaves
from resilient.checkpoint.levels.store import Store
from resilient.checkpoint.names import image_name
from resilient.checkpoint.record import Record
from resilient.checkpoint.restore.blocks import Blocks, Outdated
from resilient.checkpoint.restore.boxes import BoxScatter, Filling, Wanted
from resilient.checkpoint.restore.decide import Damaged, Decision
from resilient.checkpoint.restore.images import Image
from resilient.checkpoint.restore.indexing import index_of_records, keep_index, stored_index
from resilient.checkpoint.restore.load import Proposal, known_ranges, propose
from resilient.checkpoint.restore.partial import Held, blocks_of, nothing
from resilient.checkpoint.restore.reshaped import Reshaped, objects_rank
from resilient.checkpoint.restore.scatter import Range
from resilient.checkpoint.restore.source import InMemory
from resilient.checkpoint.world import World
from resilient.errors import LayoutMismatch, RestoreError
from resilient.policy import Policy

_log = logging.getLogger("resilient")
_TENSORS_AHEAD = 32  # planned before the first of them are read


@dataclass(frozen=True, slots=True)
class Reshape:
    """What came of it: notes on what could not be restored, bytes that were needed, and bytes that were read.

    `records`: of how many images this rank has read the record.
    """

    notes: list[str]
    nbytes: int
    read_bytes: int
    records: int


class Reshaper:
    """One attempt to restore one decision. Made and used on the training thread of every rank."""

    def __init__(
        self,
        client: AgentClient,
        world: World,
        state: Mapping[str, object],
        found: Leaves,
        stores: Mapping[str, Store],
        decision: Decision,
        opened: ExitStack,
        policy: Policy,
    ) -> None:
        self._world = world
        self._state = state
        self._found = found
        self._stores = stores
        self._decision = decision
        self._size = len(decision.places)
        self._blocks = Blocks(client, world, stores, decision, opened, policy)
        self._known: dict[str, Sequence[Range | Filling]] = {}  # of tensors that are read ahead
        self.touched = False  # whether live tensors may have been overwritten

    def run(self, extras: Extras, *, fresh: bool) -> tuple[Reshape | None, Damaged]:
        """Restore, or say which images cannot be used. `fresh`: the state is worth nothing yet."""
        index = stored_index(self._world, self._stores, self._decision)
        if index is not None:
            try:
                return self._run(index, extras, fresh=fresh)
            except Outdated:  # on all ranks, before anything was touched
                _log.warning("the index of step %d is made anew from the records", self._decision.step)
        index, damaged = index_of_records(self._world, self._blocks, self._decision)
        if index is None:
            return None, damaged
        keep_index(self._world, self._stores, self._decision, index)
        try:
            return self._run(index, extras, fresh=fresh)
        except Outdated as error:
            raise RestoreError(
                f"step {self._decision.step}: its records change while they are read: does another job write there?"
            ) from error

    def _run(self, index: Index, extras: Extras, *, fresh: bool) -> tuple[Reshape | None, Damaged]:
        """Raises Outdated, on all ranks, where a record is not what the index says; nothing is touched by then."""
        self._blocks.forget()
        self._known = {}
        self._blocks.index = index
        chosen = objects_rank(index, self._found, self._world.rank)
        ends, tail = _ends(index.members[chosen])
        catalog, damaged = self._begin(index, chosen, ends, tail, ahead=fresh)
        damaged |= self._find_replicas(catalog, index)
        if not damaged and not self._blocks.are_within_reach:
            damaged = self._blocks.gather({chosen: tail.take}, {chosen: ends})
        if damaged:
            return None, damaged
        image, proposal, wanted, needs = self._propose(index, chosen, tail, catalog)
        if not fresh:
            damaged = self._blocks.gather(dict.fromkeys(wanted.images, nothing), needs)
            if damaged:
                return None, damaged
        self.touched = True
        proposal.install()
        scatter = BoxScatter(wanted)
        damaged = self._blocks.gather(scatter.uses(), needs)
        if damaged:
            return None, damaged
        scatter.finish()
        notes = self._world.together(lambda: extras.apply(image.objects, self._found, image.groups()))
        return Reshape(notes, wanted.nbytes, self._blocks.read_bytes, self._blocks.records_read), frozenset()

    def _propose(
        self, index: Index, chosen: int, tail: Held, catalog: Reshaped
    ) -> tuple[Image, Proposal, Wanted, dict[int, Any]]:
        """The objects of the chosen image, and what this rank wants of which: and the blocks of it.

        Collective: raises Outdated on all ranks.
        """
        made: list[tuple[Image, Proposal, Wanted, dict[int, Any]]] = []

        def plan() -> bool:
            image = Image(InMemory(_told_of(index, chosen), "", tail.view, verified=True))
            proposal = propose(self._state, self._found, catalog, image.objects, self._known)
            wanted = _wanted(proposal.ranges)
            made.append((image, proposal, wanted, _needs(index, wanted)))
            return self._blocks.disagrees(wanted.images)

        if any(self._world.gather_results(plan)):
            raise Outdated
        return made[0]

    # ---- names

    def _begin(self, index: Index, chosen: int, ends: Any, tail: Held, *, ahead: bool) -> tuple[Reshaped, Damaged]:
        """What is there; where all ranks can read all images, also the objects of the chosen one, into `tail`.

        `ahead`: begin to read what is known to be needed, while the rest is planned. Collective: raises LayoutMismatch
        for what was saved of the models and has its place on no rank, and Outdated.
        """
        made: list[Reshaped] = []

        def begin() -> list[Any]:
            catalog = Reshaped(index, self._world.rank)
            made.append(catalog)
            tied = sorted(set(self._found.aliases) & set(catalog.described.tensors))
            if ahead:
                self._look_ahead(catalog, index)
            outdated, bad = self._blocks.disagrees([chosen]), {}
            if not outdated and self._blocks.are_within_reach:
                bad = self._blocks.read([chosen], {chosen: tail.take}, {chosen: ends})
            return [catalog.missing(self._found), tied, outdated, bad]

        rows = self._world.gather_results(begin)
        if any(outdated for _, _, outdated, _ in rows):
            raise Outdated
        nowhere = set.intersection(*(set(missing) for missing, *_ in rows))
        if nowhere:
            raise LayoutMismatch(f"the snapshot has tensor {min(nowhere)!r}, which this job's state does not have")
        for _, shared, *_ in rows:
            if shared:
                raise LayoutMismatch(
                    f"tensor {shared[0]!r} is one with another in this job (tied), but not in the snapshot"
                )
        return made[0], self._blocks.as_damaged({int(rank): text for *_, bad in rows for rank, text in bad.items()})

    def _look_ahead(self, catalog: Reshaped, index: Index) -> None:
        """Begin to read what the models need, tensor by tensor: the disk is not to wait for the last of them."""
        if not self._blocks.are_within_reach or catalog.doubtful():
            return
        coming = known_ranges(self._found, catalog)
        while some := dict(islice(coming, _TENSORS_AHEAD)):
            self._known |= some
            self._blocks.read_ahead(_needs(index, _wanted(chain.from_iterable(some.values()))))

    def _find_replicas(self, catalog: Reshaped, index: Index) -> Damaged:
        """Tell the catalog which parameters are the same on all ranks that have one each: replicas by convention.

        They are read and compared: that ranks hold different tensors under one name is as common (a model that is cut
        by hand), and would be lost without a word. Collective.
        """
        doubtful = catalog.doubtful()
        if not doubtful:
            return frozenset()
        world, size = self._world, self._size
        mine = [rank for rank in range(size) if self._blocks.speaker(rank) == world.rank]
        if any(world.gather_results(lambda: self._blocks.disagrees(mine))):
            raise Outdated
        rows = world.gather_results(lambda: [self._digests(rank, doubtful, index.members[rank]) for rank in mine])
        bad = {rank: problem for row in rows for rank, _, problem in row if problem}
        digests: dict[str, dict[str, list[str]]] = {}
        for name, piece, text in (each for row in rows for _, found, _ in row for each in found):
            digests.setdefault(name, {}).setdefault(piece, []).append(text)
        copies = {name: len({id(one) for one in own.values()}) for name, own in doubtful.items()}
        catalog.replicated(
            name
            for name, pieces in digests.items()
            if all(len(texts) == copies[name] and len(set(texts)) == 1 for texts in pieces.values())
        )
        return self._blocks.as_damaged(bad)

    def _digests(
        self, rank: int, names: Mapping[str, Mapping[int, DescribedTensor]], member: Member
    ) -> tuple[int, list[tuple[str, str, str]], str]:
        """Of the pieces that an image has of these tensors: name, which piece, digest. Or why it cannot be read."""
        spans = []
        for name, own in names.items():
            if rank in own:
                for row in own[rank].pieces.rows.tolist():
                    if row[FILE] == rank:  # the others of its group have more of it
                        nbytes = (row[STOP] - row[START]) * own[rank].itemsize
                        begin = member.data_start + row[OFFSET]
                        spans.append((name, str(row[START:]), (begin, begin + nbytes)))
        image_bytes = member.image_bytes
        held = Held(image_bytes)
        problems = self._blocks.read(
            [rank], {rank: held.take}, {rank: blocks_of([span for _, _, span in spans], image_bytes)}
        )
        if problems:
            return rank, [], problems[rank]
        return rank, [(name, piece, digest(held.view[begin:end])) for name, piece, (begin, end) in spans], ""


def _ends(member: Member) -> tuple[Any, Held]:
    """Header and objects of an image: the blocks they are in, and where these go."""
    objects = min(member.data_start + member.planned_bytes, member.image_bytes - 1)
    spans = [(0, member.data_start), (objects, member.image_bytes)]
    return blocks_of(spans, member.image_bytes), Held(member.image_bytes)


def _told_of(index: Index, rank: int) -> Record:
    """What the index has of a record, for an image whose blocks have been verified; without pieces and digests."""
    member = index.members[rank]
    return Record(
        run_id=index.run_id,
        life=member.life,
        step=index.step,
        rank=rank,
        world_size=index.world_size,
        plan_digest=member.plan_digest,
        image_name=image_name(index.step, rank, index.world_size),
        image_bytes=member.image_bytes,
        blocks=("",) * block_count(member.image_bytes),
        pieces_text=index.others_of(rank),
        data_start=member.data_start,
    )


def _needs(index: Index, wanted: Wanted) -> dict[int, Any]:
    """Which blocks of which images are wanted."""
    return wanted.blocks({rank: index.members[rank].image_bytes for rank in wanted.images})


def _wanted(ranges: Iterable[Range | Filling]) -> Wanted:
    return Wanted(one for one in ranges if isinstance(one, Filling))
