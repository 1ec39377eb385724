"""Which steps of a level `resilient prune` deletes, and the deleting: records first, so that nothing half-gone counts.

The rules are those of the agent (`agent/retention.py`). One thing is added, for here nobody waits: the newest step that
is complete by its records' own words (they can be read, and are of one life of the job) stays, whatever its names say.
"""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from secrets import token_hex

from resilient.checkpoint.agent.retention import Deletions, durable_deletions
from resilient.checkpoint.formats.native_records import check_lives, read_records
from resilient.checkpoint.levels.claim import Claim
from resilient.checkpoint.levels.store import Store
from resilient.checkpoint.names import complete_steps, step_of
from resilient.errors import NotACheckpoint, RestoreError


@dataclass(frozen=True, slots=True, kw_only=True)
class Pruning:
    """What is to go. `sound`: the newest step that is known to be complete; `steps` and `kept`: all others by fate."""

    deletions: Deletions
    steps: tuple[int, ...]
    kept: tuple[int, ...]
    sound: int
    reason: str


def sound_step(store: Store, complete: Mapping[int, int]) -> int:
    """The newest of these steps (with their world sizes) whose records all are there and agree.

    Raises NotACheckpoint where there is none: then nothing may be deleted.
    """
    for step in sorted(complete, reverse=True):
        try:
            records = read_records(store, step, range(complete[step]), complete[step])
            check_lives(store.url, step, {rank: record.life for rank, record in records.items()})
        except (RestoreError, FileNotFoundError):
            continue
        if all(_size(store, record.image_name) for record in records.values()):
            return step
    raise NotACheckpoint(f"{store.url} has no complete snapshot that can be read, so nothing is deleted there")


def decide(names: Collection[str], sound: int, *, keep: int, keep_every: int | None) -> Pruning:
    """Pure. Raises NotACheckpoint where there is no snapshot; `keep` is at least 1."""
    complete = complete_steps(names)
    wanted = durable_deletions(names, upto=max(complete), keep_last=keep, keep_every=keep_every)
    deletions = Deletions(
        records=tuple(name for name in wanted.records if step_of(name) != sound),
        images=tuple(name for name in wanted.images if step_of(name) != sound),
    )
    steps = sorted({step for name in (*deletions.records, *deletions.images) if (step := step_of(name)) is not None})
    kept = sorted({step for name in names if (step := step_of(name)) is not None} - set(steps))
    every = f" and every {keep_every}th step" if keep_every else ""
    return Pruning(
        deletions=deletions,
        steps=tuple(steps),
        kept=tuple(kept),
        sound=sound,
        reason=f"the newest {keep} complete steps{every} stay; the newest one that was looked into is {sound}",
    )


def delete(store: Store, pruning: Pruning) -> None:
    """Raises LevelFailed; what is gone by then is of steps that count no more. Safe to repeat."""
    for names in (pruning.deletions.records, pruning.deletions.images):
        store.delete(names)


@contextmanager
def claimed(store: Store) -> Iterator[None]:
    """Hold the place, so that no job writes there meanwhile. Raises UrlInUse as soon as one is seen to be alive.

    Blocks for up to a minute where a claim is left that may be of a job elsewhere.
    """
    claim = Claim(store, f"prune-{token_hex(8)}")
    claim.take()
    try:
        yield
    finally:
        claim.release()


def _size(store: Store, name: str) -> int:
    try:
        return store.size(name)
    except FileNotFoundError:
        return 0
