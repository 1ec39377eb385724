"""The merged index of the snapshot that a decision names, on every rank, though no rank reads every record.

`catalog.json` where all images are on the durable level and it is there and right: one rank reads it for all. Else each
record is read by one rank, which folds those that it has read; they are merged pairwise along a tree, and the result is
sent to all. What is stored is compared again with the record of each image that is read (`blocks.py`).
"""

import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.distributed as dist

from resilient.checkpoint.catalog.index import Index, index_of, merged, parse_index
from resilient.checkpoint.levels.image_io import RECORD_READERS
from resilient.checkpoint.levels.index_io import checked_index, read_text, write_index
from resilient.checkpoint.levels.store import Store
from resilient.checkpoint.names import catalog_name
from resilient.checkpoint.restore.blocks import LOST, Blocks, why
from resilient.checkpoint.restore.decide import Damaged, Decision
from resilient.checkpoint.world import World
from resilient.errors import DamagedImage, LevelFailed, NewerFormat

_log = logging.getLogger("resilient")
_PROBLEM = b"!"


def stored_index(world: World, stores: Mapping[str, Store], decision: Decision) -> Index | None:
    """What `catalog.json` says; None where there is none, or it cannot be used. Collective."""
    if {place.level for place in decision.places} != {"durable"}:
        return None

    def read() -> bytes:
        try:
            return read_text(stores["durable"], decision.step)
        except FileNotFoundError:
            _log.info("step %d has no index: it is made from the records", decision.step)
        except (DamagedImage, LevelFailed) as error:
            _log.warning("the index of step %d is made anew from the records: %s", decision.step, error)
        return b""

    data = _told(world, read() if world.rank == 0 else b"")
    where = f"{stores['durable'].url}/{catalog_name(decision.step)}"
    try:  # what all have heard is the same, and so is what they make of it
        return checked_index(data, where, decision.step, len(decision.places)) if data else None
    except (DamagedImage, NewerFormat) as error:
        if world.rank == 0:
            _log.warning("the index of step %d is made anew from the records: %s", decision.step, error)
        return None


def index_of_records(world: World, blocks: Blocks, decision: Decision) -> tuple[Index | None, Damaged]:
    """The index, from the records of all images, of which each rank reads some; or what cannot be used. Collective."""
    mine = [rank for rank in range(len(decision.places)) if blocks.speaker(rank) == world.rank]
    parts: list[Index] = []
    problems: dict[int, str] = {}

    def read() -> dict[int, str]:
        def one(rank: int) -> None:
            try:
                record, begins = blocks.described(rank)
                parts.append(index_of([record], {rank: begins}))
            except LOST as error:
                problems[rank] = why(error)

        near = any(decision.places[rank].level in ("memory", "parity") for rank in mine)
        with ThreadPoolExecutor(1 if near else RECORD_READERS, thread_name_prefix="resilient-records") as pool:
            for _ in pool.map(one, mine):
                pass
        return problems

    rows = world.gather_results(read)
    bad = {int(rank): text for row in rows for rank, text in row.items()}
    if bad:
        return None, blocks.as_damaged(bad)
    index = _merged_by_all(world, parts)
    if len(index.lives) > 1:
        newest = max(index.lives)
        bad = {rank: "of another life of the job" for rank, one in index.members.items() if one.life != newest}
        return None, blocks.as_damaged(bad)
    return index, frozenset()


def keep_index(world: World, stores: Mapping[str, Store], decision: Decision, index: Index) -> None:
    """Store an index that was made from records, where it was missing. Only rank 0; the restore can do without."""
    if world.rank == 0 and {place.level for place in decision.places} == {"durable"}:
        try:
            write_index(stores["durable"], index)
        except LevelFailed as error:
            _log.info("the index of step %d was made from its records and not stored: %s", decision.step, error)


def _merged_by_all(world: World, parts: Sequence[Index]) -> Index:
    """One index of what all ranks have. Raises on all ranks where two parts do not fit together. Collective."""
    held: Index | None = None
    problem = ""
    try:
        held = merged(parts) if parts else None
    except DamagedImage as error:
        problem = str(error)
    distance = 1
    while distance < world.world_size:
        if world.rank % (2 * distance):
            _send(world, _PROBLEM + problem.encode() if problem else b"" if held is None else held.text().encode())
            break
        if world.rank + distance < world.world_size:
            data = _receive(world, world.rank + distance)
            try:
                if data.startswith(_PROBLEM):
                    raise DamagedImage(data[1:].decode())
                found = [parse_index(data, f"the index of rank {world.rank + distance}")] if data else []
                parts = [*found, *([] if held is None else [held])]
                held = merged(parts) if parts else None
            except (DamagedImage, NewerFormat) as error:
                problem = str(error)
        distance *= 2
    data = b"" if world.rank or held is None else held.text().encode()
    data = _told(world, _PROBLEM + problem.encode() if problem and not world.rank else data)
    if data.startswith(_PROBLEM):
        raise DamagedImage(f"the records do not fit together: {data[1:].decode()}")
    return parse_index(data, "the index that rank 0 has made") if world.rank or held is None else held


def _told(world: World, data: bytes) -> bytes:
    """What rank 0 has, on all ranks."""
    if world.group is None:
        return data
    size = torch.tensor([len(data)])
    dist.broadcast(size, src=0, group=world.group)
    if not int(size):
        return b""
    room = torch.frombuffer(bytearray(data or bytes(int(size))), dtype=torch.uint8)
    world.broadcast(room, 0)
    return bytes(room.numpy().data)


def _send(world: World, data: bytes) -> None:
    """To the rank of the tree above this one."""
    lowest = world.rank & -world.rank
    dist.send(torch.tensor([len(data)]), world.rank - lowest, group=world.group)
    if data:
        dist.send(torch.frombuffer(bytearray(data), dtype=torch.uint8), world.rank - lowest, group=world.group)


def _receive(world: World, source: int) -> bytes:
    size = torch.zeros(1, dtype=torch.int64)
    dist.recv(size, source, group=world.group)
    data = torch.zeros(int(size), dtype=torch.uint8)
    if len(data):
        dist.recv(data, source, group=world.group)
    return bytes(data.numpy().data)
