"""The blocks of images of another job, from wherever they are, verified: for `reshape.py`.

An image that this rank can reach is read directly, of it only the blocks that are needed; what several ranks of a node
want of one is read by one of them (`sharing.py`). The others are sent by a rank that has them, block by block.
"""

import logging
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch

from resilient.checkpoint.agent.buffers import MappedImage
from resilient.checkpoint.agent.client import AgentClient
from resilient.checkpoint.agent.memory import private_memory
from resilient.checkpoint.catalog.index import Index
from resilient.checkpoint.digest import BLOCK_BYTES, FINE_BYTES, block_count, block_range
from resilient.checkpoint.image import data_start_of
from resilient.checkpoint.levels.image_io import RECORD_READERS, read_fine_digests, read_image_range, read_record
from resilient.checkpoint.levels.store import Store
from resilient.checkpoint.record import Record
from resilient.checkpoint.restore.boxes import units
from resilient.checkpoint.restore.decide import Damaged, Decision, level_of_other
from resilient.checkpoint.restore.exchange import send_window
from resilient.checkpoint.restore.partial import Opened, Reading, Use, read_units, read_whole
from resilient.checkpoint.restore.sharing import rounds_of
from resilient.checkpoint.world import World
from resilient.errors import DamagedImage, LevelFailed, OverBudget, ResilientError
from resilient.policy import Policy

_log = logging.getLogger("resilient")
_DIGEST_BYTES = 16
LOST = (DamagedImage, LevelFailed, FileNotFoundError)
"""What reading an image raises where another level or step may still serve."""
Uses = Mapping[int, Use]
"""By image where its blocks are to go."""
Needs = Mapping[int, Any]
"""Of each image which blocks of 64 KiB are needed."""


class Outdated(Exception):
    """The index is of another attempt at the step than the records are. On all ranks; never leaves this package."""


