"""Digests images block by block while trainers fill them: one thread for each rank, so that ranks go on in parallel.

By the time an image is sealed only its last blocks are left to do. The thread knows nothing of slots: an image in the
making is named by a ticket that the caller makes up, and an answer to an old ticket is the caller's to ignore.
"""

import threading
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

from resilient.checkpoint.digest import BLOCK_BYTES, block_count, block_range, digest


@dataclass(slots=True, kw_only=True)
class _Making:
    view: memoryview
    upto: int = 0
    image_bytes: int | None = None
    blocks: list[str] = field(default_factory=list)

    def next_block(self) -> tuple[int, int] | None:
        """[start, stop) of the next block that is whole; None while the trainer has to go on first.

        An empty block stands for the end of an image that was digested to the end before it was sealed.
        """
        start = len(self.blocks) * BLOCK_BYTES
        if self.image_bytes is None:
            return (start, start + BLOCK_BYTES) if start + BLOCK_BYTES <= self.upto else None
        if self.done:
            return (0, 0)
        return block_range(len(self.blocks), self.image_bytes)

    @property
    def done(self) -> bool:
        return self.image_bytes is not None and len(self.blocks) >= block_count(self.image_bytes)


class Digester:
    """One rank's digesting thread. All methods may be called from any thread and return at once."""

    def __init__(self, name: str, on_digested: Callable[[Hashable, tuple[str, ...]], None]) -> None:
        """`on_digested(ticket, digests of all blocks)` is called on the digesting thread."""
        self._name = name
        self._on_digested = on_digested
        self._changed = threading.Condition()
        self._images: dict[Hashable, _Making] = {}
        self._ended = False

    def start(self) -> None:
        threading.Thread(target=self._run, name=self._name, daemon=True).start()

    def stop(self) -> None:
        """End the thread after the block it is at. Does not wait."""
        with self._changed:
            self._ended = True
            self._images.clear()
            self._changed.notify()

    def begin(self, ticket: Hashable, view: memoryview) -> None:
        with self._changed:
            self._images[ticket] = _Making(view=view)

    def filled(self, ticket: Hashable, upto: int) -> None:
        """All bytes before `upto` are final."""
        with self._changed:
            if image := self._images.get(ticket):
                image.upto = max(image.upto, upto)
                self._changed.notify()

    def seal(self, ticket: Hashable, image_bytes: int) -> None:
        """All bytes are final and the image ends here."""
        with self._changed:
            if image := self._images.get(ticket):
                image.image_bytes = image_bytes
                del image.blocks[image_bytes // BLOCK_BYTES :]  # what was filled beyond the end does not count
                self._changed.notify()

    def drop(self, ticket: Hashable) -> None:
        with self._changed:
            self._images.pop(ticket, None)

    def _run(self) -> None:
        while (work := self._next()) is not None:
            ticket, image, (start, stop) = work
            block = digest(image.view[start:stop])
            with self._changed:
                if start < stop and (image.image_bytes is None or stop <= image.image_bytes):
                    image.blocks.append(block)
                finished = image.done and self._images.pop(ticket, None) is image
            if finished:
                self._on_digested(ticket, tuple(image.blocks))
            del work, image  # else the thread would keep the memory of its last image while it waits

    def _next(self) -> tuple[Hashable, _Making, tuple[int, int]] | None:
        """The next block to digest, of a sealed image first; waits for one. None when the thread is to end."""
        with self._changed:
            while not self._ended:
                order = sorted(self._images.items(), key=lambda item: item[1].image_bytes is None)
                for ticket, image in order:
                    if (block := image.next_block()) is not None:
                        return ticket, image, block
                self._changed.wait()
        return None
