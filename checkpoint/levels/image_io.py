"""How an image and its record are kept on a store: the image first, then its fine digests, the record last.

The record's presence says that the image is there (law 3), so a write that ends early leaves nothing that counts.
Bytes are not verified here: `record.blocks` has the digests, and whoever reads checks them against the raw bytes.
Which snapshots are kept, and where, is decided above.
"""

import errno
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

from resilient.checkpoint.digest import FINE_DIGEST_BYTES, FineDigests, digest, fine_count
from resilient.checkpoint.levels import frames
from resilient.checkpoint.levels.store import Store
from resilient.checkpoint.names import digests_name, image_name, record_name
from resilient.checkpoint.record import Record, parse_record
from resilient.errors import DamagedImage, LevelFailed, PolicyError

CHUNK_BYTES = 64 << 20
RECORD_READERS = 16  # records are small, and a remote store answers many requests as quickly as one
COMPRESSIONS = (None, frames.NAME)


def write_image(
    store: Store,
    record: Record,
    chunks: Callable[[], Iterable[memoryview]],
    *,
    compression: str | None = None,
    cancelled: Callable[[], bool],
) -> Record:
    """Write an image, then its record; returns the record as stored, which names the encoding. Blocks; any thread.

    `chunks()` gives the raw bytes of the image, `record.image_bytes` in all; they must not change before the return.
    `cancelled` is asked between chunks and before the record; if it says so, LevelFailed is raised and the record is
    not written. Raises LevelFailed too when the store does, PolicyError for an unknown compression. Safe to repeat.
    """
    if compression not in COMPRESSIONS:
        raise PolicyError(f"compression {compression!r} is unknown; use one of {COMPRESSIONS}")
    fine = FineDigests()
    raw = _watched(chunks(), record, store.url, cancelled, fine)
    if compression is None:
        stored = replace(record, encoding=None)
        store.write(record.image_name, raw)
    else:
        compressed = frames.compress_frames(raw)
        store.write(record.image_name, compressed)
        stored = replace(record, encoding=compressed.encoding())
    digests = fine.finish()
    stored = replace(stored, fine=digest(digests))
    _check(cancelled, record, store.url)
    store.write(digests_name(record.step, record.rank, record.world_size), [memoryview(digests)])
    text = stored.text().encode()
    store.write(record_name(record.step, record.rank, record.world_size), [memoryview(text)])
    return stored


def read_record(store: Store, step: int, rank: int, world_size: int) -> Record:
    """The record of one image. Blocks; any thread.

    Raises FileNotFoundError where there is none, DamagedImage, NotACheckpoint, NewerFormat (`parse_record`),
    LevelFailed.
    """
    name = record_name(step, rank, world_size)
    where = f"{store.url}/{name}"
    text = bytearray(store.size(name))
    store.read(name, 0, memoryview(text))
    record = parse_record(bytes(text), where)
    if (record.step, record.rank, record.world_size) != (step, rank, world_size) or record.image_name != image_name(
        step, rank, world_size
    ):
        raise DamagedImage(
            f"{where} is the record of step {record.step}, rank {record.rank} of {record.world_size} "
            f"({record.image_name}): the file was renamed or copied; use another snapshot"
        )
    return record


def read_fine_digests(store: Store, record: Record) -> bytes | None:
    """The digests of an image's blocks of 64 KiB, 16 bytes each; None where none were kept. Blocks; any thread.

    Raises DamagedImage, FileNotFoundError, LevelFailed.
    """
    if record.fine is None:
        return None
    name = digests_name(record.step, record.rank, record.world_size)
    found = bytearray(store.size(name))
    store.read(name, 0, memoryview(found))
    expected = fine_count(record.image_bytes) * FINE_DIGEST_BYTES
    if len(found) != expected or digest(bytes(found)) != record.fine:
        raise DamagedImage(f"{store.url}/{name} was changed after it was written: its digest does not match")
    return bytes(found)


def read_image_range(store: Store, record: Record, offset: int, into: memoryview) -> None:
    """Fill `into` with the image's raw bytes from `offset`, whatever its encoding. Blocks; verifies no digest.

    Raises ValueError for a range outside of the image, FileNotFoundError, DamagedImage, NewerFormat, LevelFailed.
    """
    length = memoryview(into).nbytes
    if offset < 0 or offset + length > record.image_bytes:
        raise ValueError(
            f"[{offset}, {offset + length}) is outside of {record.image_name}, which has {record.image_bytes} bytes"
        )
    if record.encoding is None:
        store.read(record.image_name, offset, into)
    else:
        frames.read_range(store, record.image_name, record.encoding, record.image_bytes, offset, into)


def chunks_of(view: memoryview, chunk_bytes: int = CHUNK_BYTES) -> Iterator[memoryview]:
    """A view in slices of `chunk_bytes`, the last one shorter. Nothing is copied."""
    flat = memoryview(view).cast("B")
    for start in range(0, len(flat), chunk_bytes):
        yield flat[start : start + chunk_bytes]


def _watched(
    chunks: Iterable[memoryview], record: Record, url: str, cancelled: Callable[[], bool], fine: FineDigests
) -> Iterator[memoryview]:
    """The chunks, with a look at `cancelled` before each, their fine digests, and a count at the end."""
    given = 0
    for chunk in chunks:
        _check(cancelled, record, url)
        given += memoryview(chunk).nbytes
        fine.update(memoryview(chunk).cast("B"))
        yield chunk
    assert given == record.image_bytes, f"{record.image_name}: {given} bytes given, {record.image_bytes} recorded"


def _check(cancelled: Callable[[], bool], record: Record, url: str) -> None:
    if cancelled():
        raise LevelFailed(
            errno.ECANCELED, f"{url}: writing {record.image_name} was cancelled; the next save tries again"
        )
