"""Calls to a remote file system, each with a time limit, repeated a bounded number of times.

Client libraries retry on their own terms (a stalled S3 connection was seen to hold one call for 100 s in spite of a
read timeout of 4 s), so the limit and the count are kept here. Nothing here knows what a call means; whether it may
be repeated is for the caller to say by handing it over.
"""

import asyncio
import errno
import logging
import random
import time
from collections.abc import Callable
from queue import Empty, SimpleQueue
from threading import Event, Thread
from typing import Any, TypeVar

from resilient.errors import LevelFailed, ResilientError

logger = logging.getLogger(__name__)
T = TypeVar("T")

FIRST_PAUSE_S = 0.2
LONGEST_PAUSE_S = 10.0
Answers = tuple[type[Exception], ...]
ANSWERS: Answers = (FileNotFoundError, FileExistsError)  # these say how things are: neither retried nor wrapped
_FINAL = (*ANSWERS, PermissionError, NotImplementedError, ValueError, TypeError)  # repeating these brings nothing


def jittered_pause_s(attempt: int, fraction: float) -> float:
    """The pause after the failed attempt number `attempt` (from 0): exponential; `fraction` in [0, 1) is the chance."""
    longest = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * float(2**attempt))
    return longest * (0.5 + 0.5 * fraction)


class Calls:
    """Calls on one fsspec file system. Any thread; every method blocks for a bounded time.

    `run` takes at most (retries + 1) × (timeout_s + LONGEST_PAUSE_S). An attempt that runs into its limit is
    cancelled where the file system is asynchronous; a synchronous one is left behind in a daemon thread, for it
    cannot be stopped.
    """

    def __init__(
        self, fs: Any, where: str, *, retries: int, timeout_s: float, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        self.fs = fs
        self.where = where
        self.retries = retries
        self.timeout_s = timeout_s
        self._sleep = sleep

    def once(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """One attempt at a method of the file system, by its public name. Raises what it raises, or TimeoutError."""
        coroutine = getattr(self.fs, f"_{method}", None)
        if getattr(self.fs, "async_impl", False) and asyncio.iscoroutinefunction(coroutine):
            return self._on_loop(method, coroutine, args, kwargs)
        return self.timed(method, getattr(self.fs, method), *args, **kwargs)

    def run(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """A method that asks, with retries; see `retry`."""
        return self.retry(method, lambda: self.once(method, *args, **kwargs))

    def do(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """A method that changes something, with retries; whatever it raises is a failure."""
        return self.retry(method, lambda: self.once(method, *args, **kwargs), answers=())

    def retry(self, what: str, attempt: Callable[[], T], *, stop: Event | None = None, answers: Answers = ANSWERS) -> T:
        """Repeat `attempt` until it returns. `stop`, once set, ends the repeating.

        Raises LevelFailed when it gives up, with the last error as cause. The errors in `answers`, and this library's
        own, pass through at once.
        """
        for number in range(self.retries + 1):
            try:
                return attempt()
            except Exception as error:  # each client library raises its own kinds; all of them mean "not done"
                if isinstance(error, (*answers, ResilientError)):
                    raise
                last = number == self.retries or (stop is not None and stop.is_set())
                if last or isinstance(error, _FINAL):
                    raise self._failed(what, error, number + 1) from error
                pause_s = jittered_pause_s(number, random.random())
                logger.info("%s: %s failed (%s); again in %.1f s", self.where, what, _told(error), pause_s)
                self._sleep(pause_s)
        raise AssertionError("unreachable: the last attempt returns or raises")

    def timed(self, what: str, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """Call a blocking function with the time limit; TimeoutError when it is over."""
        outcome: SimpleQueue[tuple[T | None, BaseException | None]] = SimpleQueue()

        def call() -> None:
            try:
                outcome.put((function(*args, **kwargs), None))
            except BaseException as error:  # carried over to the caller's thread, whatever it is
                outcome.put((None, error))

        Thread(target=call, name=f"resilient-{what}", daemon=True).start()
        try:
            result, error = outcome.get(timeout=self.timeout_s)
        except Empty:
            raise TimeoutError(errno.ETIMEDOUT, f"no answer to {what} within {self.timeout_s:g} s") from None
        if error is not None:
            raise error
        return result  # type: ignore[return-value]

    def _on_loop(self, what: str, coroutine: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        future = asyncio.run_coroutine_threadsafe(coroutine(*args, **kwargs), self.fs.loop)
        try:
            return future.result(self.timeout_s)
        except TimeoutError as error:
            future.cancel()  # cancels the coroutine on its loop too
            raise TimeoutError(errno.ETIMEDOUT, f"no answer to {what} within {self.timeout_s:g} s") from error

    def _failed(self, what: str, error: Exception, attempts: int) -> LevelFailed:
        number = getattr(error, "errno", None) or (errno.EACCES if isinstance(error, PermissionError) else errno.EIO)
        advice = "look at the store's service and the network; the next save tries again"
        if isinstance(error, PermissionError):
            advice = "check the credentials and the rights they have"
        elif isinstance(error, FileNotFoundError):
            advice = "check that the bucket or folder above it exists"
        return LevelFailed(number, f"{self.where}: {what} failed in {attempts} attempts ({_told(error)}); {advice}")


def _told(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error)[:200]}"
