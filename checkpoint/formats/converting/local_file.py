"""A file of a local target while it is written: several processes fill it, and it has its own name only when whole."""

import ctypes
import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

from resilient.checkpoint.formats.folder import PARTIAL, Folder
from resilient.errors import LevelFailed

_LARGE_BYTES = 16 << 20


class LocalFile:
    """A file of a local target that several processes fill; it has its own name only when it is whole."""

    def __init__(self, folder: Folder, name: str, nbytes: int, token: str) -> None:
        """Makes it, with holes, where no process has yet. `token`: of the conversion. Raises LevelFailed."""
        self.name = name
        self._nbytes = nbytes
        self._path = folder.path(name)
        self._partial = f"{self._path}.{token}{PARTIAL}"
        with self._named("make"):
            os.makedirs(os.path.dirname(self._path), exist_ok=True)
            self._fd = os.open(self._partial, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
            os.ftruncate(self._fd, nbytes)

    def write(self, offset: int, data: memoryview) -> int:
        """Gives how many bytes `data` has. Raises LevelFailed."""
        whole = data.nbytes
        with self._named("write"):
            while data.nbytes:
                count = os.pwrite(self._fd, data, offset)
                data, offset = data[count:], offset + count
        return whole

    def publish(self) -> None:
        """Give it its name, replacing what had it. Raises LevelFailed.

        A large file is on the medium then: the others need not wait for it in the end. For small ones each by itself
        would take longer than all together.
        """
        with self._named("write"):
            if self._nbytes >= _LARGE_BYTES:
                os.fdatasync(self._fd)
            os.replace(self._partial, self._path)

    def close(self) -> None:
        """Safe to repeat."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)

    @contextmanager
    def _named(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise LevelFailed(error.errno or errno.EIO, f"cannot {what} {self._path}: {error.strerror}") from error


def sync(path: str, *, whole_file_system: bool = False) -> None:
    """Bring a file, a folder's entries, or all of their file system, onto the medium. Raises LevelFailed."""
    fd = opened(path)
    try:
        if whole_file_system:
            if ctypes.CDLL(None, use_errno=True).syncfs(fd):
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        else:
            os.fsync(fd)
    except OSError as error:
        raise LevelFailed(error.errno or errno.EIO, f"cannot bring {path} onto its medium: {error.strerror}") from error
    finally:
        os.close(fd)


def opened(path: str) -> int:
    """A descriptor of a file or a folder. Raises LevelFailed."""
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise LevelFailed(error.errno or errno.EIO, f"cannot open {path}: {error.strerror}") from error
