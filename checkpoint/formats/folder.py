"""Where a checkpoint of any format lies: a folder, or one file, on a local path or behind an fsspec URL.

Unlike a `Store` (`levels/store.py`) it sees every name, since others put dots before theirs. Writing is for
conversions: each file gets its name in one step, when it is whole and, locally, on the medium.
"""

import errno
import os
import stat
import weakref
from collections.abc import Iterable
from contextlib import suppress
from functools import cached_property
from typing import Any

from resilient.checkpoint.levels.open import not_opened
from resilient.checkpoint.levels.remote import RemoteStore
from resilient.errors import DamagedImage, LevelFailed

PARTIAL = ".partial"  # the end of the name of a file that is being written
JOURNAL = ".resilient-conversion.json"  # in a folder that a conversion has not filled yet (`converting/target.py`)
_MOST_OPEN = 256  # files that are kept open; a process may often have no more than 1,024, and some formats have more
_GAP_BYTES = {"local": 0, "remote": 1 << 20}


class Folder:
    """See the module. `names` are relative, with `/`. A URL of one file is a folder with only that file in it.

    The first files that are opened are kept open until `close`. Reading may be done from several threads.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.is_local = "://" not in url or url.startswith("file://")
        self._path = os.path.abspath(url.removeprefix("file://")) if self.is_local else url.rstrip("/")
        self._files: dict[str, int] = {}
        weakref.finalize(self, _close_all, self._files)  # for whoever forgets to
        self.gap_bytes = _GAP_BYTES["local" if self.is_local else "remote"]
        """Ranges that lie no further apart are cheaper to read as one."""

    @cached_property
    def only_file(self) -> str | None:
        """The name of the file, where the URL is that of one file."""
        return self._path.rsplit("/", 1)[-1] if self._is_file(self._path) else None

    @cached_property
    def names(self) -> list[str]:
        """All files below, sorted. Raises FileNotFoundError where there is nothing."""
        if self.only_file is not None:
            return [self.only_file]
        found = self._list_local() if self.is_local else self._list_remote()
        return sorted(name for name in found if not name.endswith(PARTIAL))

    @property
    def root(self) -> str:
        """The path, or the URL, below which the names are."""
        return self._path

    def path(self, name: str) -> str:
        """The whole path, or URL, of a file. Raises DamagedImage for a name that leads out of the folder."""
        return self._full(name)

    def where(self, name: str) -> str:
        """For messages."""
        return self.url if self.only_file == name else f"{self.url.rstrip('/')}/{name}"

    def has(self, name: str) -> bool:
        return name in self.names

    def size(self, name: str) -> int:
        """Raises FileNotFoundError, LevelFailed."""
        try:
            if self.is_local:
                return os.stat(self._full(name)).st_size
            return int(self._fs.info(self._full(name))["size"])
        except FileNotFoundError:
            raise FileNotFoundError(errno.ENOENT, "not there", self.where(name)) from None
        except OSError as error:
            raise LevelFailed(error.errno or errno.EIO, f"cannot look at {self.where(name)}: {error}") from error

    def read(self, name: str, offset: int, into: memoryview) -> None:
        """Fill `into`. Raises FileNotFoundError, LevelFailed, and DamagedImage where the file ends before."""
        into = memoryview(into).cast("B")
        done = 0
        try:
            if offset < 0:
                raise DamagedImage(f"{self.where(name)} was asked for bytes at {offset}")
            while done < into.nbytes:
                count = self._read_some(name, offset + done, into[done:])
                if not count:
                    short = into.nbytes - done
                    raise DamagedImage(f"{self.where(name)} ends {short} bytes early (at {offset + done})")
                done += count
        except FileNotFoundError:
            raise FileNotFoundError(errno.ENOENT, "not there", self.where(name)) from None
        except OSError as error:
            raise LevelFailed(error.errno or errno.EIO, f"cannot read {self.where(name)}: {error}") from error

    def read_all(self, name: str, most: int) -> bytes:
        """A whole small file. Raises DamagedImage for one of more than `most` bytes, which no writer makes so."""
        size = self.size(name)
        if size > most:
            raise DamagedImage(f"{self.where(name)} has {size} bytes; at most {most} are taken for what it should be")
        data = bytearray(size)
        self.read(name, 0, memoryview(data))
        return bytes(data)

    def write(self, name: str, chunks: Iterable[memoryview | bytes]) -> None:
        """Store chunks under a name, replacing what was there, in one step. Raises LevelFailed."""
        try:
            if self.is_local:
                self._write_local(name, chunks)
            else:
                parent, _, last = self._full(name).rpartition("/")
                _AnyNames(parent).write(last, map(memoryview, chunks))
        except LevelFailed:
            raise
        except OSError as error:
            raise LevelFailed(error.errno or errno.EIO, f"cannot write {self.where(name)}: {error}") from error
        self.__dict__.pop("names", None)

    def delete(self, names: Iterable[str]) -> None:
        """Remove files; absent ones are ignored."""
        for name in names:
            with suppress(FileNotFoundError):
                os.unlink(self._full(name)) if self.is_local else self._fs.rm_file(self._full(name))
        self.__dict__.pop("names", None)

    def close(self) -> None:
        """Close all files. Safe to repeat."""
        _close_all(self._files)

    @cached_property
    def _fs(self) -> Any:
        import fsspec

        try:
            return fsspec.core.url_to_fs(self.url, use_listings_cache=False)[0]  # other processes write there, too
        except (ImportError, ValueError) as error:
            raise not_opened(self.url, error) from error

    def _full(self, name: str) -> str:
        if self.only_file == name:
            return self._path
        if not name or name.startswith("/") or "\0" in name or ".." in name.split("/"):
            raise DamagedImage(f"{name!r} is no name of a file within {self.url}")
        return f"{self._path}/{name}"

    def _is_file(self, path: str) -> bool:
        if self.is_local:
            with suppress(OSError):
                return stat.S_ISREG(os.stat(path).st_mode)
            return False
        return bool(self._fs.isfile(path))

    def _list_local(self) -> Iterable[str]:
        if not os.path.isdir(self._path):
            raise FileNotFoundError(errno.ENOENT, "nothing is there", self.url)
        for folder, _, files in os.walk(self._path):
            for file in files:
                yield os.path.relpath(os.path.join(folder, file), self._path)

    def _list_remote(self) -> Iterable[str]:
        root = self._fs._strip_protocol(self.url).rstrip("/")
        below = [name.removeprefix(root).lstrip("/") for name in self._fs.find(root) if not name.endswith("/")]
        found = [name for name in below if name]  # without marks that stand for folders
        if not found:
            raise FileNotFoundError(errno.ENOENT, "nothing is there", self.url)
        return found

    def _read_some(self, name: str, offset: int, into: memoryview) -> int:
        if self.is_local:
            fd = self._files.get(name)
            if fd is None:
                mine = os.open(self._full(name), os.O_RDONLY | os.O_CLOEXEC)
                if len(self._files) >= _MOST_OPEN:
                    try:
                        return os.preadv(mine, [into], offset)
                    finally:
                        os.close(mine)
                fd = self._files.setdefault(name, mine)
                if fd != mine:  # another thread was quicker
                    os.close(mine)
            return os.preadv(fd, [into], offset)
        data = self._fs.cat_file(self._full(name), start=offset, end=offset + into.nbytes)
        into[: len(data)] = data
        return len(data)

    def _write_local(self, name: str, chunks: Iterable[memoryview | bytes]) -> None:
        path = self._full(name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        partial = f"{path}{PARTIAL}"
        try:
            with open(partial, "wb", buffering=0) as out:
                for chunk in chunks:
                    left = memoryview(chunk).cast("B")
                    while left.nbytes:
                        left = left[out.write(left) :]
                os.fdatasync(out.fileno())
            os.replace(partial, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(partial)
            raise
        fd = os.open(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


class _AnyNames(RemoteStore):
    """A store for names of others, which may begin with a dot."""

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"


def _close_all(files: dict[str, int]) -> None:
    while files:
        os.close(files.popitem()[1])
