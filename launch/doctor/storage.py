"""A place for snapshots, a folder or a URL: may this process write, read back, list and delete there, and how fast?

What is measured goes through the store that the agent will use, so O_DIRECT, multipart uploads and conditional writes
are tried as they will be needed. The probe is a folder of a random name, removed afterwards; a folder that does not
exist yet is probed by the nearest one above it. Decisions are in `levels.py`.
"""

import contextlib
import datetime
import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from resilient.checkpoint.agent.memory import private_memory
from resilient.checkpoint.levels.claim import NAME as CLAIM
from resilient.checkpoint.levels.files import FileStore
from resilient.checkpoint.levels.open import open_store
from resilient.checkpoint.levels.process import is_dead, this_process
from resilient.checkpoint.levels.remote import RemoteStore
from resilient.checkpoint.levels.store import Store
from resilient.errors import ResilientError

_SIZES = (16 << 20, 128 << 20)  # the second only where the first took so little that it says nothing
_QUICK_S = 0.5
_SHARE_OF_FREE = 20  # no probe takes more than such a part of what is free
_BLOCK = 4096
_CLAIM_BYTES = 64 << 10
_BEAT_S = 12.0  # a holder that lives says so every 10 s
_LOOK_S = 0.5


@dataclass(slots=True, kw_only=True)
class Probe:
    """Facts of one place. What was not measured, for an error before it or by its nature, is None.

    `folder`: the existing folder that was probed in; None for a URL. `refused`: the first thing that failed, and how.
    `overwrites`: the service ignores that a write is not to replace anything. `skew_s`: the place's clock minus ours.
    `claim`: what claim.json says; `claim_beats`: its holder was seen to be alive.
    """

    place: str
    folder: str | None = None
    near: bool = False
    refused: tuple[str, str] | None = None
    overwrites: bool = False
    direct: bool | None = None
    free_bytes: int | None = None
    written_bytes: int = 0
    write_s: float | None = None
    read_s: float | None = None
    skew_s: float | None = None
    claim: dict[str, Any] = field(default_factory=dict)
    claim_beats: bool = False
    left_behind: str = ""


def probe(url: str) -> Probe:
    """Measure a folder or URL. Blocks, for as long as its service takes. Raises PolicyError for what is no URL."""
    store = open_store(url, retries=1)
    found = Probe(place=url, near=store.is_near)
    found.claim, seen = _claim(store), time.monotonic()
    with _probe_store(store, found) as (probing, folder):
        _try_rights(probing, found)
        if found.refused is None:
            found.skew_s = _skew(probing)
            if folder is not None:
                found.direct = _takes_direct_writes(folder)
        if found.refused is None:
            with _noted(found, "write"):
                _measure(probing, found)
    _watch_claim(store, found, seen + _BEAT_S)
    return found


@contextlib.contextmanager
def _probe_store(store: Store, found: Probe) -> Iterator[tuple[Store, Path | None]]:
    """A store in a place of its own below `store`; gone afterwards. The folder, where there is one."""
    name = f"resilient-doctor-{secrets.token_hex(6)}"
    if not isinstance(store, FileStore):
        yield open_store(f"{store.url}/{name}", retries=1), None
        return
    above = nearest_folder(Path(store.root))
    found.folder = str(above)
    found.free_bytes = _free_bytes(above)
    folder = above / f".{name}"
    try:
        yield FileStore(str(folder)), folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if folder.exists():
            found.left_behind = str(folder)


def nearest_folder(path: Path) -> Path:
    """The folder itself, or the nearest one above it that exists."""
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def _free_bytes(folder: Path) -> int:
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize


def _try_rights(store: Store, found: Probe) -> None:
    """What a snapshot needs, in order, up to the first that fails: then the rest says nothing new."""
    content = memoryview(secrets.token_bytes(_BLOCK))
    attempts: tuple[tuple[str, Callable[[], None]], ...] = (
        ("write", lambda: store.write("probe/one", [content])),
        ("read back", lambda: _read_back(store, content)),
        ("list", lambda: _expect(store.list("probe") == ["probe/one"], "what was written does not show")),
        ("write once only", lambda: _write_once(store, content, found)),
        ("delete", lambda: _delete(store)),
    )
    for right, attempt in attempts:
        with _noted(found, right):
            attempt()
        if found.refused is not None:
            _clean_up(store, found)
            return


@contextlib.contextmanager
def _noted(found: Probe, right: str) -> Iterator[None]:
    try:
        yield
    except (ResilientError, OSError) as error:
        found.refused = (right, str(error))


def _read_back(store: Store, content: memoryview) -> None:
    back = bytearray(len(content))
    store.read("probe/one", 0, memoryview(back))
    _expect(back == content, "other bytes came back than were written")


