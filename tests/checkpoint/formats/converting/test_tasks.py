"""The order of a conversion's tasks, and files of all kinds of parts, carried out in one process.

The sinks' own files are tested with them; here are parts that only some of them use: checksums, what is derived.
"""

import random
import struct
import zlib
from collections.abc import Iterable
from pathlib import Path

import fsspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from resilient.checkpoint.catalog.catalog import Catalog
from resilient.checkpoint.formats.converting.checksum import combined
from resilient.checkpoint.formats.converting.tasks import CHUNK_BYTES, Done, Fill, Finish, Make, Schedule, Stream, Task
from resilient.checkpoint.formats.converting.workers import Job, run_here
from resilient.checkpoint.formats.folder import Folder
from resilient.checkpoint.formats.output import Checksum, Output, TensorBytes
from tests.checkpoint.formats.made import made_source, open_made, raw_bytes

NONE: frozenset[str] = frozenset()


def plain(name: str, *, last: bool = False) -> Output:
    return Output(name=name, parts=(b"x",), last=last)


def derived(name: str, *, last: bool = False) -> Output:
    return Output(name=name, derive=lambda folder: b"made", last=last)


def name_of(task: Task) -> str:
    return task.whole.name if isinstance(task, Stream) else task.name


def given_out(schedule: Schedule) -> list[Task]:
    """All tasks that may be done at this moment."""
    return list(iter(schedule.next, None))


def done(schedule: Schedule, tasks: Iterable[Task]) -> None:
    for task in tasks:
        schedule.done(task, Done())


def test_what_is_last_begins_when_all_others_are_there_one_by_one_in_their_order() -> None:
    outputs = [plain("index", last=True), plain("a"), derived("latest", last=True), plain("b")]
    schedule = Schedule(Catalog(format="t"), outputs, skip=NONE, local=True)
    order = []
    while tasks := given_out(schedule):
        order.append({name_of(task) for task in tasks})
        done(schedule, tasks)
    assert order == [{"a", "b"}, {"index"}, {"latest"}]
    assert schedule.is_finished


def test_what_is_derived_waits_for_what_is_before_it_and_holds_up_nothing_else() -> None:
    outputs = [plain("a"), derived("of a"), plain("b"), derived("of both")]
    schedule = Schedule(Catalog(format="t"), outputs, skip=NONE, local=True)
    a, b = given_out(schedule)
    done(schedule, [a])
    (of_a,) = given_out(schedule)
    assert isinstance(of_a, Make)
    assert of_a.name == "of a"
    done(schedule, [of_a])
    assert given_out(schedule) == []
    done(schedule, [b])
    (of_both,) = given_out(schedule)
    assert name_of(of_both) == "of both"


def test_what_is_there_already_is_skipped() -> None:
    schedule = Schedule(Catalog(format="t"), [plain("a"), plain("b")], skip=frozenset({"a"}), local=True)
    assert {name_of(task) for task in given_out(schedule)} == {"b"}


def test_a_file_is_finished_when_its_last_range_is_filled_in_whatever_order() -> None:
    output = Output(name="a", parts=(bytes(9 * CHUNK_BYTES), Checksum(0)))
    schedule = Schedule(Catalog(format="t"), [output], skip=NONE, local=True)
    fills = given_out(schedule)
    assert len(fills) == 3
    for fill in reversed(fills):
        assert isinstance(fill, Fill)
        assert given_out(schedule) == []
        sums = [(chunk.part, zlib.crc32(bytes(chunk.nbytes)), chunk.nbytes) for chunk in fill.chunks if not chunk.part]
        schedule.done(fill, Done(sums=tuple(sums)))
    (finish,) = given_out(schedule)
    assert isinstance(finish, Finish)
    assert finish.checksums == ((9 * CHUNK_BYTES, zlib.crc32(bytes(9 * CHUNK_BYTES))),)


@given(st.lists(st.binary(max_size=300), max_size=6))
def test_checksums_of_pieces_make_that_of_the_whole(pieces: list[bytes]) -> None:
    assert combined((zlib.crc32(piece), len(piece)) for piece in pieces) == zlib.crc32(b"".join(pieces))


@pytest.mark.parametrize("where", ["local", "memory"])
def test_files_have_their_parts_their_checksums_and_what_is_derived_from_them(tmp_path: Path, where: str) -> None:
    value = torch.randn(1200, 4100, generator=torch.Generator().manual_seed(1))  # more than a chunk
    reference = made_source(tmp_path / "source", {"model.a": value, "model.none": torch.empty(0)}, cuts=0)
    rows = TensorBytes("model.a", (3, 0), (1190, 4100), "float32")
    nothing = TensorBytes("model.none", (0,), (0,), "float32")
    outputs = [
        Output(
            name="deep/er/file",
            parts=(b"head", rows, Checksum(1), b"tail", nothing, Checksum(4), Checksum(0)),
            last=True,
        ),
        Output(name="empty", parts=()),
        Output(name=".hidden", derive=lambda folder: folder.read_all("empty", 10) + b"made"),
        Output(name="end", derive=lambda folder: folder.read_all("deep/er/file", 1 << 30)[:4], last=True),
    ]
    url = str(tmp_path / "out") if where == "local" else f"memory://{random.randbytes(6).hex()}"
    with open_made(reference) as source:
        job = Job(open_source=open_made, reference=reference, files=(), target_url=url, token="t")
        schedule = Schedule(source.catalog, outputs, skip=NONE, local=where == "local")
        run_here(schedule, source, job, lambda result: None)
    data = raw_bytes(value[3:1193])
    target = Folder(url)
    assert target.names == [".hidden", "deep/er/file", "empty", "end"]
    sums = [struct.pack("<I", zlib.crc32(part)) for part in (data, b"", b"head")]
    assert target.read_all("deep/er/file", 1 << 30) == b"head" + data + sums[0] + b"tail" + sums[1] + sums[2]
    assert target.read_all("empty", 10) == b""
    assert target.read_all(".hidden", 10) == b"made"
    assert target.read_all("end", 10) == b"head"
    if where == "memory":
        fsspec.filesystem("memory").rm(url, recursive=True)
