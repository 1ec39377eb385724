"""The digesting thread: every image gets the digests of its bytes, however its filling is reported."""

import queue
from collections.abc import Callable, Hashable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resilient.checkpoint.agent.digesting import Digester
from resilient.checkpoint.digest import BLOCK_BYTES, block_count, block_range, digest

ROOM = memoryview(bytes(range(256)) * (3 * BLOCK_BYTES // 256))

Answers = queue.Queue[tuple[Hashable, tuple[str, ...]]]


@pytest.fixture(scope="module")
def digester() -> Iterator[tuple[Digester, Answers]]:
    answers: Answers = queue.Queue()
    made = Digester("digest-test", lambda ticket, blocks: answers.put((ticket, blocks)))
    made.start()
    yield made, answers
    made.stop()


def digests_of(image_bytes: int) -> tuple[str, ...]:
    ranges = [block_range(index, image_bytes) for index in range(block_count(image_bytes))]
    return tuple(digest(ROOM[start:stop]) for start, stop in ranges)


@settings(max_examples=40, deadline=None)
@given(
    image_bytes=st.one_of(st.integers(1, len(ROOM)), st.sampled_from([BLOCK_BYTES, 2 * BLOCK_BYTES, 3 * BLOCK_BYTES])),
    marks=st.lists(st.integers(0, len(ROOM)), max_size=4).map(sorted),
)
def test_the_digests_do_not_depend_on_how_the_filling_went(
    digester: tuple[Digester, Answers], image_bytes: int, marks: list[int]
) -> None:
    made, answers = digester
    made.begin("image", ROOM)
    for upto in marks:
        made.filled("image", upto)
    made.seal("image", image_bytes)
    assert answers.get(timeout=20) == ("image", digests_of(image_bytes))


def test_an_image_that_was_dropped_gets_no_answer(digester: tuple[Digester, Answers]) -> None:
    made, answers = digester
    made.begin("dropped", ROOM)
    made.filled("dropped", len(ROOM))
    made.drop("dropped")
    made.seal("dropped", len(ROOM))
    made.begin("next", ROOM)
    made.seal("next", 10)
    assert answers.get(timeout=20) == ("next", digests_of(10))


def test_a_sealed_image_goes_before_one_that_is_still_being_filled(digester: tuple[Digester, Answers]) -> None:
    made, answers = digester
    for ticket in ("filling", "sealed"):
        made.begin(ticket, ROOM)
    made.filled("filling", len(ROOM))
    made.seal("sealed", len(ROOM))
    assert answers.get(timeout=20) == ("sealed", digests_of(len(ROOM)))
    made.seal("filling", len(ROOM))
    assert answers.get(timeout=20) == ("filling", digests_of(len(ROOM)))


def test_the_thread_ends_when_it_is_stopped(eventually: Callable[..., None]) -> None:
    import threading

    made = Digester("digest-stopped", lambda ticket, blocks: None)
    made.start()
    made.stop()
    eventually(lambda: all(thread.name != "digest-stopped" for thread in threading.enumerate()), "the thread has ended")
