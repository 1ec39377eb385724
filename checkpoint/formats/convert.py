"""Any checkpoint into any format, in parallel processes, without a whole parameter in memory.

The stages: open and select, plan (the sink's), take the target (`converting/target.py`), carry out the tasks
(`tasks.py`, `workers.py`, `filling.py`). Memory: workers x WORKER_BYTES, and what the programs and the catalog take.
"""

import hashlib
import os
import secrets
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from resilient.checkpoint.formats.converting.filling import WORKER_BYTES
from resilient.checkpoint.formats.converting.journal import Journal
from resilient.checkpoint.formats.converting.target import Target
from resilient.checkpoint.formats.converting.tasks import Done, Schedule
from resilient.checkpoint.formats.converting.workers import Job, Opener, run_here, run_in_workers
from resilient.checkpoint.formats.output import Output, SinkOptions, TensorBytes
from resilient.checkpoint.formats.registry import SINKS, format_of, open_source
from resilient.checkpoint.formats.select import select as selected
from resilient.checkpoint.formats.source import Progress, Reference, Source
from resilient.checkpoint.formats.values import check_conversion
from resilient.checkpoint.levels.process import this_process
from resilient.errors import UsageError

__all__ = ["WORKER_BYTES", "Report", "convert"]

_MOST_WORKERS = 8
_BYTES_PER_WORKER = 512 << 20  # below this a process, which has to import torch, costs more than it brings


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What a conversion did. `files` and `nbytes` are those written now, `skipped` were there from an earlier run.

    `beyond`: tensors whose values were beyond the range of the dtype that they were converted to, and how many were;
    they were set to its ends. `notes`: what the source or the conversion has to say.
    """

    source: str
    target: str
    format: str
    files: int
    nbytes: int
    skipped: int
    tensors: int
    workers: int
    beyond: dict[str, int]
    notes: tuple[str, ...]


def convert(
    reference: Reference,
    target_url: str,
    *,
    to: str,
    options: SinkOptions | None = None,
    select: Sequence[str] = (),
    force: bool = False,
    workers: int | None = None,
    progress: Progress | None = None,
    total: Callable[[int], None] | None = None,
    open_source: Opener = open_source,
) -> Report:
    """Write a checkpoint in another format, at a local path or an fsspec URL. Blocks until it is on the medium.

    `select`: patterns of names (`formats/select.py`). `force`: replace what is at the target. `workers`: processes;
    None: by size and cores, one: this process alone. `total` is told how many bytes there are to do, then `progress`
    each time how many more are done. `open_source` is called in every worker; workers are spawned, so a script that
    calls this has its own actions behind `if __name__ == "__main__"`, as with `multiprocessing`.

    A target that is there is refused, unless it is this conversion, interrupted: then it is taken up where it ended.
    Raises UsageError (nothing can be, or was, written), RestoreError and FileNotFoundError for the source,
    LevelFailed; after those a second call goes on. KeyboardInterrupt leaves no process behind.
    """
    options = options or SinkOptions()
    if to not in SINKS:
        raise UsageError(f"{to!r} is no format that is written; those are {', '.join(SINKS)}")
    sink = format_of(to).plan
    assert sink is not None
    target = Target(target_url, to)
    options = replace(options, into=target.into or options.into)
    with open_source(reference) as source:
        source.catalog = selected(source.catalog, select)
        outputs = sink(source, options)
        _check(source, outputs, target)
        identity = _identity(source, outputs, to, options, select)
        names = tuple(output.name for output in outputs)
        mine = Journal(identity=identity, outputs=names, boot=this_process().boot_id)
        with target.claimed(mine, outputs, force=force) as there:
            return _carry_out(source, target, outputs, there, _Run(to, workers, progress, total, open_source))


@dataclass(frozen=True, slots=True)
class _Run:
    """How the caller wants it done."""

    to: str
    workers: int | None
    progress: Progress | None
    total: Callable[[int], None] | None
    open_source: Opener


@dataclass(slots=True)
class _Tally:
    """What tasks have told so far."""

    progress: Progress | None
    nbytes: int = 0
    beyond: dict[str, int] = field(default_factory=dict)

    def add(self, done: Done) -> None:
        self.nbytes += done.nbytes
        for name, count in done.beyond.items():
            self.beyond[name] = self.beyond.get(name, 0) + count
        if self.progress is not None:
            self.progress(done.nbytes)


def _carry_out(source: Source, target: Target, outputs: list[Output], there: frozenset[str], run: _Run) -> Report:
    written = [output for output in outputs if output.name not in there]
    left = sum(output.nbytes for output in written)
    count = _count(run.workers, left, target.url)
    tally = _Tally(run.progress)
    if run.total is not None:
        run.total(left)
    target.check_room(left)
    schedule = Schedule(source.catalog, outputs, skip=there, local=target.folder.is_local)
    job = Job(
        open_source=run.open_source,
        reference=_pinned(source),
        files=tuple(source.catalog.files),
        target_url=target.folder.url,
        token=secrets.token_hex(4),
    )
    if count == 1:
        run_here(schedule, source, job, tally.add)
    else:
        run_in_workers(schedule, count, job, tally.add)
    assert schedule.is_finished
    names = _tensors_of(outputs)
    return Report(
        source=source.reference.url,
        target=target.url,
        format=run.to,
        files=len(written),
        nbytes=tally.nbytes,
        skipped=len(there),
        tensors=len(names),
        workers=count,
        beyond=tally.beyond,
        notes=(*source.catalog.notes, *_left_out(source, names)),
    )


def _pinned(source: Source) -> Reference:
    """The reference by which workers open what is open here, though a job may write newer snapshots meanwhile."""
    native = source.catalog.format == "native"
    return replace(source.reference, step=source.catalog.step) if native else source.reference


def _count(workers: int | None, nbytes: int, url: str) -> int:
    if workers is not None and workers < 1:
        raise UsageError(f"{workers} workers: at least one is needed")
    if url.startswith("memory:"):
        return 1  # what is in memory other processes do not see
    if workers is not None:
        return workers
    return max(1, min(_MOST_WORKERS, len(os.sched_getaffinity(0)), nbytes // _BYTES_PER_WORKER))


def _check(source: Source, outputs: Sequence[Output], target: Target) -> None:
    """Raises UsageError for a plan that cannot be carried out, and for a target that would destroy the source."""
    names = [output.name for output in outputs]
    if len(set(names)) != len(names):
        raise UsageError(f"two outputs are called {next(name for name in names if names.count(name) > 1)!r}")
    for name in names:
        target.folder.path(name)  # raises for one that leads out of the target
    for output in outputs:
        for part in output.parts:
            if isinstance(part, TensorBytes):
                check_conversion(part.name, part.tensor_in(source.catalog).dtype, part.dtype)
    if source.folder.is_local and target.folder.is_local:
        _check_places(source, Path(target.folder.root).resolve(), target.into)
    elif _inside(target.folder.root.split("/"), source.folder.root.split("/")):
        raise UsageError(f"{target.url} is, or lies in, the source {source.folder.url}: give another place")


def _check_places(source: Source, root: Path, into: str | None) -> None:
    place = Path(source.folder.root).resolve()
    if source.folder.only_file is not None:
        if place == root / (into or "") or (into is None and root in place.parents):
            raise UsageError(f"the source {place} would be, or lies in, what is written: give another place")
    elif root == place or place in root.parents:
        raise UsageError(f"{root} is, or lies in, the source {place}: give another place")
    elif into is None and root in place.parents:
        raise UsageError(f"the source {place} lies in the target {root}: give another place")


def _inside(path: Sequence[str], folder: Sequence[str]) -> bool:
    return list(path[: len(folder)]) == list(folder)


def _identity(
    source: Source, outputs: Sequence[Output], to: str, options: SinkOptions, select: Sequence[str]
) -> dict[str, Any]:
    """What makes two conversions the same: source, its bytes as far as a look tells, and what becomes of them."""
    return {
        "source": source.folder.root,
        "catalog": hashlib.sha256(source.catalog.text().encode()).hexdigest(),
        "changed": hashlib.sha256(repr(_times(source)).encode()).hexdigest(),
        "to": to,
        "options": {key: value for key, value in asdict(options).items() if value is not None},
        "select": list(select),
        "plan": _digest(outputs),
    }


def _times(source: Source) -> list[tuple[int, int]]:
    """Sizes and times of the source's files, where they are local."""
    if not source.folder.is_local:
        return []
    stats = [os.stat(source.folder.path(file.name)) for file in source.catalog.files]
    return [(stat.st_size, stat.st_mtime_ns) for stat in stats]


def _digest(outputs: Sequence[Output]) -> str:
    digest = hashlib.sha256()
    for output in outputs:
        digest.update(f"{output.name!r}{output.last}{output.derive is None}".encode())
        for part in output.parts:
            digest.update(hashlib.sha256(part).digest() if isinstance(part, bytes) else repr(part).encode())
    return digest.hexdigest()


def _tensors_of(outputs: Sequence[Output]) -> set[str]:
    return {part.name for output in outputs for part in output.parts if isinstance(part, TensorBytes)}


def _left_out(source: Source, names: set[str]) -> list[str]:
    missing = [name for name in source.catalog.tensors if name not in names]
    if not missing:
        return []
    return [f"{len(missing)} tensors of the source are not part of the target, such as {missing[0]}"]
