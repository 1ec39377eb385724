"""Reshaping restore: a snapshot of a job with another number of ranks, or another mesh, into this job's live state.

    records of all images → what this rank needs (`reshaped.py`) → its blocks, from wherever they are → live tensors

How the blocks come is the business of `blocks.py`. Every block is verified before it is used; a state that is worth
something is touched only when all of them have been. Collective; on the training thread.
"""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from resilient.checkpoint.agent.client import AgentClient
from resilient.checkpoint.agent.memory import private_memory
from resilient.checkpoint.catalog.catalog import Tensor as DescribedTensor
from resilient.checkpoint.catalog.table import FILE, OFFSET, START, STOP
from resilient.checkpoint.digest import digest
from resilient.checkpoint.extras import Extras
from resilient.checkpoint.image import data_start_of
from resilient.checkpoint.leaves import Leaves
from resilient.checkpoint.levels.store import Store
from resilient.checkpoint.record import Record, parse_record
from resilient.checkpoint.restore.blocks import LOST, Blocks, Held, Nothing, blocks_of, why
from resilient.checkpoint.restore.boxes import BoxRange, BoxScatter, needed_blocks
from resilient.checkpoint.restore.decide import Damaged, Decision
from resilient.checkpoint.restore.images import Image
from resilient.checkpoint.restore.load import Proposal, propose
from resilient.checkpoint.restore.reshaped import Reshaped, objects_rank
from resilient.checkpoint.restore.source import InMemory
from resilient.checkpoint.world import World
from resilient.errors import LayoutMismatch
from resilient.policy import Policy


