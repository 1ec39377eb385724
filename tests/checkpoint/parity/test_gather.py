"""Blocks of several nodes side by side: in order, with few buffers, and with an end whatever happens."""

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager, nullcontext

import pytest

from resilient.checkpoint.parity.gather import (
    Gather,
    Here,
    Part,
    Read,
    SourceFailed,
    gather_in_turn,
    gather_with_threads,
)
from resilient.checkpoint.parity.memory import Blocks
from resilient.checkpoint.peers.transport import Wanted
from resilient.errors import LevelFailed

BLOCK = 32
Eventually = Callable[..., None]


def content(node: str, offset: int, nbytes: int) -> bytes:
    return bytes((ord(node) + offset // BLOCK + at) % 256 for at in range(nbytes))


def read(node: str, wanted: Iterable[Wanted]) -> Iterator[Wanted]:
    """Asks two ahead, as a real transport does."""
    asked: list[Wanted] = []
    for one in wanted:
        asked.append(one)
        if len(asked) > 2:
            ready = asked.pop(0)
            ready.into[:] = content(node, ready.offset, ready.into.nbytes)
            yield ready
    for ready in asked:
        ready.into[:] = content(node, ready.offset, ready.into.nbytes)
        yield ready


def part(node: str, number: int, nbytes: int = BLOCK, into: memoryview | None = None) -> Part:
    return Part(node=node, name="n", offset=number * BLOCK, nbytes=nbytes, digests=("",), shard=ord(node), into=into)


def accept(_part: Part, _view: memoryview) -> None:
    """All is well."""


def gathers(blocks: Blocks, how: Read = read) -> list[Gather]:
    @contextmanager
    def lend(_name: str, offset: int, nbytes: int) -> Iterator[memoryview]:
        yield memoryview(content("c", offset, nbytes))

    return [
        gather_in_turn(how, blocks),
        gather_with_threads(how, blocks),
        gather_with_threads(how, blocks, Here("c", lend)),
    ]


def test_positions_come_in_order_with_all_their_parts() -> None:
    blocks = Blocks(BLOCK, kept=64)
    positions = [[part(node, number, BLOCK - number % 3) for node in "abc"[: 1 + number % 3]] for number in range(50)]
    for gather in gathers(blocks):
        seen = 0
        for position, taken in zip(positions, gather(positions, accept), strict=True):
            assert [one for one, _ in taken] == position
            assert all(bytes(view) == content(one.node, one.offset, one.nbytes) for one, view in taken)
            seen += 1
        assert seen == 50
    assert blocks.idle_bytes <= 3 * 8 * BLOCK, "buffers were used again"


def test_parts_for_the_callers_memory_go_straight_there() -> None:
    for gather in gathers(Blocks(BLOCK, kept=8)):
        target = bytearray(10 * BLOCK)
        positions = [
            [part("abc"[number % 3], number, into=memoryview(target)[number * BLOCK : (number + 1) * BLOCK])]
            for number in range(10)
        ]
        for _ in gather(positions, accept):
            pass
        assert target == b"".join(content("abc"[number % 3], number * BLOCK, BLOCK) for number in range(10))


def test_a_source_that_fails_is_named_after_all_that_came_before() -> None:
    def failing(node: str, wanted: Iterable[Wanted]) -> Iterator[Wanted]:
        for count, one in enumerate(read(node, wanted)):
            if node == "b" and one.offset >= 5 * BLOCK:
                raise LevelFailed(f"gone after {count}")
            yield one

    for gather in gathers(Blocks(BLOCK, kept=8), failing)[:2]:
        gathered = gather([[part("a", number), part("b", number)] for number in range(20)], accept)
        for _ in range(5):
            next(gathered)
        with pytest.raises(SourceFailed, match="gone") as caught:
            next(gathered)
        assert caught.value.node == "b"


def test_what_the_check_raises_counts_as_the_nodes_failure() -> None:
    def check(one: Part, view: memoryview) -> None:
        if one.node == "c" and one.offset == 3 * BLOCK:
            raise LevelFailed("not what it should be")

    for gather in gathers(Blocks(BLOCK, kept=8)):
        with pytest.raises(SourceFailed, match="not what it should be"):
            list(gather([[part("a", number), part("c", number)] for number in range(9)], check))


def test_an_error_that_nobody_foresaw_does_not_hang() -> None:
    def broken(node: str, wanted: Iterable[Wanted]) -> Iterator[Wanted]:
        yield from read(node, wanted)
        raise RuntimeError("a defect")

    with pytest.raises(SourceFailed, match="RuntimeError"):
        list(gather_with_threads(broken, Blocks(BLOCK, kept=8))([[part("a", number)] for number in range(40)], accept))


def test_who_stops_early_leaves_no_thread(eventually: Eventually) -> None:
    before = set(threading.enumerate())
    gather = gather_with_threads(
        read, Blocks(BLOCK, kept=8), Here("c", lambda *_: nullcontext(memoryview(bytes(BLOCK))))
    )
    with closing(gather([[part(node, number) for node in "abc"] for number in range(1000)], accept)) as gathered:
        next(gathered)
    eventually(lambda: set(threading.enumerate()) <= before, "all readers have ended")
