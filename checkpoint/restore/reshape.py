"""Reshaping restore: a snapshot of a job with another number of ranks, or another mesh, into this job's live state.

    records of all images → what this rank needs (`reshaped.py`) → its blocks, from wherever they are → live tensors

An image that this rank's node has, or that is durable, is read directly, and of it only the blocks that are needed.
The others are sent by one of their holders, block by block, to all who need them. Every block is verified before it is
used; a state that is worth something is touched only when all of them have been. Collective; on the training thread.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from resilient.checkpoint.agent.client import AgentClient
from resilient.checkpoint.agent.memory import private_memory
from resilient.checkpoint.catalog.catalog import Tensor as DescribedTensor
from resilient.checkpoint.catalog.table import FILE, OFFSET, START, STOP
from resilient.checkpoint.digest import BLOCK_BYTES, FINE_BYTES, block_range, damaged_blocks, digest
from resilient.checkpoint.extras import Extras
from resilient.checkpoint.image import data_start_of
from resilient.checkpoint.leaves import Leaves
from resilient.checkpoint.levels.image_io import read_fine_digests, read_image_range, read_record
from resilient.checkpoint.levels.store import Store
from resilient.checkpoint.record import Record, parse_record
from resilient.checkpoint.restore.boxes import BoxRange, BoxScatter, needed_blocks, units
from resilient.checkpoint.restore.decide import Damaged, Decision, level_of_other
from resilient.checkpoint.restore.images import Image
from resilient.checkpoint.restore.load import Proposal, propose
from resilient.checkpoint.restore.partial import Read, read_units
from resilient.checkpoint.restore.reshaped import Reshaped, groups_of, objects_rank
from resilient.checkpoint.restore.source import InMemory
from resilient.checkpoint.world import World
from resilient.errors import DamagedImage, LayoutMismatch, LevelFailed, ResilientError

_log = logging.getLogger("resilient")
_LOST = (DamagedImage, LevelFailed, FileNotFoundError)
_ATTEMPTS = 3
Use = Callable[[int, memoryview], None]


@dataclass(slots=True)
class _Opened:
    """An image of the other job that this rank can read itself. `fine` None: it is verified by whole blocks."""

    record: Record
    read: Read
    fine: bytes | None = None


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
        timeout_s: float,
    ) -> None:
        """`timeout_s`: how long it may take to fetch an image from other nodes."""
        self._client = client
        self._world = world
        self._state = state
        self._found = found
        self._stores = stores
        self._decision = decision
        self._opened = opened
        self._timeout_s = timeout_s
        self._size = len(decision.places)
        self._images: dict[int, _Opened] = {}
        self._read_bytes = 0
        self.touched = False  # whether live tensors may have been overwritten

    def run(self, extras: Extras, *, fresh: bool) -> tuple[Reshape | None, Damaged]:
        """Restore, or say which images cannot be used. `fresh`: the state is worth nothing yet."""
        records, begins, damaged = self._records()
        if damaged:
            return None, damaged
        catalog = self._world.together(lambda: Reshaped(records, begins, self._world.rank))
        self._check_names(catalog)
        damaged = self._find_replicas(catalog, records)
        if damaged:
            return None, damaged
        chosen = objects_rank(records, self._found, self._world.rank)
        ends, tail = self._ends(records[chosen], begins[chosen])
        damaged = self._gather_blocks({chosen: tail}, records, {chosen: ends})
        if damaged:
            return None, damaged
        image = self._world.together(lambda: Image(InMemory(records[chosen], "", tail.view, verified=True)))
        proposal = self._world.together(lambda: propose(self._state, self._found, catalog, image.objects))
        wanted = _by_image(proposal)
        needs = {rank: needed_blocks(ranges, records[rank].image_bytes) for rank, ranges in wanted.items()}
        if not fresh:
            damaged = self._gather_blocks({rank: _Nothing() for rank in wanted}, records, needs)
            if damaged:
                return None, damaged
        self.touched = True
        proposal.install()
        scatters = {rank: BoxScatter(ranges) for rank, ranges in wanted.items()}
        damaged = self._gather_blocks(scatters, records, needs)
        if damaged:
            return None, damaged
        for scatter in scatters.values():
            scatter.finish()
        notes = self._world.together(lambda: extras.apply(image.objects, self._found, groups_of(records[chosen])))
        nbytes = sum(one.needed_bytes for ranges in wanted.values() for one in ranges)
        return Reshape(notes, nbytes, self._read_bytes), frozenset()

    # ---- records

    def _records(self) -> tuple[dict[int, Record], dict[int, int], Damaged]:
        """The records of all images, and where their data starts: each is read by one rank and told to all."""
        world = self._world
        mine = [rank for rank in range(self._size) if self._speaker(rank) == world.rank]
        rows = world.gather(world.together(lambda: {rank: self._described(rank) for rank in mine}))
        told = {int(rank): one for row in rows for rank, one in row.items()}
        records = {rank: parse_record(text, "a record") for rank, (text, _, problem) in told.items() if not problem}
        begins = {rank: start for rank, (_, start, problem) in told.items() if not problem}
        bad = {rank: problem for rank, (_, _, problem) in told.items() if problem}
        lives = {record.life for record in records.values()}
        if not bad and len(lives) > 1:
            bad = {rank: "of another life of the job" for rank, one in records.items() if one.life != max(lives)}
        return records, begins, self._as_damaged(bad)

    def _speaker(self, rank: int) -> int:
        """The rank that reads what all must know of an image, and sends it to those who cannot reach it."""
        holders = self._decision.places[rank].holders
        return holders[0] if holders else rank % self._world.world_size

    def _described(self, rank: int) -> tuple[str, int, str]:
        """Record, start of the data, and why they cannot be had."""
        try:
            one = self._open(rank)
            start = one.record.data_start
            if start is None:
                head = private_memory(8)
                one.read(0, head)
                start = data_start_of(head)
            return one.record.text(), start, ""
        except _LOST as error:
            return "", 0, str(error) or type(error).__name__

    def _open(self, rank: int) -> _Opened:
        """An image that this rank can reach."""
        if rank not in self._images:
            step, level = self._decision.step, self._decision.places[rank].level
            if level in ("memory", "parity"):
                slot = self._recover(rank) if level == "parity" else None
                mapped = self._opened.enter_context(self._client.map_image(rank, step, self._size, slot_id=slot))
                self._images[rank] = _Opened(mapped.record, lambda offset, into: mapped.read(offset, [into]))
            else:
                store = self._stores[level]
                record = read_record(store, step, rank, self._size)
                fine = read_fine_digests(store, record)
                self._images[rank] = _Opened(record, partial(read_image_range, store, record), fine)
        return self._images[rank]

    def _recover(self, rank: int) -> int:
        """An image that nodes are lost with, fetched or decoded into the memory of this node's agent; its slot."""
        try:
            slot = self._client.recover(self._decision.step, self._timeout_s, rank, self._size)
        except TimeoutError as error:
            raise LevelFailed(str(error)) from error
        self._opened.callback(self._release, slot)
        return slot

    def _release(self, slot: int) -> None:
        with suppress(ResilientError):
            self._client.release(slot)

    # ---- names

    def _check_names(self, catalog: Reshaped) -> None:
        """What was saved of the models must have its place on some rank."""
        tied = sorted(set(self._found.aliases) & set(catalog.described.tensors))
        rows = self._world.gather([catalog.missing(self._found), tied])
        nowhere = set.intersection(*(set(missing) for missing, _ in rows))
        if nowhere:
            raise LayoutMismatch(f"the snapshot has tensor {min(nowhere)!r}, which this job's state does not have")
        for _, names in rows:
            if names:
                raise LayoutMismatch(
                    f"tensor {names[0]!r} is one with another in this job (tied), but not in the snapshot"
                )

    def _find_replicas(self, catalog: Reshaped, records: Mapping[int, Record]) -> Damaged:
        """Tell the catalog which parameters are the same on all ranks that have one each: replicas by convention.

        They are read and compared: that ranks hold different tensors under one name is as common (a model that is cut
        by hand), and would be lost without a word. Collective.
        """
        doubtful = catalog.doubtful()
        if not doubtful:
            return frozenset()
        world, size = self._world, self._size
        mine = [rank for rank in range(size) if self._speaker(rank) == world.rank]
        rows = world.gather(world.together(lambda: [self._digests(rank, doubtful, records) for rank in mine]))
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
        return self._as_damaged(bad)

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
        held = _Held(image_bytes)
        problems = self._read(rank, {rank: held}, {rank: _blocks_of([span for _, _, span in spans], image_bytes)})
        if problems:
            return rank, [], problems[rank]
        return rank, [(name, piece, digest(held.view[begin:end])) for name, piece, (begin, end) in spans], ""

    # ---- bytes

    def _ends(self, record: Record, begins: int) -> tuple[Any, "_Held"]:
        """Header and objects of an image: the blocks they are in, and where these go."""
        last = max((raw["offset"] + raw["nbytes"] for raw in record.pieces() if "nbytes" in raw), default=0)
        spans = [(0, begins), (min(begins + last, record.image_bytes - 1), record.image_bytes)]
        return _blocks_of(spans, record.image_bytes), _Held(record.image_bytes)

    def _gather_blocks(
        self,
        uses: "Mapping[int, BoxScatter | _Held | _Nothing]",
        records: Mapping[int, Record],
        needs: Mapping[int, Any],
    ) -> Damaged:
        """Bring the needed blocks of images to `uses`, by image; then agree on what cannot be used. Collective."""
        remote = {
            rank: [begin // BLOCK_BYTES for begin, _ in units(needs[rank], records[rank].image_bytes, fine=False)]
            for rank in uses
            if not self._reaches(rank)
        }
        near = [rank for rank in uses if rank not in remote]
        bad = self._world.together(lambda: {k: v for rank in near for k, v in self._read(rank, uses, needs).items()})
        rows = self._world.gather([bad, remote])
        found = {int(rank): text for row, _ in rows for rank, text in row.items()}
        if not found:
            for rank, numbers in _union(wanted for _, wanted in rows):
                use = uses.get(rank) if rank in remote else None
                found |= self._send(rank, numbers, records[rank], use.take if use is not None else None)
        return self._as_damaged(found)

    def _reaches(self, rank: int) -> bool:
        holders = self._decision.places[rank].holders
        return not holders or self._world.rank in holders

    def _read(self, rank: int, uses: Mapping[int, Any], needs: Mapping[int, Any]) -> dict[int, str]:
        """Give the needed blocks of an image that this rank can reach to their use; why that failed, if it did."""
        try:
            one = self._open(rank)
            wanted = units(needs[rank], one.record.image_bytes, fine=one.fine is not None)
            level, use = self._decision.places[rank].level, uses[rank].take
            self._read_bytes += read_units(one.record, level, one.read, wanted, one.fine, use)
        except _LOST as error:
            return {rank: str(error) or type(error).__name__}
        return {}

    def _send(self, rank: int, numbers: list[int], record: Record, use: Use | None) -> dict[int, str]:
        """One image's blocks from its speaker to all; those who want them use them once all have them verified."""
        source = self._speaker(rank)
        window = torch.empty(BLOCK_BYTES, dtype=torch.uint8)
        for number in numbers:
            begin, end = block_range(number, record.image_bytes)
            part = window[: end - begin]
            for _ in range(_ATTEMPTS):
                problem = self._fill_window(rank, begin, part) if self._world.rank == source else ""
                self._world.broadcast(part, source)
                view = part.numpy().data
                bad = not problem and damaged_blocks(view, record.blocks, begin)
                problems = self._world.gather("it arrived damaged" if bad else problem)
                if not any(problems):
                    break
            else:
                return {rank: next(text for text in problems if text)}
            if use is not None:
                use(begin, memoryview(view).cast("B"))
        return {}

    def _fill_window(self, rank: int, begin: int, part: torch.Tensor) -> str:
        try:
            self._open(rank).read(begin, memoryview(part.numpy().data).cast("B"))
            return ""
        except _LOST as error:
            return str(error) or type(error).__name__

    def _as_damaged(self, problems: Mapping[int, str]) -> Damaged:
        step = self._decision.step
        for rank, text in problems.items():
            level = self._decision.places[rank].level
            _log.warning("step %d, rank %d of %d at level %s cannot be used: %s", step, rank, self._size, level, text)
        same = self._size == self._world.world_size
        levels = {rank: self._decision.places[rank].level for rank in problems}
        return frozenset(
            (step, rank, level if same else level_of_other(level, self._size)) for rank, level in levels.items()
        )


class _Held:
    """Blocks of an image at their places in an otherwise empty one."""

    def __init__(self, image_bytes: int) -> None:
        self.view = private_memory(image_bytes)  # of the system only what is written

    def take(self, begin: int, portion: memoryview) -> None:
        self.view[begin : begin + portion.nbytes] = portion


class _Nothing:
    """For blocks that are only to be verified."""

    def take(self, begin: int, portion: memoryview) -> None:
        """Nothing."""


def _by_image(proposal: Proposal) -> dict[int, list[BoxRange]]:
    found: dict[int, list[BoxRange]] = {}
    for one in proposal.ranges:
        assert isinstance(one, BoxRange)
        found.setdefault(one.image_rank, []).append(one)
    return dict(sorted(found.items()))


def _blocks_of(spans: list[tuple[int, int]], image_bytes: int) -> Any:
    needed = np.zeros(-(-image_bytes // FINE_BYTES), dtype=np.bool_)
    for begin, end in spans:
        needed[begin // FINE_BYTES : -(-end // FINE_BYTES)] = True
    return needed


def _union(rows: Iterator[dict[str, list[int]]]) -> list[tuple[int, list[int]]]:
    """The blocks that any rank wants to be sent, by image."""
    found: dict[int, set[int]] = {}
    for row in rows:
        for rank, numbers in row.items():
            found.setdefault(int(rank), set()).update(numbers)
    return [(rank, sorted(numbers)) for rank, numbers in sorted(found.items())]
