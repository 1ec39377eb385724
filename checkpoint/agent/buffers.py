"""The agent's memory as a trainer maps it: slots to fill, and sealed images to read.

Mappings only; who may use which slot when is decided by the agent and told to `client.py`.
"""

import contextlib
import mmap
import os
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Self

from resilient.checkpoint.agent.memory import address_of_view, advise_huge_pages
from resilient.checkpoint.record import Record
from resilient.errors import LevelFailed


class Slot:
    """A buffer in the agent's memory. `view` is writable and page-aligned, `address` that of its first byte."""

    def __init__(self, slot_id: int, capacity: int, fd: int) -> None:
        """Takes the descriptor over."""
        try:
            self._mapping = mmap.mmap(fd, capacity)
        finally:
            os.close(fd)
        advise_huge_pages(self._mapping)
        self.id = slot_id
        self.capacity = capacity
        self.view = memoryview(self._mapping)
        self.address = address_of_view(self.view)

    def close(self) -> None:
        """Unmap. While somebody else holds a view of it (an array, say), that keeps it mapped. Safe to repeat."""
        with contextlib.suppress(BufferError):
            self.view.release()
            self._mapping.close()


class MappedImage:
    """A sealed image, readable until `close` or the end of its `with` block. Verify what you read (`record.blocks`)."""

    def __init__(self, record: Record, slot_id: int, fd: int, on_closed: Callable[[], None]) -> None:
        """Takes the descriptor over. `on_closed` is called once, when the memory is not read any more."""
        self.record = record
        self.slot_id = slot_id
        self._on_closed = on_closed
        self._closed = False
        try:
            self._mapping = mmap.mmap(fd, record.image_bytes, prot=mmap.PROT_READ)
        except BaseException:
            os.close(fd)
            raise
        self._fd = fd
        self.view = memoryview(self._mapping)

    def read(self, offset: int, parts: Sequence[Any]) -> None:
        """Copy bytes of the image from `offset` on into buffers, in order. Any thread.

        Quicker than to touch the pages of a new mapping.
        """
        if os.preadv(self._fd, parts, offset) != sum(memoryview(part).nbytes for part in parts):
            raise LevelFailed(f"{self.record.image_name} in memory is shorter than its record says")

    def close(self) -> None:
        """Unmap and let the agent use the memory again. Safe to repeat; release views that you made first."""
        if self._closed:
            return
        self._closed = True
        os.close(self._fd)
        with contextlib.suppress(BufferError):  # a view of the caller's keeps it mapped, and it is his to mind
            self.view.release()
            self._mapping.close()
        self._on_closed()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
