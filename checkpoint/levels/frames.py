"""Images in zstd frames of a fixed raw size, so that a range can be read without the rest.

The file is a plain concatenation of zstd frames (RFC 8878): `zstd -d` opens it. The lengths of the frames stand in
the record as its encoding: {"name": "zstd", "frame_bytes": raw bytes per frame, "frames": [compressed length, ...]}.
It pays only where a link is slower than about 1 GB/s a core: object stores. Block digests are of the raw bytes and
are checked by whoever reads; each frame's own checksum finds damage as well.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import zstandard

from resilient.checkpoint.levels.store import Store
from resilient.errors import DamagedImage, NewerFormat

NAME = "zstd"
FRAME_BYTES = 4 << 20
_READ_BYTES = 32 << 20  # about what one request to the store fetches at most


class CompressedFrames(Iterator[memoryview]):
    """The compressed chunks, one frame each; `encoding()` once they are used up. One thread."""

    def __init__(self, chunks: Iterable[memoryview], frame_bytes: int, level: int) -> None:
        if frame_bytes <= 0:
            raise ValueError(f"frame_bytes is {frame_bytes}; it must be positive")
        self._frame_bytes = frame_bytes
        self._raw = _recut(chunks, frame_bytes)
        self._compressor = zstandard.ZstdCompressor(level=level, write_checksum=True, write_content_size=True)
        self._lengths: list[int] = []
        self._done = False

    def __next__(self) -> memoryview:
        try:
            raw = next(self._raw)
        except StopIteration:
            self._done = True
            raise
        frame = self._compressor.compress(raw)
        self._lengths.append(len(frame))
        return memoryview(frame)

    def encoding(self) -> dict[str, Any]:
        """What `Record.encoding` has to say; only after the last chunk."""
        assert self._done, "the lengths are known only when every chunk has been compressed"
        return {"name": NAME, "frame_bytes": self._frame_bytes, "frames": list(self._lengths)}


def compress_frames(chunks: Iterable[memoryview], frame_bytes: int = FRAME_BYTES, level: int = 1) -> CompressedFrames:
    """Compress chunks of any sizes as they are asked for. Chunks are read before the next is taken."""
    return CompressedFrames(chunks, frame_bytes, level)


def read_range(
    store: Store, name: str, encoding: dict[str, Any], image_bytes: int, offset: int, into: memoryview
) -> None:
    """Fill `into` with raw bytes from `offset`, fetching only the frames that hold them. Any thread; blocks.

    Raises DamagedImage for a frame that is wrong or cut short, NewerFormat for an encoding unknown here, ValueError
    for a range outside of the image, and what the store raises.
    """
    index = _index(name, encoding, image_bytes)
    view = memoryview(into).cast("B")
    if offset < 0 or offset + len(view) > image_bytes:
        raise ValueError(f"[{offset}, {offset + len(view)}) is outside of {name}, which has {image_bytes} bytes")
    if not len(view):
        return
    decompressor = zstandard.ZstdDecompressor()
    last = (offset + len(view) - 1) // index.frame_bytes
    for first, stop in _batches(index, offset // index.frame_bytes, last + 1):
        stored = bytearray(index.starts[stop] - index.starts[first])
        store.read(name, index.starts[first], memoryview(stored))
        for number in range(first, stop):
            begin, end = (index.starts[i] - index.starts[first] for i in (number, number + 1))
            raw = _decompress(
                decompressor, memoryview(stored)[begin:end], index.raw_bytes(number), f"{name}, frame {number}"
            )
            _place(raw, number * index.frame_bytes, view, offset)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Index:
    frame_bytes: int
    image_bytes: int
    starts: tuple[int, ...]  # of each frame in the stored file, and its end

    def raw_bytes(self, number: int) -> int:
        return min(self.frame_bytes, self.image_bytes - number * self.frame_bytes)


def _index(name: str, encoding: dict[str, Any], image_bytes: int) -> _Index:
    if encoding.get("name") != NAME:
        raise NewerFormat(
            f"{name} is encoded as {encoding.get('name')!r}, which this library does not know: upgrade it"
        )
    frame_bytes, lengths = encoding.get("frame_bytes"), encoding.get("frames")
    if isinstance(frame_bytes, int) and frame_bytes > 0 and isinstance(lengths, list | tuple):
        whole = all(isinstance(length, int) and length > 0 for length in lengths)
        if whole and len(lengths) == -(-image_bytes // frame_bytes):
            starts = tuple(accumulate(lengths, initial=0))
            return _Index(frame_bytes=frame_bytes, image_bytes=image_bytes, starts=starts)
    raise DamagedImage(
        f"the record of {name} has a list of frames that does not fit {image_bytes} bytes; use another snapshot"
    )


def _batches(index: _Index, first: int, stop: int) -> Iterator[tuple[int, int]]:
    """[first, stop) in groups of frames, each fetched with one read."""
    while first < stop:
        end = first + 1
        while end < stop and index.starts[end + 1] - index.starts[first] <= _READ_BYTES:
            end += 1
        yield first, end
        first = end


def _decompress(decompressor: zstandard.ZstdDecompressor, frame: memoryview, raw_bytes: int, where: str) -> bytes:
    try:
        claimed = zstandard.get_frame_parameters(frame).content_size
        if claimed != raw_bytes:  # before memory is taken for it
            raise DamagedImage(f"{where} says it holds {claimed} bytes, not {raw_bytes}; use another snapshot or level")
        raw = decompressor.decompress(frame, max_output_size=raw_bytes, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise DamagedImage(f"{where} is damaged ({error}); use another snapshot or level") from error
    if len(raw) != raw_bytes:
        raise DamagedImage(f"{where} holds {len(raw)} bytes, not {raw_bytes}; use another snapshot or level")
    return raw


def _place(raw: bytes, start: int, view: memoryview, offset: int) -> None:
    """Copy what `raw`, which begins at `start` of the image, has of the range that begins at `offset`."""
    begin, end = max(start, offset), min(start + len(raw), offset + len(view))
    view[begin - offset : end - offset] = memoryview(raw)[begin - start : end - start]


def _recut(chunks: Iterable[memoryview], size: int) -> Iterator[memoryview | bytearray]:
    """The same bytes in pieces of `size`; pieces that lie whole in a chunk are not copied."""
    held = bytearray()
    for chunk in chunks:
        view = memoryview(chunk).cast("B")
        while len(view):
            if not held and len(view) >= size:
                yield view[:size]
                view = view[size:]
                continue
            count = min(len(view), size - len(held))
            held += view[:count]
            view = view[count:]
            if len(held) == size:
                yield held
                held = bytearray()
    if held:
        yield held
