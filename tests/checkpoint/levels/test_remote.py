"""What a store behind fsspec does with file systems of odd behaviour, each made for the purpose."""

import secrets
from collections.abc import Iterator
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from resilient.checkpoint.levels.remote import RemoteStore
from resilient.errors import LevelFailed
from tests.conformance.store_contract import get, put

NAME = "step_00000001/image"


class ShortAnswers(MemoryFileSystem):  # type: ignore[misc]
    """The first `short` reads come without their last byte."""

    protocol = "shortanswers"
    short = 0

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> bytes:
        data: bytes = super().cat_file(path, start, end, **kwargs)
        type(self).short -= 1
        return data if type(self).short < 0 else data[:-1]


class OldMove(MemoryFileSystem):  # type: ignore[misc]
    """A file system whose move refuses a target that is there, as some servers do."""

    protocol = "oldmove"

    def mv(self, path1: str, path2: str, **kwargs: Any) -> None:
        if self.exists(path2):
            raise FileExistsError(path2)
        super().mv(path1, path2, **kwargs)


class Full(MemoryFileSystem):  # type: ignore[misc]
    """A file system whose moves fail."""

    protocol = "full"

    def mv(self, path1: str, path2: str, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    for kind in (ShortAnswers, OldMove, Full):
        fsspec.register_implementation(kind.protocol, kind, clobber=True)
    yield
    ShortAnswers.short = 0


def store(protocol: str, **kwargs: Any) -> RemoteStore:
    # The class-wide store of the memory file system strips "memory://" only, so the whole URL is part of the path.
    options = {"retries": 2, "timeout_s": 10.0, "sleep": lambda seconds: None, **kwargs}
    return RemoteStore(f"{protocol}://{secrets.token_hex(6)}/run", storage_options={"global_store": False}, **options)


def test_a_short_answer_for_bytes_that_are_there_is_asked_for_again() -> None:
    place = store("shortanswers")
    put(place, NAME, b"0123456789")
    ShortAnswers.short = 2
    assert get(place, NAME) == b"0123456789"


def test_short_answers_without_end_fail_the_level_and_are_not_called_damage() -> None:
    place = store("shortanswers")
    put(place, NAME, b"0123456789")
    ShortAnswers.short = 99
    with pytest.raises(LevelFailed, match="9 bytes came, 10 were asked for"):
        get(place, NAME)


def test_where_a_move_does_not_replace_the_old_file_goes_first() -> None:
    place = store("oldmove")
    put(place, NAME, b"old")
    put(place, NAME, b"new")
    assert get(place, NAME) == b"new"
    assert place.list() == [NAME]


def test_a_move_that_fails_leaves_nothing_behind() -> None:
    place = store("full")
    with pytest.raises(LevelFailed, match="mv failed in 3 attempts") as caught:
        put(place, NAME, b"new")
    assert caught.value.errno == 28
    assert place.list() == []
    assert [path for path in place.fs.store if "image" in path] == []


def test_parts_below_what_s3_takes_are_refused() -> None:
    with pytest.raises(ValueError, match="part_bytes"):
        RemoteStore("s3://bucket/run", part_bytes=1000)


@pytest.mark.parametrize("name", ["", "../x", "a//b", ".hidden"])
def test_a_name_that_leads_elsewhere_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="no name for a store"):
        put(store("memory"), name, b"x")