@dataclass(frozen=True, slots=True)
class Reshape:
    """What came of it: notes on what could not be restored, bytes that were needed, and bytes that were read."""

    notes: list[str]
    nbytes: int
    read_bytes: int


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
        self._size = len(decision.places)
        self._blocks = Blocks(client, world, stores, decision, opened, policy)
        self.touched = False  # whether live tensors may have been overwritten

    def run(self, extras: Extras, *, fresh: bool) -> tuple[Reshape | None, Damaged]:
        """Restore, or say which images cannot be used. `fresh`: the state is worth nothing yet."""
        records, begins, damaged = self._records()
        if damaged:
            return None, damaged
        catalog = self._catalog(records, begins)
        damaged = self._find_replicas(catalog, records)
        if damaged:
            return None, damaged
        chosen = objects_rank(records, self._found, self._world.rank)
        ends, tail = self._ends(records[chosen], begins[chosen])
        damaged = self._blocks.gather({chosen: tail}, records, {chosen: ends})
        if damaged:
            return None, damaged

        def proposed() -> tuple[Image, Proposal]:
            image = Image(InMemory(records[chosen], "", tail.view, verified=True))
            return image, propose(self._state, self._found, catalog, image.objects)

        image, proposal = self._world.together(proposed)
        wanted = _by_image(proposal)
        needs = {rank: needed_blocks(ranges, records[rank].image_bytes) for rank, ranges in wanted.items()}
        if not fresh:
            damaged = self._blocks.gather({rank: Nothing() for rank in wanted}, records, needs)
            if damaged:
                return None, damaged
        self.touched = True
        proposal.install()
        scatters = {rank: BoxScatter(ranges) for rank, ranges in wanted.items()}
        damaged = self._blocks.gather(scatters, records, needs)
        if damaged:
            return None, damaged
        for scatter in scatters.values():
            scatter.finish()
        notes = self._world.together(lambda: extras.apply(image.objects, self._found, image.groups()))
        nbytes = sum(one.needed_bytes for ranges in wanted.values() for one in ranges)
        return Reshape(notes, nbytes, self._blocks.read_bytes), frozenset()

    # ---- records

    def _records(self) -> tuple[dict[int, Record], dict[int, int], Damaged]:
        """The records of all images, and where their data starts: each is read by one rank and told to all."""
        world = self._world
        mine = [rank for rank in range(self._size) if self._blocks.speaker(rank) == world.rank]
        rows = world.gather_results(lambda: {rank: self._described(rank) for rank in mine})
        told = {int(rank): one for row in rows for rank, one in row.items()}
        records = {rank: parse_record(text, "a record") for rank, (text, _, problem) in told.items() if not problem}
        begins = {rank: start for rank, (_, start, problem) in told.items() if not problem}
        bad = {rank: problem for rank, (_, _, problem) in told.items() if problem}
        lives = {record.life for record in records.values()}
        if not bad and len(lives) > 1:
            bad = {rank: "of another life of the job" for rank, one in records.items() if one.life != max(lives)}
        return records, begins, self._blocks.as_damaged(bad)

    def _described(self, rank: int) -> tuple[str, int, str]:
        """Record, start of the data, and why they cannot be had."""
        try:
            one = self._blocks.open(rank)
            start = one.record.data_start
            if start is None:
                head = private_memory(8)
                one.read(0, head)
                start = data_start_of(head)
            return one.record.text(), start, ""
        except LOST as error:
            return "", 0, why(error)

    # ---- names

    def _catalog(self, records: Mapping[int, Record], begins: Mapping[int, int]) -> Reshaped:
        """What is there. Raises LayoutMismatch for what was saved of the models and has its place on no rank."""
        made: list[Reshaped] = []

        def names() -> list[list[str]]:
            made.append(Reshaped(records, begins, self._world.rank))
            tied = sorted(set(self._found.aliases) & set(made[0].described.tensors))
            return [made[0].missing(self._found), tied]

        rows = self._world.gather_results(names)
        nowhere = set.intersection(*(set(missing) for missing, _ in rows))
        if nowhere:
            raise LayoutMismatch(f"the snapshot has tensor {min(nowhere)!r}, which this job's state does not have")
        for _, shared in rows:
            if shared:
                raise LayoutMismatch(
                    f"tensor {shared[0]!r} is one with another in this job (tied), but not in the snapshot"
                )
        return made[0]

    def _find_replicas(self, catalog: Reshaped, records: Mapping[int, Record]) -> Damaged:
        """Tell the catalog which parameters are the same on all ranks that have one each: replicas by convention.

        They are read and compared: that ranks hold different tensors under one name is as common (a model that is cut
        by hand), and would be lost without a word. Collective.
        """
        doubtful = catalog.doubtful()
        if not doubtful:
            return frozenset()
        world, size = self._world, self._size
        mine = [rank for rank in range(size) if self._blocks.speaker(rank) == world.rank]
        rows = world.gather_results(lambda: [self._digests(rank, doubtful, records) for rank in mine])
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
        self, rank: int, names: Mapping[str, Mapping[int, DescribedTensor]], records: Mapping[int, Record]
    ) -> tuple[int, list[tuple[str, str, str]], str]:
        """Of the pieces that an image has of these tensors: name, which piece, digest. Or why it cannot be read."""
        spans = []
        for name, own in names.items():
            if rank in own:
                for row in own[rank].pieces.rows.tolist():
                    if row[FILE] == rank:  # the others of its group have more of it
                        nbytes = (row[STOP] - row[START]) * own[rank].itemsize
                        spans.append((name, str(row[START:]), (row[OFFSET], row[OFFSET] + nbytes)))
        image_bytes = records[rank].image_bytes
        held = Held(image_bytes)
        problems = self._blocks.read(rank, {rank: held}, {rank: blocks_of([span for _, _, span in spans], image_bytes)})
        if problems:
            return rank, [], problems[rank]
        return rank, [(name, piece, digest(held.view[begin:end])) for name, piece, (begin, end) in spans], ""

    # ---- bytes

    def _ends(self, record: Record, begins: int) -> tuple[Any, Held]:
        """Header and objects of an image: the blocks they are in, and where these go."""
        last = max((raw["offset"] + raw["nbytes"] for raw in record.pieces() if "nbytes" in raw), default=0)
        spans = [(0, begins), (min(begins + last, record.image_bytes - 1), record.image_bytes)]
        return blocks_of(spans, record.image_bytes), Held(record.image_bytes)


def _by_image(proposal: Proposal) -> dict[int, list[BoxRange]]:
    found: dict[int, list[BoxRange]] = {}
    for one in proposal.ranges:
        assert isinstance(one, BoxRange)
        found.setdefault(one.image_rank, []).append(one)
    return dict(sorted(found.items()))
