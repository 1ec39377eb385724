"""A store in a folder of a file system: local disk, tmpfs, NFS, a parallel file system.

A write goes to a hidden temporary file beside its target, is brought onto the medium (fdatasync), gets its name with
one rename, and then the folder is brought onto the medium too (fsync): after a kill or a power cut the name holds the
old bytes or the new ones. The bytes themselves go through `direct.py`. Temporary files of processes that died are
removed by later writes, deletes and `sweep`. Not here: what the names mean, and objects in a bucket (`remote.py`).
"""

import ctypes
import errno
import itertools
import os
import re
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from threading import Lock

from resilient.checkpoint.levels.direct import DirectWriter, read_into
from resilient.checkpoint.levels.process import is_dead, this_process
from resilient.checkpoint.levels.store import Store
from resilient.errors import DamagedImage, LevelFailed

_TEMPORARY = re.compile(r"^\..*\.([0-9a-f]{8})-(\d+)-(\d+)-(\d+)\.part$")
_FOREIGN_STALE_S = 24 * 3600  # after a day without a write, a temporary file of another host is taken for left over
_OPEN_ATTEMPTS = 200  # each costs some microseconds, and another process in a tight loop wins many of them
_ADVICE = {
    errno.ENOSPC: "the disk is full: free space, or keep fewer snapshots",
    errno.EDQUOT: "the quota is used up: free space, or keep fewer snapshots",
    errno.EROFS: "it is mounted read-only: look for disk errors in the kernel's log, then mount it read-write",
    errno.EACCES: "check its owner and mode",
    errno.EPERM: "check its owner, mode and attributes",
    errno.EIO: "the disk reports an error: look into the kernel's log and use another disk",
    errno.ENAMETOOLONG: "use a shorter folder name",
}
_NETWORK = {"nfs", "nfs4", "cifs", "smb3", "lustre", "gpfs", "beegfs", "ceph", "glusterfs", "9p", "virtiofs", "afs"}
_counter = itertools.count()
_removing: defaultdict[str, Lock] = defaultdict(Lock)  # by root: threads must not remove what one has just made


class FileStore(Store):
    """Names as files below `root`, which the first write makes. Any thread and several processes may use one root."""

    def __init__(self, root: str) -> None:
        self.root = os.path.abspath(root)
        self.url = self.root
        self._lock = Lock()
        self._removing = _removing[self.root]
        self._known: set[str] = set()  # folders whose own entry is on the medium

    @cached_property
    def is_near(self) -> bool:
        return _kind_of_file_system(self.root) not in _NETWORK

    def write(self, name: str, chunks: Iterable[memoryview], *, exclusive: bool = False) -> None:
        """See Store. Chunks should be page-aligned views of 1 MiB and more; they must not change until this returns."""
        path = self._path(name)
        if exclusive and os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, "there already", path)
        temporary = f"{os.path.dirname(path)}/{_temporary_name(os.path.basename(path))}"
        out = DirectWriter(temporary)
        try:
            with _named("write", path):
                self._open(out)
            for chunk in chunks:  # outside of _named: the iterator's own errors pass through as they are
                with _named("write", path):
                    out.append(chunk)
            with _named("write", path):
                out.finish()
                out.close()
            _publish(temporary, path, exclusive)
            with _named("write", path):
                _sync_folder(os.path.dirname(path))
        finally:
            # After success nothing is left to close or remove. An error here would hide the one that matters.
            with suppress(OSError):
                out.close()
            with suppress(OSError):
                os.unlink(temporary)

    def read(self, name: str, offset: int, into: memoryview) -> None:
        """See Store. Aligned reads of 256 KiB and more go past the page cache; use several threads for speed."""
        path = self._path(name)
        with _named("read", path, absent=True):
            count = read_into(path, offset, into)
        missing = memoryview(into).nbytes - count
        if missing:
            raise DamagedImage(f"{path} ends {missing} bytes early (at offset {offset}): use another snapshot or level")

    def size(self, name: str) -> int:
        path = self._path(name)
        with _named("look at", path, absent=True):
            if os.path.isdir(path):
                raise FileNotFoundError(errno.ENOENT, "a folder, not a file", path)
            return os.stat(path).st_size

    def list(self, folder: str = "") -> list[str]:
        folder = folder.strip("/")
        with _named("list", f"{self.root}/{folder}"):
            return sorted(_names(self._path(folder) if folder else self.root, f"{folder}/" if folder else ""))

    def delete(self, names: Iterable[str]) -> None:
        """See Store. Names go in the order given, which a journalling file system also keeps over a power cut."""
        folders: dict[str, None] = {}
        for path in map(self._path, names):
            with _named("delete", path), suppress(FileNotFoundError, NotADirectoryError):
                os.unlink(path)
            folders[os.path.dirname(path)] = None
        for folder in folders:
            with _named("delete from", folder), suppress(FileNotFoundError, NotADirectoryError):
                _sweep_folder(folder)
                _sync_folder(folder)
            self._remove_empty(folder)

    def sweep(self) -> int:
        """Remove the temporary files that dead processes left anywhere below the root; returns how many. Blocks."""
        removed = 0
        with _named("sweep", self.root):
            for folder, _, _ in os.walk(self.root):
                with suppress(FileNotFoundError):
                    removed += _sweep_folder(folder)
        return removed

    def _path(self, name: str) -> str:
        parts = name.split("/")
        if any(not part or part.startswith(".") or "\0" in part for part in parts):
            raise ValueError(f"{name!r} is no name for a store: relative, no hidden or empty parts")
        return f"{self.root}/{name}"

    def _open(self, out: DirectWriter) -> None:
        """Create the temporary file, and the folders on the way to it, their entries on the medium before this returns.

        Nothing slow may come between making a folder and making the file that keeps it: other processes remove empty
        folders. So syncing and sweeping come after.
        """
        folder = os.path.dirname(out.path)
        for _ in range(_OPEN_ATTEMPTS):
            if not os.path.isdir(folder):
                self._forget(folder)
                self._make_root()
            try:
                with self._removing:
                    os.makedirs(folder, exist_ok=True)
                    out.open()
                return self._settle(folder)
            except FileNotFoundError:  # removed between the two, empty as it still was
                self._forget(folder)
        raise FileNotFoundError(errno.ENOENT, "the folder is removed again and again", folder)

    def _make_root(self) -> None:
        if self.root not in self._known:
            _make_above(self.root)
            self._settle(self.root)

    def _settle(self, folder: str) -> None:
        """Bring the entries of a folder and of those above it, up to the root, onto the medium; sweep what is new here.

        A folder that somebody else has made is synced as well: its maker may not have come to that yet.
        """
        while folder not in self._known:
            if folder != self.root:  # `_make_above` syncs the root's own entry
                _sync_folder(os.path.dirname(folder))
            _sweep_folder(folder)
            with self._lock:
                self._known.add(folder)
            folder = os.path.dirname(folder)

    def _forget(self, folder: str) -> None:
        with self._lock:
            self._known = {
                known for known in self._known if known != folder and not f"{folder}/".startswith(f"{known}/")
            }

    def _remove_empty(self, folder: str) -> None:
        while folder != self.root:
            self._forget(folder)
            try:
                with self._removing:
                    os.rmdir(folder)
            except FileNotFoundError:
                pass
            except OSError:  # not empty, or in use: both are in order
                return
            folder = os.path.dirname(folder)


