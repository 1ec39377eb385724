"""Images that are lent to threads: never withdrawn under a reader, never lent once withdrawn."""

import pytest

from resilient.checkpoint.agent.shelf import Shelf
from resilient.checkpoint.digest import digest
from resilient.checkpoint.record import Record
from resilient.errors import LevelFailed


def record(step: int, life: str = "life") -> Record:
    return Record(
        run_id="run",
        life=life,
        step=step,
        rank=0,
        world_size=1,
        plan_digest="",
        image_name="image",
        image_bytes=3,
        blocks=(digest(b"abc"),),
    )


def test_an_image_that_is_read_is_withdrawn_only_afterwards() -> None:
    returned: list[int] = []
    shelf = Shelf(lambda: returned.append(1))
    shelf.put(5, record(1), memoryview(bytearray(b"abc")))
    with shelf.lend("life", 1, 0) as first, shelf.lend("life", 1, 0) as second:
        assert bytes(first) == bytes(second) == b"abc"
        assert not shelf.withdraw(5)
    assert returned == [1], "said when the last reader is done"
    assert shelf.withdraw(5)
    with pytest.raises(LevelFailed, match="rank 0 at step 1 is not in this node's memory"), shelf.lend("life", 1, 0):
        pass
    assert shelf.withdraw(5), "what is not there is nobody's"


def test_an_image_of_another_life_is_another_image() -> None:
    shelf = Shelf(lambda: None)
    shelf.put(1, record(1, "old"), memoryview(bytearray(b"old")))
    shelf.put(2, record(1, "new"), memoryview(bytearray(b"new")))
    with shelf.lend("new", 1, 0) as image:
        assert bytes(image) == b"new"
    assert {one.life for one in shelf.records()} == {"old", "new"}
    shelf.clear()
    assert shelf.records() == []
