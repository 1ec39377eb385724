"""The sealed images of this node, for whoever reads them on threads of its own: the peers, and the making of parity.

The loop puts images here when they are sealed and withdraws them before their memory is used again; withdrawing fails
as long as one is lent. Everything here may be called from any thread.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from resilient.checkpoint.record import Record
from resilient.errors import LevelFailed


@dataclass(slots=True, eq=False)
class _Shelved:
    record: Record
    view: memoryview
    readers: int = 0


class Shelf:
    """Images by the slot that they are in. `on_returned` is called when the last reader of one is done with it."""

    def __init__(self, on_returned: Callable[[], None]) -> None:
        self._lock = threading.Lock()
        self._images: dict[int, _Shelved] = {}
        self._on_returned = on_returned

    def put(self, slot_id: int, record: Record, view: memoryview) -> None:
        with self._lock:
            self._images[slot_id] = _Shelved(record, view)

    def withdraw(self, slot_id: int) -> bool:
        """Lend it no more; False while somebody reads it. True also for what is not here."""
        with self._lock:
            image = self._images.get(slot_id)
            if image is not None and image.readers:
                return False
            self._images.pop(slot_id, None)
            return True

    def readers(self, slot_id: int) -> int:
        """How many read the image at this moment."""
        with self._lock:
            image = self._images.get(slot_id)
            return image.readers if image is not None else 0

    def records(self) -> list[Record]:
        with self._lock:
            return [image.record for image in self._images.values()]

    @contextmanager
    def lend(self, life: str, step: int, rank: int) -> Iterator[memoryview]:
        """The image, writable, as long as the context lasts. Raises LevelFailed where it is not here."""
        with self._lock:
            wanted = (life, step, rank)
            found = [one for one in self._images.values() if _identity(one.record) == wanted]
            if not found:
                raise LevelFailed(f"the image of rank {rank} at step {step} is not in this node's memory")
            image = found[0]
            image.readers += 1
        try:
            yield image.view
        finally:
            with self._lock:
                image.readers -= 1
                idle = not image.readers
            if idle:
                self._on_returned()

    def clear(self) -> None:
        with self._lock:
            self._images.clear()


def _identity(record: Record) -> tuple[str, int, int]:
    return record.life, record.step, record.rank
