"""A conversion as tasks that workers carry out one by one, and the order that they may be done in. Pure.

A large file on a local disk is filled in ranges, by several workers at a time, and finished (checksums, its name) when
all of them are there. A small or a remote one is written by one worker. What is derived from written bytes is made when
the outputs before it are there, and those that are `last` come one by one in the end.
"""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from resilient.checkpoint.catalog.catalog import ITEMSIZES, Catalog
from resilient.checkpoint.formats.converting.checksum import combined
from resilient.checkpoint.formats.fetch import boxes_of
from resilient.checkpoint.formats.output import Checksum, Derive, Output, TensorBytes

CHUNK_BYTES = 8 << 20  # of a tensor (or text) that a worker holds at a time
CONVERTED_BYTES = 4 << 20  # the same where values are converted, which takes several times as much
_TASK_BYTES = 32 << 20
_TASK_CHUNKS = 4096


@dataclass(frozen=True, slots=True)
class Chunk:
    """Some bytes of a file: those of part number `part`, or of a box of the tensor that it is."""

    part: int
    content: bytes | TensorBytes
    nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Fill:
    """Write chunks, one after the other, at `offset` of a local file that is not finished.

    `sums`: for these parts, tell the CRC-32 of each chunk. `order`: the number of the task within its file.
    """

    output: int
    name: str
    file_bytes: int
    order: int
    offset: int
    chunks: tuple[Chunk, ...]
    sums: frozenset[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finish:
    """Write checksums (offset, value) into a local file that is filled, and give it its name."""

    output: int
    name: str
    file_bytes: int
    checksums: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stream:
    """Write a whole file, one part after the other: a small one, or a remote one."""

    output: int
    whole: Output


@dataclass(frozen=True, slots=True, kw_only=True)
class Make:
    """Write a file whose content is derived from what is written already."""

    output: int
    name: str
    derive: Derive


Task = Fill | Finish | Stream | Make


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """What a task tells: bytes written, CRC-32 and length of the chunks of parts that need it, and values that were
    beyond the range of the dtype that they were converted to, by tensor."""

    nbytes: int = 0
    sums: tuple[tuple[int, int, int], ...] = ()  # part, CRC-32, bytes
    beyond: Mapping[str, int] = field(default_factory=dict)


@dataclass(slots=True)
class _Open:
    """An output that is being filled."""

    left: int = 0  # tasks under way
    given: bool = False  # whether all its tasks are
    sums: dict[int, tuple[tuple[int, int, int], ...]] = field(default_factory=dict)  # by order of the task


class Schedule:
    """What to do next. One thread uses it: `next` until it gives None, `done` for each task that is carried out."""

    def __init__(self, catalog: Catalog, outputs: Sequence[Output], *, skip: frozenset[str], local: bool) -> None:
        """`skip`: the names of outputs that are there already. `local`: whether files can be filled in ranges."""
        self._catalog, self._outputs, self._local = catalog, outputs, local
        self._missing = {number for number, output in enumerate(outputs) if output.name not in skip}
        self._waiting = deque(sorted(self._missing))
        self._open: dict[int, _Open] = {}
        self._ready: deque[Task] = deque()
        self._tasks: Iterator[Task] = iter(())

    @property
    def is_finished(self) -> bool:
        return not self._missing

    def next(self) -> Task | None:
        """A task that may be done now; None where others have to be done first, or all are given."""
        if self._ready:
            return self._ready.popleft()
        task = next(self._tasks, None)
        while task is None:
            number = next(filter(self._may_begin, self._waiting), None)
            if number is None:
                break
            self._waiting.remove(number)
            self._tasks = self._tasks_of(number)
            task = next(self._tasks, None)
        return task

    def done(self, task: Task, result: Done) -> None:
        """A task is carried out."""
        if isinstance(task, Fill):
            state = self._open[task.output]
            state.sums[task.order] = result.sums
            state.left -= 1
            self._finish_if_filled(task.output)
        else:
            self._missing.discard(task.output)

    def _may_begin(self, number: int) -> bool:
        """Plain outputs at any time, others when all that they follow are there."""
        output = self._outputs[number]
        if output.last:
            return not any(one < number or not self._outputs[one].last for one in self._missing if one != number)
        return output.derive is None or not any(one < number and not self._outputs[one].last for one in self._missing)

    def _tasks_of(self, number: int) -> Iterator[Task]:
        output = self._outputs[number]
        if output.derive is not None:
            yield Make(output=number, name=output.name, derive=output.derive)
        elif not self._local or (output.nbytes <= _TASK_BYTES and len(output.parts) <= _TASK_CHUNKS):
            yield Stream(output=number, whole=output)
        else:
            state = self._open[number] = _Open()
            for task in fill_tasks(number, output, self._catalog):
                state.left += 1
                yield task
            state.given = True
            self._finish_if_filled(number)
            if self._ready:
                yield self._ready.popleft()

    def _finish_if_filled(self, number: int) -> None:
        state, output = self._open[number], self._outputs[number]
        if state.given and not state.left:
            del self._open[number]
            sums = [one for order in sorted(state.sums) for one in state.sums[order]]
            self._ready.append(
                Finish(
                    output=number, name=output.name, file_bytes=output.nbytes, checksums=tuple(_checksums(output, sums))
                )
            )


def fill_tasks(number: int, output: Output, catalog: Catalog) -> Iterator[Fill]:
    """An output in ranges of about 32 MiB; each with its chunks, in the order of the file."""
    sums = frozenset(part.part for part in output.parts if isinstance(part, Checksum))
    offset, order, nbytes = 0, 0, 0
    some: list[Chunk] = []
    for chunk in chunks_of(output, catalog):
        some.append(chunk)
        nbytes += chunk.nbytes
        if len(some) == _TASK_CHUNKS or nbytes >= _TASK_BYTES:
            yield _fill(number, output, order, offset, some, sums)
            offset, order, nbytes, some = offset + nbytes, order + 1, 0, []
    if some:
        yield _fill(number, output, order, offset, some, sums)


def _fill(number: int, output: Output, order: int, offset: int, some: list[Chunk], sums: frozenset[int]) -> Fill:
    return Fill(
        output=number,
        name=output.name,
        file_bytes=output.nbytes,
        order=order,
        offset=offset,
        chunks=tuple(some),
        sums=sums,
    )


def chunks_of(output: Output, catalog: Catalog) -> Iterator[Chunk]:
    """All bytes of an output in their order, in chunks of at most CHUNK_BYTES; 4 zero bytes for a checksum."""
    for number, part in enumerate(output.parts):
        if isinstance(part, Checksum):
            yield Chunk(number, bytes(part.nbytes), part.nbytes)
        elif isinstance(part, bytes):
            for begin in range(0, len(part), CHUNK_BYTES):
                text = part[begin : begin + CHUNK_BYTES]
                yield Chunk(number, text, len(text))
        else:
            yield from (Chunk(number, one, one.nbytes) for one in _boxes(part, part.tensor_in(catalog).dtype))


def _boxes(part: TensorBytes, dtype: str) -> Iterator[TensorBytes]:
    itemsize, most = max(ITEMSIZES[dtype], ITEMSIZES[part.dtype]), CHUNK_BYTES
    if dtype != part.dtype:
        itemsize, most = max(4, itemsize), CONVERTED_BYTES
    if not part.nbytes:
        return
    for offsets, sizes in boxes_of(part.sizes, itemsize, most):
        at = tuple(a + b for a, b in zip(part.offsets, offsets, strict=True))
        yield TensorBytes(part.name, at, sizes, part.dtype, part.rank)


def _checksums(output: Output, sums: Sequence[tuple[int, int, int]]) -> Iterator[tuple[int, int]]:
    """Where which CRC-32 goes. `sums`: part, CRC-32 and length of each chunk, in the order of the file."""
    by_part: dict[int, list[tuple[int, int]]] = {}
    for part, crc, nbytes in sums:
        by_part.setdefault(part, []).append((crc, nbytes))
    offset = 0
    for content in output.parts:
        if isinstance(content, Checksum):
            yield offset, combined(by_part.get(content.part, ()))
        offset += len(content) if isinstance(content, bytes) else content.nbytes
