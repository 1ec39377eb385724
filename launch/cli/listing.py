"""What lies at a URL: every file with its size and age in one listing, and the checkpoints that its names tell of.

Nothing is opened for snapshots of ours, which are complete by presence (law 3). Checkpoints of other formats are
recognised, one folder each, and opened for what they say of themselves.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from resilient.checkpoint.formats.folder import Folder
from resilient.checkpoint.formats.native_records import place_of
from resilient.checkpoint.levels.open import open_store
from resilient.checkpoint.levels.remote import RemoteStore
from resilient.checkpoint.names import parse_record_name, records_by_step, step_of
from resilient.errors import LevelFailed, NotACheckpoint, ResilientError

_TIMES = ("mtime", "LastModified", "last_modified", "updated", "created")  # as the packages of fsspec call it


@dataclass(frozen=True, slots=True)
class Found:
    """A file; `modified` in seconds since 1970, None where the place does not say."""

    name: str
    nbytes: int
    modified: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Listed:
    """One checkpoint. `ranks`: whose part is there, of `world_size` (0: not made of ranks)."""

    url: str
    format: str
    step: int | None
    world_size: int
    ranks: tuple[int, ...] = ()
    nbytes: int = 0
    files: int = 0
    modified: float | None = None
    problem: str = ""
    notes: tuple[str, ...] = field(default=())

    @property
    def missing(self) -> tuple[int, ...]:
        return tuple(sorted(set(range(self.world_size)) - set(self.ranks)))

    @property
    def is_complete(self) -> bool:
        return not self.missing and not self.problem


def files_below(url: str) -> list[Found]:
    """All files. Empty where there is nothing. Raises LevelFailed, PolicyError."""
    store = open_store(url)
    if isinstance(store, RemoteStore):
        return list(_remote(store, url))
    return list(_local(store.url))


def checkpoints(url: str) -> list[Listed]:
    """What lies there, the oldest step first.

    Raises FileNotFoundError where nothing does, NotACheckpoint where it is something else.
    """
    folder = Folder(url)
    try:
        names = folder.names
        if any(parse_record_name(name) for name in names) or place_of(url).step is not None:
            return snapshots(url, files_below(place_of(url).url))
        return _of_others(folder)
    finally:
        folder.close()


def _of_others(folder: Folder) -> list[Listed]:
    """Whatever formats they are of: what lies there itself, or in the folders there."""
    from resilient.checkpoint.formats.registry import recognise

    if folder.only_file is not None:
        return [_opened(folder.url, recognise(folder))]
    inner = _inner(folder.url, folder.names)
    try:
        outer = recognise(folder)
    except NotACheckpoint:
        if not inner:
            raise
        return inner
    # A folder of DeepSpeed's or Megatron's tags is recognised as well as each tag: those say more.
    return inner if any(one.format == outer for one in inner) else [_opened(folder.url, outer), *inner]


def snapshots(url: str, files: Sequence[Found]) -> list[Listed]:
    """Those of ours among a level's files; of a step's own folder only that one. Pure."""
    place = place_of(url)
    by_step: dict[int, list[Found]] = {}
    for file in files:
        step = step_of(file.name)
        if step is not None and place.step in (None, step):
            by_step.setdefault(step, []).append(file)
    records = records_by_step(file.name for file in files)
    return [_snapshot(place.url, step, by_step[step], records.get(step, {})) for step in sorted(by_step)]


def _snapshot(url: str, step: int, files: Sequence[Found], worlds: dict[int, set[int]]) -> Listed:
    """Of a step that was written for several world sizes the one that is complete, or the nearest to it."""
    world_size, ranks = max(
        worlds.items(), key=lambda item: (len(item[1]) == item[0], len(item[1])), default=(0, set[int]())
    )
    others = sorted(set(worlds) - {world_size})
    return Listed(
        url=url,
        format="native",
        step=step,
        world_size=world_size,
        ranks=tuple(sorted(ranks)),
        nbytes=sum(file.nbytes for file in files),
        files=len(files),
        modified=max((file.modified for file in files if file.modified is not None), default=None),
        problem="" if worlds else "no record is there",
        notes=tuple(f"there are also records of {other} ranks" for other in others),
    )


def _inner(url: str, names: Sequence[str]) -> list[Listed]:
    """The folders directly below that are checkpoints themselves, as most trainers keep them: one a step."""
    from resilient.checkpoint.formats.registry import recognise

    found = []
    for name in sorted({name.split("/", 1)[0] for name in names if "/" in name}):
        folder = Folder(f"{url.rstrip('/')}/{name}")
        try:
            found.append(_opened(folder.url, recognise(folder)))
        except NotACheckpoint:
            continue  # a part of a checkpoint, or something else: what lies above decides
        finally:
            folder.close()
    return sorted(found, key=lambda one: (-1 if one.step is None else one.step, one.url))


def _opened(url: str, format_name: str) -> Listed:
    """A checkpoint of another format, by what it says of itself; with the reason if it does not open."""
    from resilient.checkpoint.formats.registry import open_source
    from resilient.checkpoint.formats.source import Reference

    files = files_below(url) if not _is_file(url) else []
    modified = max((file.modified for file in files if file.modified is not None), default=None)
    try:
        with open_source(Reference(url=url, format=format_name)) as source:
            catalog = source.catalog
            return Listed(
                url=url,
                format=format_name,
                step=catalog.step,
                world_size=catalog.world_size,
                ranks=tuple(range(catalog.world_size)),
                nbytes=sum(file.nbytes for file in files) or sum(file.nbytes for file in catalog.files),
                files=len(files) or len(catalog.files),
                modified=modified if files else _modified(url),
                notes=tuple(catalog.notes),
            )
    except (ResilientError, FileNotFoundError) as error:
        return Listed(
            url=url,
            format=format_name,
            step=None,
            world_size=0,
            nbytes=sum(file.nbytes for file in files),
            files=len(files),
            modified=modified,
            problem=str(error),
        )


def _is_file(url: str) -> bool:
    return "://" not in url and os.path.isfile(url)


def _modified(url: str) -> float | None:
    return os.stat(url).st_mtime if _is_file(url) else None


def _local(root: str) -> Iterator[Found]:
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            path = os.path.join(folder, name)
            try:
                stat = os.stat(path)
            except FileNotFoundError:  # a job deletes what is old
                continue
            if not name.startswith("."):
                yield Found(os.path.relpath(path, root), stat.st_size, stat.st_mtime)


def _remote(store: RemoteStore, url: str) -> Iterator[Found]:
    root = store.fs._strip_protocol(store.url).rstrip("/")
    try:
        found = store.fs.find(root, detail=True)
    except FileNotFoundError:
        return
    except OSError as error:
        raise LevelFailed(error.errno or 5, f"cannot list {url}: {error}") from error
    for name, info in found.items():
        short = name.removeprefix(root).lstrip("/")
        if short and not any(part.startswith(".") for part in short.split("/")):
            yield Found(short, int(info.get("size") or 0), _time_of(info))


def _time_of(info: dict[str, Any]) -> float | None:
    for key in _TIMES:
        value = info.get(key)
        if isinstance(value, datetime):
            return value.timestamp()
        if isinstance(value, int | float):
            return float(value)
        if isinstance(value, str):
            try:
                return datetime.fromisoformat(value).timestamp()
            except ValueError:
                continue
    return None
