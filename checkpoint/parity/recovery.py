"""Finds and fetches images that other nodes hold or protect: asks everybody, decides with `recover.py`, reads.

Everything here blocks, and may be called from any thread. `answer` is the other side of its questions.
"""

import logging
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from dataclasses import dataclass

from resilient.checkpoint.parity import gather
from resilient.checkpoint.parity.facts import Done, Json, Sealed, record_of, seal_of, sealed_of
from resilient.checkpoint.parity.gather import gather_with_threads
from resilient.checkpoint.parity.layout import Key, layout_of
from resilient.checkpoint.parity.memory import Blocks
from resilient.checkpoint.parity.reader import Reader
from resilient.checkpoint.parity.recover import (
    Found,
    Inventory,
    Known,
    Sources,
    find,
    images_of_others,
    inventory_of,
    keys_of,
    recoverable,
    sources_of,
)
from resilient.checkpoint.parity.snapshot import Snapshot, State
from resilient.checkpoint.peers.transport import Message, Transport
from resilient.checkpoint.record import Record, parse_record
from resilient.errors import LevelFailed, ResilientError, RestoreError

log = logging.getLogger(__name__)
ATTEMPTS = 2
PATIENCE_S = 0.1  # for all to answer, where some are enough
_ASKED_AT_ONCE = 32
_FOREIGN = (LookupError, TypeError, ValueError)


@dataclass(frozen=True, slots=True, kw_only=True)
class Here:
    """What this node has. Each may be called from any thread.

    `lend(name, offset, nbytes)` is what peers get as well; `whole` are the snapshots whose parity is whole.
    """

    node: str
    records: Callable[[], list[Record]]
    shards: Callable[[], dict[Key, list[tuple[int, int]]]]
    whole: Callable[[], list[Snapshot]]
    snapshot: Callable[[Key], Snapshot | None]
    pieces: Callable[[str], str | None]
    lend: Callable[[str, int, int], AbstractContextManager[memoryview]]


