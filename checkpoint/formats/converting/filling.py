"""What a worker does: reads boxes of the source's tensors, converts their values, writes them where they belong.

Beyond its program and the source's catalog a worker takes at most WORKER_BYTES of memory, however large the checkpoint.
"""

import math
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import numpy as np

from resilient.checkpoint.formats.converting.local_file import LocalFile
from resilient.checkpoint.formats.converting.tasks import (
    CHUNK_BYTES,
    CONVERTED_BYTES,
    Chunk,
    Done,
    Fill,
    Finish,
    Make,
    Stream,
    Task,
    chunks_of,
)
from resilient.checkpoint.formats.fetch import fetch
from resilient.checkpoint.formats.folder import Folder
from resilient.checkpoint.formats.output import Checksum, Output, TensorBytes
from resilient.checkpoint.formats.source import Source
from resilient.checkpoint.formats.values import convert_values
from resilient.errors import LevelFailed, ResilientError

WORKER_BYTES = 80 << 20
"""A chunk, its copy where the source has it in other strides or compressed, and what a conversion of values takes."""


class Filler:
    """Carries out tasks. `wanted` is asked between chunks; what it raises ends the task."""

    def __init__(self, source: Source, target: Folder, token: str, wanted: Callable[[], None] = lambda: None) -> None:
        """`token`: of the conversion, in the names of its unfinished files."""
        self._source, self._target, self._token, self._wanted = source, target, token, wanted
        self._stage = memoryview(np.empty(CHUNK_BYTES, np.uint8).data)
        self._scratch: Any = None
        self._file: LocalFile | None = None

    def run(self, task: Task) -> Done:
        """Raises FileNotFoundError, LevelFailed and RestoreError with the file's and the tensor's name."""
        if isinstance(task, Fill):
            return self._fill(task)
        if isinstance(task, Finish):
            return self._finish(task)
        if isinstance(task, Stream):
            return self._stream(task)
        return self._make(task)

    def close(self) -> None:
        """Safe to repeat. The source stays open."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _fill(self, task: Fill) -> Done:
        file = self._local(task)
        beyond: dict[str, int] = {}
        sums: list[tuple[int, int, int]] = []
        at, used = task.offset, 0
        for chunk in task.chunks:
            if used + chunk.nbytes > CHUNK_BYTES:
                file.write(at, self._stage[:used])
                at, used = at + used, 0
            self._wanted()
            view = self._stage[used : used + chunk.nbytes]
            self._put(chunk, view, task.name, beyond)
            if chunk.part in task.sums:
                sums.append((chunk.part, zlib.crc32(view), chunk.nbytes))
            used += chunk.nbytes
        file.write(at, self._stage[:used])
        return Done(nbytes=at + used - task.offset, sums=tuple(sums), beyond=beyond)

    def _finish(self, task: Finish) -> Done:
        file = self._local(task)
        for offset, crc in task.checksums:
            file.write(offset, memoryview(crc.to_bytes(4, "little")))
        file.publish()
        self.close()
        return Done()

    def _local(self, task: Fill | Finish) -> LocalFile:
        """The file that is being filled; made where it is not there."""
        if self._file is None or self._file.name != task.name:
            self.close()
            self._file = LocalFile(self._target, task.name, task.file_bytes, self._token)
        return self._file

    def _stream(self, task: Stream) -> Done:
        beyond: dict[str, int] = {}
        chunks = self._chunks(task.whole, beyond)
        if self._target.is_local:
            self._write_small(task.whole, chunks)
        else:
            self._target.write(task.whole.name, chunks)
        return Done(nbytes=task.whole.nbytes, beyond=beyond)

    def _write_small(self, output: Output, chunks: Iterator[bytes]) -> None:
        """A local file, in few writes."""
        file = LocalFile(self._target, output.name, output.nbytes, self._token)
        try:
            at = 0
            held: list[bytes] = []
            for chunk in chunks:
                held.append(chunk)
                if sum(map(len, held)) >= CONVERTED_BYTES:
                    at += file.write(at, memoryview(b"".join(held)))
                    held = []
            file.write(at, memoryview(b"".join(held)))
            file.publish()
        finally:
            file.close()

    def _chunks(self, output: Output, beyond: dict[str, int]) -> Iterator[bytes]:
        """The bytes of an output, its checksums where they belong. Copies: writers keep some for a while."""
        crcs: dict[int, int] = {}
        for chunk in chunks_of(output, self._source.catalog):
            self._wanted()
            part = output.parts[chunk.part]
            if isinstance(part, Checksum):
                yield crcs.get(part.part, 0).to_bytes(4, "little")
                continue
            view = self._stage[: chunk.nbytes]
            self._put(chunk, view, output.name, beyond)
            crcs[chunk.part] = zlib.crc32(view, crcs.get(chunk.part, 0))
            yield bytes(view)

    def _make(self, task: Make) -> Done:
        made = task.derive(self._target)
        self._target.write(task.name, [made])
        return Done(nbytes=len(made))

    def _put(self, chunk: Chunk, view: memoryview, file: str, beyond: dict[str, int]) -> None:
        """Bring the bytes of a chunk to where they are written from."""
        content = chunk.content
        if isinstance(content, bytes):
            view[:] = content
            return
        try:
            count = self._put_box(content, view)
        except (ResilientError, OSError) as error:
            raise _told(error, f"cannot write tensor {content.name!r} into {self._target.where(file)}: ") from error
        if count:
            beyond[content.name] = beyond.get(content.name, 0) + count

    def _put_box(self, box: TensorBytes, view: memoryview) -> int:
        tensor = box.tensor_in(self._source.catalog)
        if tensor.dtype == box.dtype:
            fetch(self._source, tensor, view, box.offsets, box.sizes)
            return 0
        if self._scratch is None:
            self._scratch = memoryview(np.empty(CONVERTED_BYTES, np.uint8).data)
        values = self._scratch[: math.prod(box.sizes) * tensor.itemsize]
        fetch(self._source, tensor, values, box.offsets, box.sizes)
        made, beyond = convert_values(values, tensor.dtype, box.dtype)
        view[:] = made
        return beyond


def _told(error: ResilientError | OSError, what: str) -> Exception:
    """An error of the same kind that says what for."""
    if isinstance(error, FileNotFoundError):
        return FileNotFoundError(error.errno, f"{what}{error.strerror}", error.filename)
    if isinstance(error, OSError):
        return LevelFailed(error.errno, f"{what}{error.strerror or error}")
    with suppress(TypeError):
        return type(error)(f"{what}{error}")
    return error


def parent_lives(parent: int) -> Callable[[], None]:
    """For a worker: raises SystemExit when its parent is gone, so that it does not write on for nobody."""

    def check() -> None:
        if os.getppid() != parent:
            raise SystemExit(1)

    return check
