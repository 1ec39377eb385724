"""Writes sealed images to the local and the durable level, and deletes what retention lets go.

Where both levels are due the local file is written first and the durable object is then written from that file, so that
the slot is free again after the fast one. Decisions about what counts as complete are in `snapshots.py`, hanging
threads in `writer.py`, what may be deleted in `retention.py`. Everything here runs on the loop, but for what jobs do.
"""

import logging
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from resilient.checkpoint.agent.loop import Loop
from resilient.checkpoint.agent.retention import Deletions, durable_deletions, local_deletions
from resilient.checkpoint.agent.slots import Slot
from resilient.checkpoint.agent.snapshots import DURABLE, LOCAL, Progress, Snapshot, Snapshots, Tell
from resilient.checkpoint.agent.writer import Cancelled, Job, LevelWriter
from resilient.checkpoint.digest import BLOCK_BYTES, digest
from resilient.checkpoint.levels.files import FileStore
from resilient.checkpoint.levels.image_io import chunks_of, read_image_range, write_image
from resilient.checkpoint.levels.store import Store
from resilient.checkpoint.names import catalog_name
from resilient.checkpoint.record import Record
from resilient.errors import DamagedImage, LevelFailed, ResilientError
from resilient.policy import Policy

if TYPE_CHECKING:
    from resilient.checkpoint.levels.index_io import IndexKeeper

CHUNK_BYTES = 8 * BLOCK_BYTES
FAILURES_KEPT = 100
STEPS_KEPT = 64  # complete local steps remembered beyond those that are kept

log = logging.getLogger(__name__)

OpenStore = Callable[[str, int], Store]


class Holder(Protocol):
    """What holds the images in memory."""

    def view(self, slot: Slot) -> memoryview: ...
    def pin(self, slot: Slot) -> None: ...
    def unpin(self, slot_id: int) -> None: ...


@dataclass(eq=False, slots=True, kw_only=True)
class _Write:
    """One image on its way to one level. `slot` is pinned while it is read; None where a local file is read instead."""

    level: str
    key: int
    record: Record
    slot: Slot | None
    then_durable: bool = False
    job: Job | None = None


class Stores:
    """The stores of the levels, opened when a job first needs them, on the job's own thread."""

    def __init__(self, open_store: OpenStore) -> None:
        self._open_store = open_store
        self._lock = threading.Lock()
        self._opened: dict[str, Store] = {}

    def get(self, url: str, retries: int) -> Store:
        with self._lock:
            if url not in self._opened:
                self._opened[url] = self._open_store(url, retries)
            return self._opened[url]


