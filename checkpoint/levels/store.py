"""The seam below every level: named bytes that are either wholly there or not there.

Five methods. `files.py` keeps them on a file system, `remote.py` behind any fsspec URL, `MemoryStore` (here) in a
dictionary, for tests and as the model of what a store promises; `tests/conformance` holds all to it. Stores know
nothing of images, records or steps.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from threading import Lock


class Store(ABC):
    """Named bytes under one root. Names are relative paths with `/`. All methods may be called from any thread.

    Every failure of the medium is raised as `LevelFailed` (an OSError) that names the store, the name and the cause.
    """

    url: str

    @property
    def is_near(self) -> bool:
        """Whether reading costs no network, so that processes of a machine may each read the same without harm."""
        return False

    @abstractmethod
    def write(self, name: str, chunks: Iterable[memoryview], *, exclusive: bool = False) -> None:
        """Store `chunks`, one after the other, under `name`; blocks until they are durable.

        Afterwards the name holds exactly these bytes, even if the machine loses power; on any error, or if the
        process dies on the way, the name holds what it held before. An exception raised by the iterator abandons the
        write and passes through. `exclusive`: raise FileExistsError if the name is there already, decided atomically.
        """

    @abstractmethod
    def read(self, name: str, offset: int, into: memoryview) -> None:
        """Fill `into` with the bytes from `offset`. Raises FileNotFoundError, or DamagedImage if too few."""

    @abstractmethod
    def size(self, name: str) -> int:
        """The number of bytes under `name`. Raises FileNotFoundError."""

    @abstractmethod
    def list(self, folder: str = "") -> list[str]:
        """All names below `folder`, recursively, sorted; empty where there is none. Unfinished writes do not show."""

    @abstractmethod
    def delete(self, names: Iterable[str]) -> None:
        """Remove names; absent ones are ignored, folders that become empty go too. Safe to repeat."""


class MemoryStore(Store):
    """A store in a dictionary."""

    def __init__(self, url: str = "memory://") -> None:
        self.url = url
        self._lock = Lock()
        self._held: dict[str, bytes] = {}

    def write(self, name: str, chunks: Iterable[memoryview], *, exclusive: bool = False) -> None:
        data = b"".join(chunks)
        with self._lock:
            if exclusive and name in self._held:
                raise FileExistsError(name)
            self._held[name] = data

    def read(self, name: str, offset: int, into: memoryview) -> None:
        from resilient.errors import DamagedImage

        with self._lock:
            if name not in self._held:
                raise FileNotFoundError(name)
            data = self._held[name][offset : offset + len(into)]
        if len(data) < len(into):
            raise DamagedImage(f"{self.url}{name} ends {len(into) - len(data)} bytes early")
        into[:] = data

    def size(self, name: str) -> int:
        with self._lock:
            if name not in self._held:
                raise FileNotFoundError(name)
            return len(self._held[name])

    def list(self, folder: str = "") -> list[str]:
        prefix = f"{folder.rstrip('/')}/" if folder else ""
        with self._lock:
            return sorted(name for name in self._held if name.startswith(prefix))

    def delete(self, names: Iterable[str]) -> None:
        with self._lock:
            for name in names:
                self._held.pop(name, None)
