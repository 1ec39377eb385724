"""Where a conversion goes: refused where something else is, cleared with force, taken up again after an interruption.

A journal in the target says whose conversion it is. It is written first and removed last, so a target without one is
whole, and one with it is nobody's checkpoint yet (`registry.open_source` refuses it). Files get their names when they
are whole: an output that is there under its name, with its size, is done. All are brought onto the medium together,
before the journal goes; so what was written before the machine started anew is not trusted.
"""

import errno
import fcntl
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from fnmatch import fnmatchcase

from resilient.checkpoint.formats.converting.journal import Decision, Journal, decide, parse_journal
from resilient.checkpoint.formats.converting.local_file import opened, sync
from resilient.checkpoint.formats.folder import JOURNAL, PARTIAL, Folder
from resilient.checkpoint.formats.output import Output
from resilient.errors import LevelFailed, UsageError

_MOST_JOURNAL_BYTES = 64 << 20
_FEW = 64  # files that are brought onto the medium one by one
_ONE_FILE = {"safetensors": (".safetensors",), "torch": (".pt", ".pth", ".bin", ".ckpt")}
_COUNTS = {  # what readers of a format would take for a part of the new checkpoint
    "safetensors": (
        "*.safetensors.index.json",
        "model.safetensors",
        "model-*-of-*.safetensors",
        "optimizer.safetensors",
    ),
    "dcp": (".metadata", "__*_*.distcp"),
    "deepspeed-universal": ("latest_universal",),
}