def _kind_of_file_system(folder: str) -> str:
    """Its name in the kernel's list of mounts: that of the longest mount point that leads to the folder."""
    found, longest = "", -1
    with suppress(OSError), open("/proc/self/mounts", encoding="utf-8", errors="surrogateescape") as mounts:
        for line in mounts:
            point, kind = line.split(" ")[1:3]
            point = re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), point).rstrip("/")
            if f"{folder}/".startswith(f"{point}/") and len(point) >= longest:
                found, longest = kind, len(point)
    return found


def _make_above(folder: str) -> None:
    """The root and the folders above it: only those that are missing are made and synced; the others are not ours."""
    if os.path.isdir(folder):
        return
    _make_above(os.path.dirname(folder))
    with suppress(FileExistsError):
        os.mkdir(folder)
    _sync_folder(os.path.dirname(folder))


def _temporary_name(name: str) -> str:
    me = this_process()
    return f".{name[:120]}.{me.host_tag}-{me.pid}-{me.started}-{next(_counter)}.part"


def _publish(temporary: str, path: str, exclusive: bool) -> None:
    """Give the finished file its name, in one step."""
    with _named("write", path, exists=exclusive):
        if not exclusive:
            os.rename(temporary, path)
            return
        try:
            os.link(temporary, path)
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
                raise
            _rename_if_free(temporary, path)  # a file system without hard links


def _rename_if_free(source: str, target: str) -> None:
    """renameat2(2) with RENAME_NOREPLACE; Python has no call for it."""
    libc = ctypes.CDLL(None, use_errno=True)
    at_cwd, no_replace = -100, 1
    if libc.renameat2(at_cwd, os.fsencode(source), at_cwd, os.fsencode(target), no_replace):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), target)


def _sync_folder(folder: str) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that has no fsync for folders has nothing to bring home
            raise
    finally:
        os.close(fd)


def _names(folder: str, prefix: str) -> Iterator[str]:
    try:
        with os.scandir(folder) as found:
            entries = list(found)
    except (FileNotFoundError, NotADirectoryError):
        return
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if entry.is_dir(follow_symlinks=False):
            yield from _names(entry.path, f"{prefix}{entry.name}/")
        elif entry.is_file():
            yield prefix + entry.name


def _sweep_folder(folder: str) -> int:
    removed = 0
    with os.scandir(folder) as found:
        entries = [entry for entry in found if entry.name.endswith(".part")]
    for entry in entries:
        with suppress(FileNotFoundError):
            if _left_over(entry):
                os.unlink(entry.path)
                removed += 1
    return removed


def _left_over(entry: os.DirEntry[str]) -> bool:
    match = _TEMPORARY.match(entry.name)
    if match is None:
        return False
    if match[1] == this_process().host_tag:
        return is_dead(int(match[2]), int(match[3]))
    return time.time() - entry.stat().st_mtime > _FOREIGN_STALE_S


@contextmanager
def _named(action: str, path: str, *, absent: bool = False, exists: bool = False) -> Iterator[None]:
    """Turn an OSError into LevelFailed. `absent` and `exists` let the two errors through that are answers."""
    try:
        yield
    except LevelFailed:
        raise
    except OSError as error:
        if absent and error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EISDIR):
            raise FileNotFoundError(errno.ENOENT, "not there", path) from error
        if exists and error.errno == errno.EEXIST:
            raise FileExistsError(errno.EEXIST, "there already", path) from error
        number = error.errno or errno.EIO
        advice = _ADVICE.get(number, "it is tried again at the next save")
        raise LevelFailed(number, f"could not {action} {path}: {os.strerror(number)}; {advice}") from error
