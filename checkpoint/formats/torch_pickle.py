"""Pickles of others, read without running any of their code: a closed list of names, and what each may become.

Python's unpickler does the work, but what it gets for a name is ours: a guarded function, a stand-in, or a refusal that
names what the pickle wanted. Tensors come out as `StoredTensor`: where their bytes are, not the bytes. The opcodes are
looked through first (`pickle_guard.py`), since some make the unpickler take memory that the file does not pay for.

Two traps that shaped this: BUILD sets attributes of whatever it is given, so nothing that it can reach may have any to
set that matter; and numpy's own dtypes take flags from a pickle that make numpy treat data as pointers, so they are
built here from the names of plain types. Not here: zip archives (`torch_zip.py`).
"""

import io
import pickle
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from resilient.checkpoint.catalog.catalog import ITEMSIZES
from resilient.checkpoint.formats.pickle_guard import check_opcodes
from resilient.checkpoint.formats.pickle_names import Storage, StorageType, allowed, finished
from resilient.checkpoint.formats.stored import Opaque, StoredTensor
from resilient.errors import DamagedImage, NotACheckpoint

__all__ = ["Opaque", "Refused", "StoredTensor", "load_pickle"]


class Refused(NotACheckpoint):
    """The pickle asks for something that is not on the list; the message says what, and how to read it all the same."""


@dataclass(frozen=True, slots=True)
class StorageBytes:
    """Where the bytes of a storage are, by its key in the archive."""

    offset: int
    nbytes: int


def load_pickle(
    data: bytes,
    where: str,
    *,
    storages: Callable[[str], StorageBytes] | None = None,
    opaque: Iterable[str] = frozenset(),
    extra: Mapping[str, Any] | None = None,
    trust: bool = False,
) -> Any:
    """The tree that was pickled. `where` names the file in errors.

    `storages` finds the bytes of a torch storage; without it, tensors are refused. Classes called in `opaque`
    ("argparse.Namespace") come out as `Opaque`. `extra`: further names and what they become. `trust`: import whatever
    else is asked for, which runs the writer's code.
    Raises `Refused` for names that are not on the list, DamagedImage for what is no whole pickle.
    """
    check_opcodes(data, where)
    reader = _Reader(data, where, storages, frozenset(opaque), extra or {}, trust)
    try:
        return finished(reader.load())
    except (Refused, DamagedImage):
        raise
    except RecursionError as error:
        raise DamagedImage(f"{where}: its pickle is nested too deep") from error
    except Exception as error:  # whatever a malformed pickle makes the unpickler, or a constructor, raise
        raise DamagedImage(f"{where}: its pickle cannot be read ({type(error).__name__}: {error})") from error


class _Reader(pickle.Unpickler):
    def __init__(
        self,
        data: bytes,
        where: str,
        storages: Callable[[str], StorageBytes] | None,
        opaque: frozenset[str],
        extra: Mapping[str, Any],
        trust: bool,
    ) -> None:
        super().__init__(io.BytesIO(data), encoding="utf-8")
        self.where = where
        self.storages = storages
        self.opaque = opaque
        self.extra = extra
        self.trust = trust
        self.kinds: dict[str, type[Opaque]] = {}

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if full in self.opaque:
            return self._opaque(full)
        if full in self.extra:
            return self.extra[full]
        found = allowed(full)
        if found is not None:
            return found
        if self.trust:
            return super().find_class(module, name)
        raise Refused(
            f"{self.where}: its pickle asks for {full}, which is not among what is read without running foreign code; "
            "if you trust whoever wrote the file, read it with --trust-pickle (trust_pickle=True)"
        )

    def persistent_load(self, pid: Any) -> Storage:
        if type(pid) is not tuple or len(pid) != 5 or pid[0] != "storage" or self.storages is None:
            raise DamagedImage(f"{self.where}: its pickle refers to something outside of it that is no tensor")
        _, kind, key, _, numel = pid
        if type(kind) is not StorageType or type(key) is not str or type(numel) is not int or numel < 0:
            raise DamagedImage(f"{self.where}: its pickle names a malformed storage")
        bytes_of = self.storages(key)
        need = numel * ITEMSIZES[kind.dtype]
        if need > bytes_of.nbytes:
            raise DamagedImage(
                f"{self.where}: the storage {key!r} should have {need} bytes; the archive has {bytes_of.nbytes}"
            )
        return Storage(key=key, dtype=kind.dtype, offset=bytes_of.offset, nbytes=need)

    def _opaque(self, full: str) -> type[Opaque]:
        kind = self.kinds.get(full)
        if kind is None:
            kind = self.kinds[full] = type("Opaque", (Opaque,), {"name": full, "__slots__": ()})
        return kind
