"""The folder that a program gives to `save_checkpoint`: there are names of snapshots in it, and none of their bytes.

    <save_dir>/latest                  the name (tag) of the newest checkpoint that is durable on all ranks
    <save_dir>/<tag>/resilient.json    which step of which URL the tag stands for

Programs and tools that look for `latest` or for folders called `global_step*`, as Hugging Face's Trainer does, find
them. Written with one atomic rename each, off the training thread. DeepSpeed's own checkpoints may lie beside them.
"""

import json
import os
import queue
import threading
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from logging import getLogger
from typing import Any

from resilient.checkpoint.levels.files import FileStore
from resilient.errors import DamagedImage, ResilientError

LATEST = "latest"
_POINTER = "resilient.json"
_FORMAT = "resilient.tag"
_PASSING = 4  # names of snapshots that are in memory alone: older ones have gone from there
_log = getLogger("resilient")


@dataclass(frozen=True, slots=True, kw_only=True)
class Tag:
    """What a tag stands for."""

    url: str
    step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Looked:
    """What there is in a folder. `tags`: ours. `foreign`: of folders with other checkpoints the one that is asked for,
    by its name or as the latest; None where there is none."""

    tags: Mapping[str, Tag] = field(default_factory=dict)
    foreign: str | None = None


def look(folder: str, tag: str | None) -> Looked:
    """Blocks on the file system. `tag`: which checkpoint is asked for; None: the latest. Raises DamagedImage for a file
    of ours that is not whole."""
    try:
        names = sorted(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return Looked()
    tags = {name: found for name in names if (found := _read(os.path.join(folder, name, _POINTER))) is not None}
    asked = tag
    if asked is None:
        with suppress(FileNotFoundError), open(os.path.join(folder, LATEST)) as file:
            asked = file.read().strip()
    there = asked is not None and asked not in tags and os.path.isdir(os.path.join(folder, asked))
    return Looked(tags=tags, foreign=asked if there else None)


class Notes:
    """Writes tags and `latest` on a thread of its own. Made by the one rank that writes them; only `close` and
    `settle` block."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._work: queue.SimpleQueue[tuple[str, str, int, int, threading.Event] | None] = queue.SimpleQueue()
        self._named = threading.Event()  # of the last snapshot that began
        self._named.set()
        self._passing: deque[tuple[str, str]] = deque()
        self._newest = -1
        self._number = 0
        self._thread = threading.Thread(target=self._loop, name="resilient-tags", daemon=True)
        self._thread.start()

    def began(self, folder: str, tag: str, step: int, *, durable: bool) -> int:
        """A snapshot is being taken. `durable`: it will be written. Returns its number for `safe`."""
        self._number += 1
        self._named = threading.Event()
        self._work.put((folder, tag, step, 0 if durable else -1, self._named))
        return self._number

    def settle(self, timeout_s: float = 10.0) -> None:
        """Return when the last snapshot that began has its name: so that a job that is killed later can find it."""
        if not self._named.is_set() and not self._named.wait(timeout_s):
            _log.warning("the folder of checkpoints takes more than %g s to write a name", timeout_s)

    def safe(self, folder: str, tag: str, step: int, number: int) -> None:
        """It is durable on all ranks. Any thread may call it."""
        self._work.put((folder, tag, step, number, threading.Event()))

    def close(self, timeout_s: float = 30.0) -> None:
        """Return when all is written."""
        self._work.put(None)
        self._thread.join(timeout_s)

    def _loop(self) -> None:
        while (one := self._work.get()) is not None:
            folder, tag, step, number, done = one
            try:
                if number > 0:
                    self._write_latest(folder, tag, number)
                else:
                    self._write_tag(folder, tag, step, passing=number < 0)
            except (ResilientError, OSError) as error:
                _log.warning("the name %r of step %d could not be written in %s: %s", tag, step, folder, error)
            finally:
                done.set()

    def _write_tag(self, folder: str, tag: str, step: int, *, passing: bool) -> None:
        text = json.dumps({"format": _FORMAT, "version": 1, "url": self._url, "step": step}) + "\n"
        FileStore(folder).write(f"{tag}/{_POINTER}", [memoryview(text.encode())])
        if (folder, tag) in self._passing:
            self._passing.remove((folder, tag))
        if passing:
            self._passing.append((folder, tag))
        while len(self._passing) > _PASSING:
            old_folder, old_tag = self._passing.popleft()
            with suppress(OSError):
                os.unlink(os.path.join(old_folder, old_tag, _POINTER))
                os.rmdir(os.path.join(old_folder, old_tag))  # not where anything else has been put

    def _write_latest(self, folder: str, tag: str, number: int) -> None:
        if number > self._newest:
            self._newest = number
            FileStore(folder).write(LATEST, [memoryview(tag.encode())])


def _read(path: str) -> Tag | None:
    try:
        with open(path, "rb") as file:
            raw: Any = json.load(file)
        if raw["format"] != _FORMAT or type(raw["step"]) is not int or not isinstance(raw["url"], str):
            raise ValueError("it is something else")
        return Tag(url=raw["url"], step=raw["step"])
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedImage(f"{path} does not name a snapshot ({error}): delete it, or restore it") from error
