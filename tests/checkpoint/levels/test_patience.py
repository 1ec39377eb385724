"""Retries, pauses and time limits, on a file system that fails as told and with pauses that take no time."""

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from resilient.checkpoint.levels.patience import Calls, jittered_pause_s
from resilient.errors import DamagedImage, LevelFailed


class Scripted:
    """A synchronous file system whose `info` raises one error after the other, then answers."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)
        self.asked = 0

    def info(self, path: str) -> str:
        self.asked += 1
        if self.errors:
            raise self.errors.pop(0)
        return f"about {path}"


def calls(fs: Any, pauses: list[float] | None = None, **kwargs: Any) -> Calls:
    record = pauses.append if pauses is not None else lambda seconds: None
    return Calls(fs, "where", **{"retries": 3, "timeout_s": 5.0, "sleep": record, **kwargs})


def test_errors_are_met_with_more_attempts_after_longer_and_longer_pauses() -> None:
    fs = Scripted(OSError("a"), RuntimeError("b"), TimeoutError("c"))
    pauses: list[float] = []
    assert calls(fs, pauses).run("info", "x") == "about x"
    assert len(pauses) == 3
    assert all(0.1 * 2**number <= pause <= 0.2 * 2**number for number, pause in enumerate(pauses))


def test_after_the_last_attempt_the_level_has_failed_with_the_cause() -> None:
    fs = Scripted(*[OSError(28, "full")] * 9)
    with pytest.raises(LevelFailed, match="where: info failed in 4 attempts") as caught:
        calls(fs).run("info", "x")
    assert caught.value.errno == 28
    assert isinstance(caught.value.__cause__, OSError)
    assert fs.asked == 4


@pytest.mark.parametrize("error", [FileNotFoundError(), FileExistsError(), DamagedImage()])
def test_an_answer_is_not_a_failure(error: Exception) -> None:
    fs = Scripted(error)
    with pytest.raises(type(error)):
        calls(fs).run("info", "x")
    assert fs.asked == 1


@pytest.mark.parametrize("error", [PermissionError(), NotImplementedError(), ValueError(), FileNotFoundError()])
def test_what_will_not_change_is_not_tried_again(error: Exception) -> None:
    fs = Scripted(error)
    with pytest.raises(LevelFailed):
        calls(fs).do("info", "x")
    assert fs.asked == 1


def test_a_stop_ends_the_repeating() -> None:
    stop = threading.Event()
    fs = Scripted(*[OSError()] * 9)
    with pytest.raises(LevelFailed, match="2 attempts"):
        calls(fs, sleep=lambda seconds: stop.set()).retry("info", lambda: fs.info("x"), stop=stop)


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    gate = threading.Event()
    yield gate
    gate.set()


def test_a_synchronous_call_that_hangs_is_left_behind(gate: threading.Event) -> None:
    class Hanging:
        def info(self, path: str) -> None:
            gate.wait()

    with pytest.raises(LevelFailed, match="no answer to info within 0.05 s"):
        calls(Hanging(), timeout_s=0.05, retries=1).run("info", "x")


def test_an_asynchronous_call_that_hangs_is_cancelled() -> None:
    import asyncio

    from fsspec.asyn import AsyncFileSystem

    cancelled = threading.Event()

    class Hanging(AsyncFileSystem):  # type: ignore[misc]
        async def _info(self, path: str, **kwargs: Any) -> None:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                cancelled.set()
                raise

    with pytest.raises(LevelFailed, match="no answer to info within 0.05 s"):
        calls(Hanging(), timeout_s=0.05, retries=0).run("info", "x")
    assert cancelled.wait(5)


def test_pauses_grow_and_have_an_end() -> None:
    assert [jittered_pause_s(number, 1.0) for number in range(3)] == [0.2, 0.4, 0.8]
    assert jittered_pause_s(50, 1.0) == 10
    assert jittered_pause_s(0, 0.0) == 0.1