class Target:
    """The place a conversion goes to. `folder` has the outputs; of a target that is one file, it is that file's."""

    def __init__(self, url: str, to: str) -> None:
        self.url = url.rstrip("/") or url
        name = self.url.rsplit("/", 1)[-1]
        one_file = name.endswith(_ONE_FILE.get(to, ()))  # by its name alone: it need not be there yet
        self.into = name if one_file else None
        self.folder = Folder((self.url[: -len(name)] or ".") if one_file else self.url)
        self.journal_name = f".{name}{JOURNAL}" if one_file else JOURNAL
        self._to = to
        self._made: list[str] = []

    @contextmanager
    def claimed(self, mine: Journal, outputs: Sequence[Output], *, force: bool) -> Iterator[frozenset[str]]:
        """Take the place for one conversion; gives the names of outputs that are there already.

        Raises UsageError where it may not be done, LevelFailed. On leaving without an error the conversion is complete.
        After an error what was finished stays, to be taken up again; where nothing was, nothing stays.
        """
        self._decide(mine, force)  # so that nothing is made where it is refused
        self._make_folder()
        with self._locked():
            journal, decision = self._decide(mine, force)
            try:
                yield self._begin(journal, decision, mine, outputs)
            except BaseException:
                self._leave(outputs)
                raise
            self._sync(outputs)
            self.folder.delete([self.journal_name])
            if self.folder.is_local:
                sync(self.folder.root)

    def check_room(self, nbytes: int) -> None:
        """Raises LevelFailed where so many bytes more do not fit on the disk. The place has to be claimed."""
        if not self.folder.is_local:
            return
        room = os.statvfs(self.folder.root)
        free = room.f_bavail * room.f_frsize
        if nbytes > free:
            raise LevelFailed(
                errno.ENOSPC,
                f"{self.url} would take {nbytes} bytes, and its disk has {free} left: free some, or convert "
                "to another place",
            )

    def _decide(self, mine: Journal, force: bool) -> tuple[Journal | None, Decision]:
        journal = self._journal()
        decision = decide(self._is_occupied(), journal, mine, force)
        if decision.action == "refuse":
            raise UsageError(f"{self.url}: {decision.reason}")
        return journal, decision

    def _begin(
        self, journal: Journal | None, decision: Decision, mine: Journal, outputs: Sequence[Output]
    ) -> frozenset[str]:
        self._remove_partials(outputs)
        names = self._names()
        if decision.action == "resume" and journal is not None and journal.boot == mine.boot:
            whole = {one.name: one.nbytes for one in outputs if one.derive is None and not one.last}
            return frozenset(name for name in names if name in whole and self.folder.size(name) == whole[name])
        if decision.action == "clear":
            self._write(replace(mine, clearing=True))
            self._clear(outputs, names, journal)
        self._write(mine)
        return frozenset()

    def _clear(self, outputs: Sequence[Output], names: Sequence[str], journal: Journal | None) -> None:
        """Remove what would pass for a part of the new checkpoint, what makes the old one count first."""
        ours = {output.name for output in outputs} | set(journal.outputs if journal else ())
        folders = tuple({name.split("/")[0] + "/" for name in ours if "/" in name})
        patterns = _COUNTS.get(self._to, ()) if self.into is None else ()
        counts = [name for pattern in patterns for name in names if "/" not in name and fnmatchcase(name, pattern)]
        last = [output.name for output in outputs if output.last]
        others = [name for name in names if name in ours or name.startswith(folders)]
        self.folder.delete(dict.fromkeys([*last, *counts, *others]))

    def _leave(self, outputs: Sequence[Output]) -> None:
        """After an error: no unfinished files, and no trace where nothing was finished."""
        with suppress(OSError):  # the first error is the one that matters
            self._remove_partials(outputs)
            if {output.name for output in outputs}.isdisjoint(self._names()):
                self.folder.delete([self.journal_name])
                self._remove_folders(outputs)

    def _remove_folders(self, outputs: Sequence[Output]) -> None:
        """Those that were made for outputs, and are empty; then those that the target itself needed."""
        folders = {name[:end] for name in (output.name for output in outputs) for end in _ends(name)}
        paths = [self.folder.path(folder) for folder in sorted(folders, key=len, reverse=True)]
        for path in [*paths, *reversed(self._made)] if self.folder.is_local else ():
            with suppress(OSError):
                os.rmdir(path)

    def _remove_partials(self, outputs: Sequence[Output]) -> None:
        """Those of our outputs. Nobody else writes them: the place is ours."""
        if not self.folder.is_local:
            return  # a remote store removes its own
        ours = tuple(f"{self.folder.path(output.name)}." for output in outputs)
        for path in {os.path.dirname(self.folder.path(output.name)) for output in outputs}:
            with suppress(FileNotFoundError, NotADirectoryError):
                for name in os.listdir(path):
                    if name.endswith(PARTIAL) and f"{path}/{name}".startswith(ours):
                        os.unlink(f"{path}/{name}")

    def _names(self) -> list[str]:
        """All files that are there now."""
        try:
            return Folder(self.folder.url).names
        except FileNotFoundError:
            return []

    def _is_occupied(self) -> bool:
        if self.into is not None:
            return self._exists(self.into)
        if not self.folder.is_local:
            return bool(self._names())
        path = self.folder.root
        if not os.path.lexists(path):
            return False
        if not os.path.isdir(path):
            raise UsageError(f"{self.url} is a file; {self._to} is written as a folder: give another place")
        return any(files for _, _, files in os.walk(path))

    def _exists(self, name: str) -> bool:
        try:
            self.folder.size(name)
        except FileNotFoundError:
            return False
        return True

    def _journal(self) -> Journal | None:
        try:
            text = self.folder.read_all(self.journal_name, _MOST_JOURNAL_BYTES)
        except FileNotFoundError:
            return None
        return parse_journal(text, self.folder.where(self.journal_name))

    def _write(self, journal: Journal) -> None:
        self.folder.write(self.journal_name, [journal.text()])

    def _make_folder(self) -> None:
        path = self.folder.root
        while self.folder.is_local and not os.path.isdir(path):
            self._made.insert(0, path)
            path = os.path.dirname(path)
        for path in self._made:
            try:
                os.mkdir(path)
            except FileExistsError:
                pass
            except OSError as error:
                raise LevelFailed(error.errno or errno.EIO, f"cannot make {path}: {error.strerror}") from error

    def _sync(self, outputs: Sequence[Output]) -> None:
        """Bring all files onto the medium. A remote store has them there already. Raises LevelFailed."""
        if not self.folder.is_local:
            return
        if len(outputs) > _FEW:  # all that the file system has, ours and others', in one go
            sync(self.folder.root, whole_file_system=True)
            return
        paths = [self.folder.path(output.name) for output in outputs]
        root = self.folder.root
        folders = {os.path.join(root, output.name[:end]) for output in outputs for end in (0, *_ends(output.name))}
        for path in (*paths, *folders, *map(os.path.dirname, self._made)):
            sync(path)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Only one process at a time converts into a folder. Ends with the process, however it ends."""
        if not self.folder.is_local:
            yield
            return
        fd = opened(self.folder.root)
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UsageError(f"another process is converting into {self.folder.url}: let it finish") from None
            except OSError:
                pass  # a file system without locks
            yield
        finally:
            os.close(fd)


def _ends(name: str) -> list[int]:
    """Where the folders in a name end."""
    return [at for at, sign in enumerate(name) if sign == "/"]