class Recovery:
    """`nodes()` are all other nodes that may know or hold something."""

    def __init__(
        self, here: Here, transport: Transport, nodes: Callable[[], Iterable[str]], blocks: Blocks, block_bytes: int
    ) -> None:
        self._here = here
        self._transport = transport
        self._nodes = nodes
        self._blocks = blocks
        self._block_bytes = block_bytes
        self._gather = gather_with_threads(transport.read, blocks, gather.Here(here.node, here.lend))

    # --- what is there

    def recoverable(self, ranks: Iterable[int]) -> dict[int, list[Found]]:
        """What can be had of each rank, the newest first."""
        return recoverable(self.inventories(), ranks)

    def images_of_others(self, world_size: int) -> list[tuple[int, int, int]]:
        """(step, world size, rank) of all images that can be had of jobs of another size."""
        return images_of_others(self.inventories(), world_size)

    def inventories(self, enough: Callable[[list[Inventory]], bool] = lambda _: False) -> list[Inventory]:
        """Of this node, and of all that answer; after PATIENCE_S only until what is there is `enough`."""
        others = [node for node in self._nodes() if node != self._here.node]
        pool = ThreadPoolExecutor(max(1, min(_ASKED_AT_ONCE, len(others))), thread_name_prefix="resilient-ask")
        try:
            waiting = {pool.submit(self._inventory_of, node) for node in others}
            found = [self._inventory()]
            done, waiting = wait(waiting, PATIENCE_S)
            while True:
                found += [one for each in done if (one := each.result()) is not None]
                if not waiting or enough(found):
                    return found
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _inventory_of(self, node: str) -> Inventory | None:
        try:
            found = Inventory.from_json(self._transport.call(node, {"op": "inventory"}))
        except (ResilientError, *_FOREIGN) as error:
            log.info("node %s does not say what it holds: %s", node, error)
            return None
        return found if found.node == node else None

    def _inventory(self) -> Inventory:
        images = {
            (each.life, each.step, each.rank): (seal_of(each.image_bytes, "".join(each.blocks)), each.world_size)
            for each in self._here.records()
        }
        return inventory_of(self._here.node, images, self._here.shards(), self._here.whole())

    # --- getting it

    def recover(
        self,
        rank: int,
        step: int,
        room: Callable[[int], memoryview],
        life: str | None = None,
        world_size: int | None = None,
    ) -> tuple[Record, str]:
        """Fetch the image of a rank into `room(its size)`, which is called once for each attempt; with how it was done.

        `life` None: the latest; `world_size`: of a job of that size, if it matters. Every byte is verified. Raises
        LevelFailed where it cannot be had, DamagedImage where too much is damaged.
        """

        def enough(known: list[Inventory]) -> bool:
            return attempt == 1 and life is not None and find(known, (life, step), rank) is not None

        for attempt in range(1, ATTEMPTS + 1):
            inventories = self.inventories(enough)
            found = self._choose(inventories, rank, step, life, world_size)
            try:
                record, reader = self._reader(inventories, found)
                into = room(record.image_bytes)[: record.image_bytes]
                reader.read(rank, 0, len(record.blocks), into)
            except (LevelFailed, RestoreError) as error:
                log.warning("step %d of rank %d could not be fetched from the other nodes: %s", step, rank, error)
                if attempt == ATTEMPTS:
                    raise
            else:
                return record, found.reason
        raise AssertionError("the last attempt returns or raises")

    def reader(self, key: Key) -> Reader:
        """A reader of all that is left of a snapshot with whole parity in this node's group. Raises LevelFailed."""
        inventories = self.inventories()
        for each in inventories:
            known = each.known.get(key)
            if known is not None and any(member.node == self._here.node for member in known.stripe.members):
                return self._stripe_reader(inventories, known)
        raise LevelFailed(f"nobody knows of whole parity of step {key[1]}")

    def _choose(
        self, inventories: Sequence[Inventory], rank: int, step: int, life: str | None, world_size: int | None
    ) -> Found:
        for key in keys_of(inventories):
            found = find(inventories, key, rank) if key[1] == step and life in (None, key[0]) else None
            if found is not None and world_size in (None, found.world_size):
                return found
        raise LevelFailed(
            f"step {step} of rank {rank} cannot be had from the {len(inventories)} nodes that answered; "
            "use another step or level"
        )

    def _reader(self, inventories: Sequence[Inventory], found: Found) -> tuple[Record, Reader]:
        if found.stripe is None:
            record = self._record(found, found.holders)
            sealed = sealed_of(record)
            sources = Sources(images={found.rank: found.holders}, parity={})
            return record, Reader(
                found.key, self._block_bytes, {found.rank: sealed}, sources, self._gather, self._blocks
            )
        known = next(
            one for each in inventories if (one := each.known.get(found.key)) is not None and one.stripe == found.stripe
        )
        record = self._record(found, (*_who_knows(inventories, known), *found.holders))
        return record, self._stripe_reader(inventories, known)

    def _stripe_reader(self, inventories: Sequence[Inventory], known: Known) -> Reader:
        """Raises LevelFailed."""
        images, done = self._details(known, _who_knows(inventories, known))
        return Reader(
            known.stripe.key,
            known.stripe.block_bytes,
            images,
            sources_of(inventories, known),
            self._gather,
            self._blocks,
            layout=layout_of(known.stripe),
            done=done,
        )

    def _details(self, known: Known, nodes: Sequence[str]) -> tuple[dict[int, Sealed], dict[int, Done]]:
        """The digests of all images and of all parity of a stripe, from who knows them. Raises LevelFailed."""
        life, step = known.stripe.key
        problem = "nobody knows it any more"
        for node in nodes:
            try:
                answer = self._ask(node, {"op": "snapshot", "life": life, "step": step})
                images = {one.rank: one for one in map(Sealed.from_json, answer["images"])}
                done = {one.row: one for one in map(Done.from_json, answer["done"])}
            except (ResilientError, *_FOREIGN) as error:
                problem = str(error)
                continue
            if {rank: one.seal for rank, one in images.items()} == dict(known.seals):
                return images, done
        raise LevelFailed(f"the digests of step {step} cannot be had: {problem}")

    def _record(self, found: Found, nodes: Sequence[str]) -> Record:
        """The record of an image, the one that its seal stands for. Raises LevelFailed."""
        (life, step), rank = found.key, found.rank
        problem = "nobody has it any more"
        for node in dict.fromkeys(nodes):
            try:
                answer = self._ask(node, {"op": "record", "life": life, "step": step, "rank": rank})
                record = parse_record(str(answer["record"]), f"the record of rank {rank} from node {node}")
            except (ResilientError, *_FOREIGN) as error:
                problem = str(error)
                continue
            if seal_of(record.image_bytes, "".join(record.blocks)) == found.seal:
                return record
        raise LevelFailed(f"the record of step {step} of rank {rank} cannot be had: {problem}")

    def _ask(self, node: str, message: Message) -> Message:
        if node != self._here.node:
            return self._transport.call(node, message)
        answer = self.answer(message)
        assert answer is not None
        return answer

    # --- the other side

    def answer(self, message: Message) -> Message | None:
        """The answer to a question of another node's `Recovery`; None where it is none. Raises LevelFailed."""
        operation = message.get("op")
        if operation == "inventory":
            return self._inventory().to_json()
        if operation == "snapshot":
            return self._tell_snapshot(_key_of(message))
        if operation == "record":
            return {"record": self._find_record(_key_of(message), int(message["rank"])).text()}
        return None

    def _tell_snapshot(self, key: Key) -> Json:
        snapshot = self._here.snapshot(key)
        if snapshot is None or snapshot.state is not State.WHOLE:
            raise LevelFailed(f"node {self._here.node} knows nothing of the parity of step {key[1]}")
        return {
            "images": [one.to_json() for one in snapshot.sealed().values()],
            "done": [one.to_json() for one in snapshot.done.values()],
        }

    def _find_record(self, key: Key, rank: int) -> Record:
        for record in self._here.records():
            if (record.life, record.step, record.rank) == (*key, rank):
                return record
        snapshot = self._here.snapshot(key)
        sealed = snapshot.sealed().get(rank) if snapshot is not None else None
        pieces = self._here.pieces(sealed.pieces) if sealed is not None else None
        if sealed is None or pieces is None:
            raise LevelFailed(f"node {self._here.node} has no record of step {key[1]} of rank {rank}")
        return record_of(sealed, pieces)


def _who_knows(inventories: Sequence[Inventory], known: Known) -> list[str]:
    """The nodes that have the digests of a stripe."""
    key = known.stripe.key
    return [each.node for each in inventories if key in each.known and each.known[key].stripe == known.stripe]


def _key_of(message: Message) -> Key:
    """Raises LevelFailed."""
    life, step, rank = message.get("life"), message.get("step"), message.get("rank", 0)
    if not isinstance(life, str) or type(step) is not int or type(rank) is not int:
        raise LevelFailed(f"a question about life {life!r}, step {step!r}, rank {rank!r}")
    return life, step