class Writing:
    """All writes of this node."""

    def __init__(
        self,
        loop: Loop,
        clock: Callable[[], float],
        stores: Stores,
        snapshots: Snapshots,
        holder: Holder,
        announce: Callable[[Sequence[Tell]], None],
        settle: Callable[[], None],
    ) -> None:
        self._loop = loop
        self._stores = stores
        self._snapshots = snapshots
        self._holder = holder
        self._announce = announce
        self._settle = settle
        self._policy = Policy()
        self._durable_url: str | None = None
        self._writers = {level: LevelWriter(level, self._policy.write_timeout_s, clock) for level in (LOCAL, DURABLE)}
        self._writes: list[_Write] = []
        self._failures: dict[int, deque[str]] = {}
        self._local_complete: set[int] = set()
        self._served: set[int] = set()
        self._refused: dict[str, str] = {}
        self._swept: set[str] = set()
        self._index_keeper: IndexKeeper | None = None
        self.indexing = 0

    def configure(self, policy: Policy, durable_url: str | None, ranks: Iterable[int]) -> None:
        """What the latest trainer asks for; it holds for jobs that begin from now on."""
        self._policy, self._durable_url = policy, durable_url
        self._served.update(ranks)
        for writer in self._writers.values():
            writer.timeout_s = policy.write_timeout_s

    def refuse(self, level: str, reason: str | None) -> None:
        """From now on every write to a level fails with this reason; None: no more."""
        self._refused.pop(level, None)
        if reason is not None:
            self._refused[level] = reason

    # --- images

    def write(self, slot: Slot, record: Record, levels: Sequence[str]) -> None:
        """Have a sealed image written to these levels. The slot is pinned until its bytes are not needed for that."""
        assert slot.snapshot is not None
        snapshot = slot.snapshot
        due = [level for level in (LOCAL, DURABLE) if level in levels]
        for level in due:
            self._announce(self._snapshots.due(snapshot.key, level))
        due = [level for level in due if not self._has_failed(snapshot.key, level)]
        if due:
            self._holder.pin(slot)
            then_durable = due == [LOCAL, DURABLE]
            write = _Write(level=due[0], key=snapshot.key, record=record, slot=slot, then_durable=then_durable)
            self._submit(write)

    def has(self, snapshot: Snapshot, rank: int, level: str) -> bool:
        """Whether a rank's image is at a level, or on its way there."""
        pending = [write for write in self._writes if (write.key, write.record.rank) == (snapshot.key, rank)]
        on_its_way = any(write.level == level or (level == DURABLE and write.then_durable) for write in pending)
        return on_its_way or rank in snapshot.arrived.get(level, ())

    def cancel_failed(self) -> None:
        """Give up the writes of snapshots that have failed meanwhile."""
        for write in self._writes:
            levels = (write.level, DURABLE) if write.then_durable else (write.level,)
            if write.job is not None and all(self._has_failed(write.key, level) for level in levels):
                write.job.cancel()

    def _has_failed(self, key: int, level: str) -> bool:
        snapshot = self._snapshots.get(key)
        return snapshot is None or snapshot.progress.get(level) is Progress.FAILED

    def _submit(self, write: _Write) -> None:
        record = write.record
        self._writes.append(write)
        write.job = Job(
            name=f"writing the image of rank {record.rank} at step {record.step}",
            run=self._work_of(write),
            done=lambda error: self._loop.post(lambda: self._done(write, error)),
        )
        reason = self._refused.get(write.level) or self._not_configured(write.level)
        if reason is not None:
            write.job.done(LevelFailed(f"{write.job.name} at level {write.level}: {reason}"))
        else:
            self._writers[write.level].submit(write.job)

    def _not_configured(self, level: str) -> str | None:
        if level == LOCAL and self._policy.local is None:
            return "the policy names no folder for it (local)"
        if level == DURABLE and self._durable_url is None:
            return "the run has no URL"
        return None

    def _work_of(self, write: _Write) -> Callable[[Callable[[], bool]], None]:
        """What the writing thread does; made on the loop, so that it needs none of our state."""
        stores, policy, record = self._stores, self._policy, write.record
        url = policy.local if write.level == LOCAL else self._durable_url
        compression = policy.durable_compression if write.level == DURABLE else None
        view = None if write.slot is None else self._holder.view(write.slot)

        def work(is_cancelled: Callable[[], bool]) -> None:
            assert url is not None

            def chunks() -> Iterable[memoryview]:
                if view is not None:
                    found: Iterable[memoryview] = chunks_of(view, CHUNK_BYTES)
                else:
                    assert policy.local is not None
                    found = _chunks_of_file(stores.get(policy.local, policy.retries), record)
                return _until(is_cancelled, found)

            store = stores.get(url, policy.retries)
            write_image(store, record, chunks, compression=compression, cancelled=is_cancelled)

        return work

    def _done(self, write: _Write, error: ResilientError | None) -> None:
        self._writes.remove(write)
        record = write.record
        if error is None:
            if self._snapshots.get(write.key) is not None:
                self._announce(self._snapshots.arrive(write.key, write.level, record.rank))
        else:
            log.warning("rank %d, step %d, level %s: %s", record.rank, record.step, write.level, error)
            self._failures.setdefault(record.rank, deque(maxlen=FAILURES_KEPT)).append(str(error))
            if self._snapshots.get(write.key) is not None:
                self._announce(self._snapshots.fail(write.key, write.level, record.rank, str(error)))
        keeps_slot = self._go_on(write, written=error is None)
        if write.slot is not None and not keeps_slot:
            self._holder.unpin(write.slot.id)
        self._settle()

    def _go_on(self, write: _Write, *, written: bool) -> bool:
        """Begin the durable write that follows a local one; whether it still needs the slot."""
        if not write.then_durable or self._has_failed(write.key, DURABLE):
            return False
        slot = None if written else write.slot  # without a file it has to come from memory
        self._submit(_Write(level=DURABLE, key=write.key, record=write.record, slot=slot))
        return slot is not None

    # --- the index

    def index(self, step: int) -> None:
        """A step became complete at the durable level: merge the records of all ranks there, on the node of rank 0."""
        url, size, retries = self._durable_url, self._snapshots.world_size, self._policy.retries
        if url is None or 0 not in self._snapshots.node_ranks:
            return

        def work(is_cancelled: Callable[[], bool]) -> None:
            from resilient.checkpoint.levels.index_io import IndexKeeper  # numpy: an agent begins sooner without

            self._index_keeper = self._index_keeper or IndexKeeper()
            self._index_keeper.keep(self._stores.get(url, retries), step, size, is_cancelled)

        name = f"merging the records of step {step} into {catalog_name(step)}"
        job = Job(name=name, run=work, done=lambda error: self._loop.post(lambda: self._indexed(error)))
        self.indexing += 1
        self._writers[DURABLE].submit(job)

    def _indexed(self, error: ResilientError | None) -> None:
        self.indexing -= 1
        if error is not None:
            log.warning("whoever needs the index makes it from the records, since it was not written: %s", error)
        self._settle()

    # --- retention

    def retain(self, level: str, step: int) -> None:
        """A step became complete at a level: delete there what is not to be kept."""
        policy, served = self._policy, frozenset(self._served)
        if level == LOCAL:
            self._local_complete.add(step)
            url = policy.local
        else:
            url = self._durable_url if 0 in self._snapshots.node_ranks else None
        if url is None:
            return
        complete, uploading = set(self._local_complete), self._uploading()
        for old in sorted(self._local_complete)[: -policy.local_keep_last - STEPS_KEPT]:
            self._local_complete.discard(old)

        def decide(names: list[str]) -> Deletions:
            if level == DURABLE:
                return durable_deletions(names, upto=step, keep_last=policy.keep_last, keep_every=policy.keep_every)
            return local_deletions(
                names,
                upto=step,
                ranks=served,
                complete=complete,
                keep_last=policy.local_keep_last,
                uploading=uploading,
            )

        def work(is_cancelled: Callable[[], bool]) -> None:
            store = self._stores.get(url, policy.retries)
            if url not in self._swept and isinstance(store, FileStore):
                self._swept.add(url)
                store.sweep()  # what agents that were killed have left half-written
            deletions = decide(store.list())
            for names in (deletions.records, deletions.images):
                if names and not is_cancelled():
                    store.delete(names)

        self._writers[level].submit(Job(name=f"deleting what is older than step {step}", run=work, done=_log_deletion))

    def _uploading(self) -> set[int]:
        """Steps whose local files are still to be read for the durable level."""
        waiting = [
            write for write in self._writes if (write.level == DURABLE and write.slot is None) or write.then_durable
        ]
        return {write.record.step for write in waiting}

    # --- ends

    def check(self) -> None:
        """Look after writes that hang. Called every now and then."""
        for writer in self._writers.values():
            writer.check()

    def pending(self, rank: int | None = None) -> int:
        """Writes of a rank (of all ranks) that have not ended; for rank 0 indexes too, for all ranks also deletions."""
        if rank is None:
            return len(self._writes) + sum(writer.pending for writer in self._writers.values())
        return sum(write.record.rank == rank for write in self._writes) + (self.indexing if rank == 0 else 0)

    def pending_by_level(self) -> Counter[str]:
        return Counter(write.level for write in self._writes)

    def take_failures(self, rank: int) -> list[str]:
        """What failed of a rank's writes since this was last asked."""
        return list(self._failures.pop(rank, ()))

    def close(self) -> None:
        for writer in self._writers.values():
            writer.stop()