class Blocks:
    """The images of one decision. Made and used on the training thread of every rank; `gather` is collective.

    `index`: what all know of the images; to be set before the first `gather`. `records_read`: of how many images this
    rank has read the record, `read_bytes`: how much it has read of images.
    """

    index: Index

    def __init__(
        self,
        client: AgentClient,
        world: World,
        stores: Mapping[str, Store],
        decision: Decision,
        opened: ExitStack,
        policy: Policy,
    ) -> None:
        self._client = client
        self._world = world
        self._stores = stores
        self._decision = decision
        self._opened = opened
        self._policy = policy
        self._size = len(decision.places)
        self._images: dict[int, Opened] = {}
        self._records: dict[int, Record] = {}
        self._compared: set[int] = set()  # images whose record has been compared with the index
        self._reading: Reading | None = None
        self._ahead: dict[int, Any] = {}  # which blocks of images are being read already
        self.read_bytes = 0
        opened.callback(self.forget)

    @property
    def records_read(self) -> int:
        return len(self._records)

    def speaker(self, rank: int) -> int:
        """The rank that reads the record of an image for all, and sends its bytes to those who cannot reach it."""
        holders = self._decision.places[rank].holders
        return holders[0] if holders else rank * self._world.world_size // self._size

    def described(self, rank: int) -> tuple[Record, int]:
        """The record of an image that this rank can reach, and where its data starts. Raises one of LOST."""
        stored = self._decision.places[rank].level in self._stores
        record = self._record(rank) if stored else self.open(rank).record
        if record.data_start is not None:
            return record, record.data_start
        head = private_memory(8)
        self.open(rank).read(0, head)
        return record, data_start_of(head)

    def _record(self, rank: int) -> Record:
        """A record on a store."""
        if rank not in self._records:
            store = self._stores[self._decision.places[rank].level]
            record = read_record(store, self._decision.step, rank, self._size)
            self._records[rank] = replace(record, parsed=None)  # as text it takes a fifth of the memory
            return record
        return self._records[rank]

    def open(self, rank: int) -> Opened:
        """An image that this rank can reach."""
        if rank not in self._images:
            step, level = self._decision.step, self._decision.places[rank].level
            if level in ("memory", "parity"):
                slot = self._recover(rank) if level == "parity" else None
                mapped = self._opened.enter_context(self._client.map_image(rank, step, self._size, slot_id=slot))
                self._records[rank] = mapped.record
                self._images[rank] = Opened(mapped.record, level, lambda offset, into: mapped.read(offset, [into]))
            else:
                store, record = self._stores[level], self._record(rank)
                fine = read_fine_digests(store, record)
                self._images[rank] = Opened(record, level, partial(read_image_range, store, record), fine)
        return self._images[rank]

    def _recover(self, rank: int) -> int:
        """An image that nodes are lost with, fetched or decoded into the memory of this node's agent; its slot."""
        slot = self._client.recover(self._decision.step, self._policy.write_timeout_s, rank, self._size)
        self._opened.callback(self._release, slot)
        return slot

    def _release(self, slot: int) -> None:
        with suppress(ResilientError):
            self._client.release(slot)

    @property
    def are_within_reach(self) -> bool:
        """Whether every rank can read every image, which all know."""
        return not any(place.holders for place in self._decision.places)

    def read_ahead(self, needs: Needs) -> None:
        """Begin to read blocks whose uses `gather` will be told: of images on a disk of this node, as far as they are
        there and are what the index says. Not collective."""
        for rank, needed in needs.items():
            level = self._decision.places[rank].level
            if not self._is_stored(rank) or not self._stores[level].is_near or self._problem(rank) is not None:
                continue
            if self.open(rank).fine is not None:  # else whole blocks are read, and those at the edges twice
                self._reading = self._reading or Reading()
                known = self._ahead.get(rank, np.zeros_like(needed))
                self._want(self._reading, rank, needed & ~known)
                self._ahead[rank] = needed | known

    def forget(self) -> None:
        """What has been read ahead is not wanted after all."""
        reading, self._reading = self._reading, None
        self._ahead = {}
        if reading is not None:
            reading.close()

    def gather(self, uses: Uses, needs: Needs) -> Damaged:
        """Bring the needed blocks of images to `uses`, by image; then agree on what cannot be used. Collective.

        The images have been compared with the index (`disagrees`).
        """
        remote = {
            rank: [begin // BLOCK_BYTES for begin, _ in units(needs[rank], self._bytes_of(rank), fine=False)]
            for rank in uses
            if not self._reaches(rank)
        }
        bad, done = self._read_together(uses, needs)
        near = [rank for rank in uses if rank not in remote and rank not in done]
        rows = self._world.gather_results(lambda: [bad | self._read_rest(near, uses, needs), remote])
        found = {int(rank): text for row, _ in rows for rank, text in row.items()}
        if not found:
            for rank, numbers in _union(wanted for _, wanted in rows):
                found |= self._send(rank, numbers, uses.get(rank) if rank in remote else None)
        return self.as_damaged(found)

    def disagrees(self, ranks: Iterable[int]) -> bool:
        """Open images on stores that this rank will read, several at a time; whether one is not that of the index.

        All ranks are to agree then that the index is `Outdated`. One that cannot be read is for those to tell who read
        the image.
        """
        new = [rank for rank in ranks if rank not in self._compared and self._is_stored(rank)]

        def work(rank: int) -> bool:
            problem = self._problem(rank)
            if problem:
                _log.warning("step %d: its index is of another attempt at it (%s)", self._decision.step, problem)
            return bool(problem)

        if len(new) < 2:
            return any(map(work, new))
        with ThreadPoolExecutor(RECORD_READERS, thread_name_prefix="resilient-records") as pool:
            return any(list(pool.map(work, new)))

    def _problem(self, rank: int) -> str | None:
        """Why an image on a store is not that of the index; None if it is, empty if it cannot be read."""
        try:
            problem = self.index.disagreement(self.open(rank).record)
        except LOST:
            return ""
        if problem is None:
            self._compared.add(rank)
        return problem

    def _is_stored(self, rank: int) -> bool:
        return self._decision.places[rank].level in self._stores and self._reaches(rank)

    def _bytes_of(self, rank: int) -> int:
        return self.index.members[rank].image_bytes

    def _read_together(self, uses: Uses, needs: Needs) -> tuple[dict[int, str], set[int]]:
        """Images that several ranks of a node want, read by one of them. What cannot be used, and what is done."""
        levels = {place.level for place in self._decision.places}
        if all(level not in self._stores or self._stores[level].is_near for level in levels):
            return {}, set()  # nothing of it is behind a network, which all ranks know
        world = self._world
        mine = {rank: int(needs[rank].sum()) * FINE_BYTES for rank in uses if self._is_far(rank)}
        told = [{int(rank): nbytes for rank, nbytes in row.items()} for row in world.gather(mine)]
        sizes = {rank: member.image_bytes for rank, member in self.index.members.items()}
        bad: dict[int, str] = {}
        done: set[int] = set()
        for turn in rounds_of(told, sizes, world.nodes):
            problems, ready = self._share(turn, uses, needs)
            bad |= problems
            done |= ready
        return bad, done

    def _share(self, turn: Mapping[int, int], uses: Uses, needs: Needs) -> tuple[dict[int, str], set[int]]:
        """One round: each reader reads its image, then all take what they need of those of their node."""
        world, mine = self._world, turn.get(self._world.rank)
        rows = world.gather_results(lambda: (0, "") if mine is None else self._read_for_all(mine))
        slot = rows[world.rank][0]
        near = {image: rows[rank] for rank, image in turn.items() if world.nodes[rank] == world.node}
        ready = {image: found for image, (found, _) in near.items() if found and image in uses}
        world.together(lambda: self._read_shared(ready, uses, needs))
        if slot:
            self._release(slot)
        return {image: text for image, (_, text) in near.items() if text}, set(ready)

    def _is_far(self, rank: int) -> bool:
        """Whether this rank would read an image over a network. A disk of the machine is as quick as its memory."""
        level = self._decision.places[rank].level
        return self._reaches(rank) and level in self._stores and not self._stores[level].is_near

    def _read_for_all(self, rank: int) -> tuple[int, str]:
        """A whole image into the memory of the agent, for all ranks of this node: the slot that it is in.

        0 where there is no room for it: then each reads for itself. Or why the image cannot be used.
        """
        size, level = self._bytes_of(rank), self._decision.places[rank].level
        try:
            slot = self._client.scratch(size, self._policy.budget_bytes(size))
        except OverBudget:
            return 0, ""
        try:
            record = self.open(rank).record
            read_whole(record, level, self.open(rank).read, slot.view[:size])
        except LOST as error:
            self._release(slot.id)
            return 0, why(error)
        self.read_bytes += record.image_bytes
        self._client.adopt(slot.id, record.step, record)
        return slot.id, ""

    def _read_shared(self, slots: Mapping[int, int], uses: Uses, needs: Needs) -> None:
        """Take from images in the agent's memory, which another rank has verified there."""
        for rank, slot in slots.items():
            with self._client.map_image(rank, self._decision.step, self._size, slot_id=slot) as mapped:
                record = mapped.record
                wanted = units(needs[rank], record.image_bytes, fine=True)

                def read(offset: int, into: memoryview, mapped: MappedImage = mapped) -> None:
                    mapped.read(offset, [into])

                read_units(Opened(record, "memory", read, verified=True), wanted, uses[rank])

    def _reaches(self, rank: int) -> bool:
        holders = self._decision.places[rank].holders
        return not holders or self._world.rank in holders

    def read(self, ranks: Iterable[int], uses: Uses, needs: Needs) -> dict[int, str]:
        """Give the needed blocks of images that this rank can reach to their uses; of those that failed, why."""
        return self._finish(Reading(uses), {rank: needs[rank] for rank in ranks}, uses)

    def _read_rest(self, ranks: Iterable[int], uses: Uses, needs: Needs) -> dict[int, str]:
        """As `read`, of which some has been read ahead."""
        reading, ahead = self._reading or Reading(uses), self._ahead
        self._reading, self._ahead = None, {}
        rest = {rank: needs[rank] & ~ahead[rank] if rank in ahead else needs[rank] for rank in ranks}
        return self._finish(reading, rest, uses)

    def _finish(self, reading: Reading, needs: Needs, uses: Uses) -> dict[int, str]:
        failed: dict[int, Exception] = {}
        try:
            for rank, needed in needs.items():
                try:
                    self._want(reading, rank, needed)
                except LOST as error:
                    failed[rank] = error
            failed |= reading.finish(uses)
        finally:
            reading.close()
        self.read_bytes += reading.read_bytes
        for problem in failed.values():
            if not isinstance(problem, LOST):
                raise problem
        return {rank: why(problem) for rank, problem in failed.items()}

    def _want(self, reading: Reading, rank: int, needed: Any) -> None:
        opened = self.open(rank)
        reading.want(rank, opened, units(needed, opened.record.image_bytes, fine=opened.fine is not None))

    def _send(self, rank: int, numbers: list[int], use: Use | None) -> dict[int, str]:
        """One image's blocks from its speaker to all; those who want them use them once all have them verified."""
        if not numbers:
            return {}
        source, size = self.speaker(rank), self._bytes_of(rank)
        blocks = self._digests_from(source, rank, numbers)
        window = torch.empty(BLOCK_BYTES, dtype=torch.uint8)
        for number in numbers:
            begin, end = block_range(number, size)
            part = window[: end - begin]
            problems = send_window(self._world, source, begin, part, blocks, partial(self._fill_window, rank))
            if any(problems):
                told = [problem for problem in problems if isinstance(problem, str) and problem]
                return {rank: told[0] if told else "it arrived damaged"}
            if use is not None:
                use(begin, memoryview(part.numpy().data).cast("B"))
        return {}

    def _digests_from(self, source: int, rank: int, numbers: list[int]) -> list[str]:
        """The digests of these blocks of an image, by number, as its record has them, which only `source` can read."""
        told = torch.zeros(len(numbers) * _DIGEST_BYTES, dtype=torch.uint8)
        if self._world.rank == source:
            with suppress(*LOST):  # nothing will be sent then, and why not
                record = self.open(rank).record
                found = b"".join(bytes.fromhex(record.blocks[number]) for number in numbers)
                told = torch.frombuffer(bytearray(found), dtype=torch.uint8)
        self._world.broadcast(told, source)
        blocks = [""] * block_count(self._bytes_of(rank))
        for at, number in enumerate(numbers):
            blocks[number] = bytes(told[at * _DIGEST_BYTES : (at + 1) * _DIGEST_BYTES].tolist()).hex()
        return blocks

    def _fill_window(self, rank: int, begin: int, part: torch.Tensor) -> str:
        try:
            self.open(rank).read(begin, memoryview(part.numpy().data).cast("B"))
            return ""
        except LOST as error:
            return why(error)

    def as_damaged(self, problems: Mapping[int, str]) -> Damaged:
        step = self._decision.step
        for rank, text in problems.items():
            level = self._decision.places[rank].level
            _log.warning("step %d, rank %d of %d at level %s cannot be used: %s", step, rank, self._size, level, text)
        same = self._size == self._world.world_size
        levels = {rank: self._decision.places[rank].level for rank in problems}
        return frozenset(
            (step, rank, level if same else level_of_other(level, self._size)) for rank, level in levels.items()
        )


def why(error: Exception) -> str:
    """An error in words, never none."""
    return str(error) or type(error).__name__


def _union(rows: Iterable[dict[str, list[int]]]) -> list[tuple[int, list[int]]]:
    """The blocks that any rank wants to be sent, by image."""
    found: dict[int, set[int]] = {}
    for row in rows:
        for rank, numbers in row.items():
            found.setdefault(int(rank), set()).update(numbers)
    return [(rank, sorted(numbers)) for rank, numbers in sorted(found.items())]