def _write_once(store: Store, content: memoryview, found: Probe) -> None:
    store.write("probe/once", [content], exclusive=True)
    try:
        store.write("probe/once", [content], exclusive=True)
    except FileExistsError:
        return
    found.overwrites = True


def _clean_up(store: Store, found: Probe) -> None:
    """After a refusal: what may be there is removed, as far as that is allowed. (A folder goes as a whole, later.)"""
    try:
        store.delete(["probe/one", "probe/once"])
        left = store.list("probe")
    except (ResilientError, OSError):
        left = ["probe"] if found.refused is not None and found.refused[0] != "write" else []
    if left and found.folder is None:
        found.left_behind = f"{store.url}/{left[0]}"


def _delete(store: Store) -> None:
    store.delete(["probe/one", "probe/once"])
    _expect(store.list("probe") == [], "what was deleted still shows")


def _expect(true: bool, otherwise: str) -> None:
    if not true:
        raise OSError(otherwise)


def _measure(store: Store, found: Probe) -> None:
    """Seconds for bytes to be durable, and to be read again."""
    for size in _SIZES:
        if found.free_bytes is not None and size > found.free_bytes // _SHARE_OF_FREE:
            return
        content = _random(size)
        try:
            found.write_s = _timed(partial(store.write, "probe/speed", [content]))
            found.read_s = _timed(partial(store.read, "probe/speed", 0, content))
        finally:
            store.delete(["probe/speed"])
        found.written_bytes = size
        if found.write_s > _QUICK_S:
            return


def _random(size: int) -> memoryview:
    """Bytes that no file system compresses, page-aligned as an image is."""
    view, piece = private_memory(size), os.urandom(1 << 20)
    for start in range(0, size, len(piece)):
        view[start : start + len(piece)] = piece
    return view


def _timed(work: Callable[[], None]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _takes_direct_writes(folder: Path) -> bool:
    path, block = folder / "direct", private_memory(_BLOCK)
    folder.mkdir(exist_ok=True)
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_DIRECT, 0o600)
    except OSError:
        return False
    try:
        return os.write(fd, block) == _BLOCK
    except OSError:
        return False
    finally:
        os.close(fd)
        path.unlink(missing_ok=True)


def _skew(store: Store) -> float | None:
    """The clock of the file server or service minus ours; None where it is the same clock, or is not told."""
    if store.is_near:
        return None
    before = time.time()
    store.write("probe/clock", [memoryview(b"clock")])
    after = time.time()
    try:
        return outside(_modified(store, "probe/clock"), before, after)
    except (OSError, NotImplementedError, AttributeError, TypeError, ValueError):  # not every service tells
        return None
    finally:
        store.delete(["probe/clock"])


def outside(moment: float, before: float, after: float, resolution_s: float = 1.0) -> float:
    """How far a moment, known to `resolution_s`, lies outside of [before, after]; 0 within."""
    if moment > after:
        return moment - after
    return min(0.0, moment + resolution_s - before)


def _modified(store: Store, name: str) -> float:
    if isinstance(store, FileStore):
        return os.stat(f"{store.root}/{name}").st_mtime
    assert isinstance(store, RemoteStore)
    told: datetime.datetime = store.fs.modified(f"{store.fs._strip_protocol(store.url)}/{name}")
    return (told if told.tzinfo else told.replace(tzinfo=datetime.UTC)).timestamp()


def _claim(store: Store) -> dict[str, Any]:
    """What stands in claim.json; empty where there is none, or none that can be read (the probe will tell why)."""
    try:
        text = bytearray(min(store.size(CLAIM), _CLAIM_BYTES))
        store.read(CLAIM, 0, memoryview(text))
        told = json.loads(text)
    except (ResilientError, OSError, ValueError):
        return {}
    return told if isinstance(told, dict) else {}


def _watch_claim(store: Store, found: Probe, deadline: float) -> None:
    """See whether its holder says that it lives, before the deadline (monotonic), or lets go. Blocks for as long."""
    while found.claim and not found.claim_beats and not _is_dead(found.claim) and time.monotonic() < deadline:
        time.sleep(_LOOK_S)
        before, found.claim = found.claim, _claim(store)
        found.claim_beats = bool(found.claim) and found.claim != before


def _is_dead(claim: dict[str, Any]) -> bool:
    """Whether the holder was a process of this machine, and is gone."""
    held, me = claim.get("process", {}), this_process()
    here = (held.get("host"), held.get("boot_id")) == (me.host, me.boot_id)
    return here and is_dead(int(held["pid"]), int(held["started"]))