def _log_deletion(error: ResilientError | None) -> None:
    if error is not None:
        log.warning("old snapshots could not be deleted, it is tried again after the next one: %s", error)


def _until(is_cancelled: Callable[[], bool], chunks: Iterable[memoryview]) -> Iterable[memoryview]:
    """The chunks, as long as anybody wants them: a write that was given up must publish nothing."""
    for chunk in chunks:
        if is_cancelled():
            raise Cancelled
        yield chunk
    if is_cancelled():
        raise Cancelled


def _chunks_of_file(store: Store, record: Record) -> Iterable[memoryview]:
    """An image from the level where it was written before, verified on the way. Raises DamagedImage."""
    assert CHUNK_BYTES % BLOCK_BYTES == 0
    room = memoryview(bytearray(min(CHUNK_BYTES, record.image_bytes)))
    for start in range(0, record.image_bytes, CHUNK_BYTES):
        chunk = room[: min(CHUNK_BYTES, record.image_bytes - start)]
        read_image_range(store, record, start, chunk)
        for number, block in enumerate(chunks_of(chunk, BLOCK_BYTES), start // BLOCK_BYTES):
            if digest(block) != record.blocks[number]:
                raise DamagedImage(
                    f"{store.url}/{record.image_name} differs from what was sealed in block {number} of rank "
                    f"{record.rank} at step {record.step}; the disk damaged it, and it is not sent on"
                )
        yield chunk
