"""How the merged index of a snapshot is kept on a store, and made from its records where it is missing.

It is never the truth: whoever reads an image reads its record too, and compares (`Index.disagreement`). It is written
after the snapshot is complete; another attempt at the step replaces it.
"""

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from resilient.checkpoint.catalog.index import Index, Member, index_of, merged, parse_index
from resilient.checkpoint.image import data_start_of
from resilient.checkpoint.levels.image_io import RECORD_READERS, read_image_range, read_record
from resilient.checkpoint.levels.store import Store
from resilient.checkpoint.names import catalog_name, record_name
from resilient.checkpoint.record import HEAD_BYTES, Head, Record, parse_head
from resilient.errors import DamagedImage, NewerFormat, ResilientError

_log = logging.getLogger("resilient")

_BATCH = 64  # records in memory at once
MOST_RECORD_BYTES = 256 << 20  # of all records together, that an agent reads beside the training


def read_index(store: Store, step: int, world_size: int) -> Index:
    """The index of a snapshot, as `catalog.json` says it. Blocks; any thread.

    Raises FileNotFoundError where there is none, DamagedImage where it is damaged, of another snapshot or not of all
    ranks, NewerFormat, LevelFailed: it can be made again from the records then.
    """
    return checked_index(read_text(store, step), f"{store.url}/{catalog_name(step)}", step, world_size)


def read_text(store: Store, step: int) -> bytes:
    """What `catalog.json` of a step holds. Raises FileNotFoundError, LevelFailed."""
    name = catalog_name(step)
    data = bytearray(store.size(name))
    store.read(name, 0, memoryview(data))
    return bytes(data)


def checked_index(data: bytes, where: str, step: int, world_size: int) -> Index:
    """The index of a complete snapshot in `data`. Raises DamagedImage where it is none, or of another, NewerFormat."""
    index = parse_index(data, where)
    if (index.step, index.world_size) != (step, world_size):
        raise DamagedImage(f"{where} is of step {index.step} of {index.world_size} ranks, not of {world_size}")
    if not index.is_complete or len(index.lives) != 1:
        raise DamagedImage(f"{where} is not of all ranks of one snapshot")
    return index


def write_index(store: Store, index: Index) -> None:
    """Store the index of a complete snapshot. Blocks; any thread; safe to repeat. Raises LevelFailed."""
    store.write(catalog_name(index.step), [memoryview(index.text().encode())])


def make_index(store: Store, step: int, ranks: Sequence[int], world_size: int) -> Index:
    """The index of these ranks, at least one, from their records, of which few are in memory at a time. Blocks.

    Raises what `read_record` does, for the first record that cannot be read.
    """
    parts: list[Index] = []
    with ThreadPoolExecutor(RECORD_READERS, thread_name_prefix="resilient-records") as pool:
        for first in range(0, len(ranks), _BATCH):
            batch = ranks[first : first + _BATCH]
            records = list(pool.map(lambda rank: read_record(store, step, rank, world_size), batch))
            parts.append(index_of(records, {one.rank: start_of(store, one) for one in records}))
    return parts[0] if len(parts) == 1 else merged(parts)


def start_of(store: Store, record: Record) -> int:
    """Where the data of an image begins; of a record that does not say it, as the image does, which is not verified."""
    if record.data_start is not None:
        return record.data_start
    head = memoryview(bytearray(8))
    read_image_range(store, record, 0, head)
    return data_start_of(head)


def current_index(store: Store, step: int, world_size: int) -> Index:
    """The index of a snapshot as it is now: the stored one where it is right, else made from the records. Blocks.

    Raises what `make_index` does.
    """
    index, problem = stored_index(store, step, world_size)
    if problem:
        _log.warning("the index is made anew from the records: %s", problem)
    return index or make_index(store, step, range(world_size), world_size)


def stored_index(store: Store, step: int, world_size: int) -> tuple[Index | None, str]:
    """What `catalog.json` says, where it is right, and why it is not; neither where there is none. Blocks.

    Of every record the beginning is read, so that one of an earlier attempt at the step is not taken for right. Raises
    LevelFailed.
    """
    try:
        index = read_index(store, step, world_size)
    except FileNotFoundError:
        return None, ""
    except (DamagedImage, NewerFormat) as error:
        return None, str(error)
    if _with_heads(index, _heads(store, step, world_size), step) != index:
        return None, f"{store.url}/{catalog_name(step)} is of another attempt at the step than the records"
    return index, ""


def mend_index(store: Store, step: int, world_size: int) -> bool:
    """Make and store the index of a complete snapshot if there is none that is right; whether that was so. Blocks.

    Raises what `make_index` does, and LevelFailed.
    """
    index, _ = stored_index(store, step, world_size)
    if index is not None:
        return False
    index = make_index(store, step, range(world_size), world_size)
    if len(index.lives) == 1:
        write_index(store, index)
    return True


def _heads(store: Store, step: int, world_size: int) -> list[Head | None]:
    with ThreadPoolExecutor(RECORD_READERS, thread_name_prefix="resilient-records") as pool:
        return list(pool.map(lambda rank: _head(store, step, rank, world_size), range(world_size)))


def _with_heads(index: Index, heads: Sequence[Head | None], step: int) -> Index | None:
    """An index with what changes from step to step, as these records have it; None where the plans are others."""
    members: dict[int, Member] = {}
    if len(heads) != index.world_size:
        return None
    for rank, head in enumerate(heads):
        if head is None or (head.step, head.rank, head.world_size) != (step, rank, index.world_size):
            return None
        if head.plan_digest != index.members[rank].plan_digest:
            return None
        members[rank] = replace(
            index.members[rank], life=head.life, image_bytes=head.image_bytes, data_start=head.data_start
        )
    return replace(index, members=members, step=step)


class IndexKeeper:
    """Writes the index of each snapshot that becomes complete, for an agent. One thread at a time.

    While the plans of the ranks stay as they were, of each record only the beginning is read: what the records say of
    their pieces is then what the last index says. Where all records together are very long none is written: the first
    job that needs it makes it, with all its ranks.
    """

    def __init__(self) -> None:
        self._last: Index | None = None

    def keep(self, store: Store, step: int, world_size: int, is_cancelled: Callable[[], bool]) -> Index | None:
        """Write `catalog.json` of a complete snapshot; None where that was not worth it, or was given up.

        Raises FileNotFoundError, DamagedImage, LevelFailed: the snapshot is as good without.
        """
        own = store.size(record_name(step, 0, world_size))
        if own * world_size > MOST_RECORD_BYTES:
            return None
        known = None if self._last is None else _with_heads(self._last, _heads(store, step, world_size), step)
        index = known or make_index(store, step, range(world_size), world_size)
        if len(index.lives) != 1 or is_cancelled():
            return None
        write_index(store, index)
        self._last = index
        return index


def _head(store: Store, step: int, rank: int, world_size: int) -> Head | None:
    name = record_name(step, rank, world_size)
    try:
        size = store.size(name)
        text = bytearray(min(size, HEAD_BYTES))
        store.read(name, 0, memoryview(text))
    except (FileNotFoundError, ResilientError):
        return None
    return parse_head(bytes(text))
