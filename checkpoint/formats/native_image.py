"""The bytes of one image on a store, verified before anybody sees them, in ranges of any size.

A range is verified in units of 64 KiB where fine digests were kept, else, and where the image is compressed, of 4 MiB.
Long ranges are read straight to where they are wanted. What had to be read of a short one is kept until the next is
asked for, which mostly lies beside it.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from resilient.checkpoint.digest import BLOCK_BYTES, FINE_BYTES, block_range, damaged_blocks, fine_damage
from resilient.checkpoint.formats.source import Finding, Progress
from resilient.checkpoint.image import data_start_of
from resilient.checkpoint.levels.image_io import read_fine_digests, read_image_range
from resilient.checkpoint.levels.store import Store
from resilient.checkpoint.names import digests_name
from resilient.checkpoint.record import Record
from resilient.checkpoint.restore import source
from resilient.checkpoint.restore.images import Image
from resilient.checkpoint.restore.source import InStore, Source, listed
from resilient.errors import DamagedImage, LevelFailed

MALFORMED = (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError, RecursionError)
"""What reading a structure raises that has other members than it should; whoever wrote it made its digests fit."""

Span = tuple[int, int]
"""[start, stop) of an image."""

_MOST_KEPT_BYTES = BLOCK_BYTES
_MOST_FINE_BYTES = 8 << 20  # those of 32 GiB of images


@dataclass(slots=True)
class Kept:
    """The units that were read last because a part of them was wanted, at most three of 4 MiB, and fine digests.

    All images of a source share one, so that memory is bounded.
    """

    image: str = ""
    begin: int = 0
    data: memoryview = field(default_factory=lambda: memoryview(b""))
    fine: dict[str, bytes] = field(default_factory=dict)

    def keep_fine(self, image: str, digests: bytes) -> None:
        """What was kept first goes first."""
        self.fine[image] = digests
        while len(self.fine) > 1 and sum(map(len, self.fine.values())) > _MOST_FINE_BYTES:
            del self.fine[next(iter(self.fine))]


class VerifiedImage(Source):
    """One image. One thread at a time."""

    def __init__(self, store: Store, record: Record, kept: Kept | None = None) -> None:
        super().__init__(record, store.url)
        self._store = store
        self._kept = kept or Kept()
        self._has_fine = record.fine is not None and record.encoding is None

    @property
    def data_start(self) -> int:
        """Where its data begins. Reads the beginning of an image whose record does not say it."""
        if self.record.data_start is not None:
            return self.record.data_start
        return data_start_of(self.span(0, 8))

    def read(self, offset: int, into: memoryview) -> None:
        """Fill `into`. Raises LevelFailed, and DamagedImage, which names the tensors, also where the file is gone."""
        into = memoryview(into).cast("B")
        stop = offset + into.nbytes
        if offset < 0 or stop > self.record.image_bytes:
            raise DamagedImage(
                f"{self._where} has {self.record.image_bytes} bytes and was asked for those from {offset} to {stop}"
            )
        while into.nbytes:
            done = self._from_kept(offset, into) or self._fresh(offset, into)
            offset, into = offset + done, into[done:]

    def span(self, begin: int, end: int) -> memoryview:
        room = memoryview(bytearray(end - begin))
        self.read(begin, room)
        return room

    def objects(self) -> dict[str, Any]:
        """Its objects by item. Raises as `read` does, and NewerFormat."""
        try:
            found: dict[str, Any] = Image(self).objects
        except MALFORMED as error:
            raise DamagedImage(
                f"the objects in {self._where} cannot be read ({type(error).__name__}: {error})"
            ) from error
        return found

    @property
    def _where(self) -> str:
        return f"{self.level}/{self.record.image_name}"

    def _fine(self) -> bytes | None:
        """The fine digests. Where they are lost or damaged what is verified together only becomes larger."""
        if not self._has_fine:
            return None
        name = self.record.image_name
        if name not in self._kept.fine:
            try:
                found = read_fine_digests(self._store, self.record)
            except (DamagedImage, FileNotFoundError):
                found = None
            if found is None:
                self._has_fine = False
                return None
            self._kept.keep_fine(name, found)
        return self._kept.fine[name]

    def _from_kept(self, offset: int, into: memoryview) -> int:
        """Fill as much of the beginning as was read before; how many bytes that is."""
        kept = self._kept
        at = offset - kept.begin
        if kept.image != self.record.image_name or not 0 <= at < kept.data.nbytes:
            return 0
        count = min(into.nbytes, kept.data.nbytes - at)
        into[:count] = kept.data[at : at + count]
        return count

    def _fresh(self, offset: int, into: memoryview) -> int:
        """Fill some of the beginning from the store, verified; how many bytes that is.

        Whole units straight; what is short, or lies before the first border, by way of the units around it.
        """
        fine, stop, size = self._fine(), offset + into.nbytes, self.record.image_bytes
        unit = BLOCK_BYTES if fine is None else FINE_BYTES
        begin, whole = offset // unit * unit, (stop if stop == size else stop // unit * unit) - offset
        if begin == offset and whole >= min(into.nbytes, _MOST_KEPT_BYTES):
            self._read_verified(offset, into[:whole], fine)
            return whole
        end = begin + unit if into.nbytes > _MOST_KEPT_BYTES else -(-stop // unit) * unit
        data = memoryview(bytearray(min(end, size) - begin))
        self._read_verified(begin, data, fine)
        self._kept.image, self._kept.begin, self._kept.data = self.record.image_name, begin, data
        return self._from_kept(offset, into)

    def _read_verified(self, begin: int, into: memoryview, fine: bytes | None) -> None:
        """A range of whole units."""
        self._span_into(begin, into)
        image_bytes = self.record.image_bytes
        if fine is not None:
            spans = [(at, min(at + FINE_BYTES, image_bytes)) for at in fine_damage(into, fine, begin)]
        else:
            spans = [block_range(one, image_bytes) for one in damaged_blocks(into, self.record.blocks, begin)]
        if spans:
            raise DamagedImage(f"{self._where}: {told(self.record, spans)}")

    def _span_into(self, begin: int, into: memoryview) -> None:
        try:
            read_image_range(self._store, self.record, begin, into)
        except FileNotFoundError:
            raise DamagedImage(f"{self._where} is not there, though its record is") from None

    def _span(self, begin: int, end: int) -> memoryview:
        room = memoryview(bytearray(end - begin))
        self._span_into(begin, room)
        return room

    def _block(self, number: int) -> AbstractContextManager[memoryview]:
        return nullcontext(self._span(*block_range(number, self.record.image_bytes)))


def damage_in(store: Store, record: Record, progress: Progress) -> list[int]:
    """Read all of an image, several blocks at a time; the numbers of the blocks that differ from their digests.

    Raises FileNotFoundError, LevelFailed, and DamagedImage where it ends early or its frames are damaged.
    """
    checked = _Checked(record, store.url, partial(read_image_range, store, record))
    try:
        checked.stream(lambda _, block: progress(block.nbytes))
    except DamagedImage:
        if not checked.bad:
            raise
    return list(checked.bad)


def verify_image(store: Store, record: Record, progress: Progress) -> Iterator[Finding]:
    """Read all of an image and compare every block; its file of fine digests too."""
    fine: bytes | None = None
    try:
        fine = read_fine_digests(store, record)
    except (DamagedImage, FileNotFoundError, LevelFailed) as error:
        name = digests_name(record.step, record.rank, record.world_size)
        what = "is not there" if isinstance(error, FileNotFoundError) else str(error)
        yield Finding(name, (), f"{what}; the image itself is verified by larger blocks")
    try:
        bad = damage_in(store, record, progress)
        if bad:
            spans = damaged_spans(store, record, bad, fine)
            yield Finding(record.image_name, tensors_in(record, spans), told(record, spans))
    except FileNotFoundError:
        yield Finding(record.image_name, (), "is not there, though its record is")
    except (DamagedImage, LevelFailed) as error:
        yield Finding(record.image_name, (), f"cannot be read: {error}")


def damaged_spans(store: Store, record: Record, blocks: Sequence[int], fine: bytes | None) -> list[Span]:
    """Where in these blocks, which are known to be damaged, the damage lies: to 64 KiB where `fine` says so."""
    found: list[Span] = []
    for block in blocks:
        begin, end = block_range(block, record.image_bytes)
        inner: list[int] = []
        if fine is not None and record.encoding is None:
            part = memoryview(bytearray(end - begin))
            read_image_range(store, record, begin, part)
            inner = fine_damage(part, fine, begin)
        found += [(at, min(at + FINE_BYTES, end)) for at in inner] or [(begin, end)]
    return found


def told(record: Record, spans: Sequence[Span]) -> str:
    """What is damaged, for a message: how much, and which tensors lie there."""
    names = tensors_in(record, spans)
    what = "" if record.data_start is None else f"; tensors: {listed(names) or 'none, but the header or the objects'}"
    nbytes = sum(stop - start for start, stop in spans)
    return (
        f"{nbytes} bytes, from {spans[0][0]} on, are not as they were sealed "
        f"(step {record.step}, rank {record.rank}{what})"
    )


def tensors_in(record: Record, spans: Sequence[Span]) -> tuple[str, ...]:
    """The names of the tensors of which some bytes lie there; none where the record does not say where they lie."""
    return () if record.data_start is None else source.tensors_in(record, record.data_start, spans)


class _Checked(InStore):
    """An image that remembers which blocks of it were found to be damaged."""

    bad: tuple[int, ...] | list[int] = ()

    def _message(self, blocks: list[int]) -> str:
        self.bad = list(blocks)
        return super()._message(blocks)
