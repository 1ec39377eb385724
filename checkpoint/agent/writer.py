"""One thread that writes a level's images, one after the other, and what to do when it hangs.

A write that takes longer than its timeout is abandoned: it counts as failed, its thread is left behind with the order
to publish nothing, and a fresh thread goes on. No more than a few threads are ever left behind; from then on the level
is down, and every job fails at once until one of them comes back. The clock is given, so that tests need not wait.
"""

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from resilient.errors import LevelFailed, ResilientError

MAX_ABANDONED = 2
MAX_QUEUED = 64


class Cancelled(Exception):
    """Raised inside a write that has been given up. Never leaves this package."""


@dataclass(eq=False, slots=True, kw_only=True)
class Job:
    """One piece of work for a level. `run` is called on the writing thread with `is_cancelled`.

    `done` is called once: on the writing thread, or, for a job that is abandoned or refused, on the thread that finds
    it so. `name` says in messages what the job does; no two jobs of the same name run side by side.
    """

    name: str
    run: Callable[[Callable[[], bool]], None]
    done: Callable[[ResilientError | None], None]
    _cancelled: threading.Event = field(default_factory=threading.Event)

    def cancel(self) -> None:
        """The result is not wanted any more: end with the next chunk, publish nothing."""
        self._cancelled.set()

    @property
    def is_cancelled(self) -> bool:
        return self._cancelled.is_set()


class LevelWriter:
    """The writing thread of one level. Methods may be called from any thread and return at once."""

    def __init__(self, level: str, timeout_s: float, clock: Callable[[], float]) -> None:
        self.level = level
        self.timeout_s = timeout_s
        self._clock = clock
        self._changed = threading.Condition()
        self._queue: deque[Job] = deque()
        self._running: Job | None = None
        self._running_since = 0.0
        self._thread: threading.Thread | None = None
        self._abandoned: list[Job] = []
        self._ended = False

    def submit(self, job: Job) -> None:
        """Queue a job; refuse it at once (through `done`) when the level is down or too far behind."""
        with self._changed:
            reason = self._refusal(job)
            if reason is None:
                self._queue.append(job)
                self._start_thread()
                self._changed.notify()
        if reason is not None:
            job.done(LevelFailed(f"{job.name} was not begun at level {self.level}: {reason}"))

    def check(self) -> None:
        """Abandon the running job if its time is over. Called every now and then."""
        with self._changed:
            job = self._running
            if job is None or self._clock() - self._running_since < self.timeout_s:
                return
            job.cancel()
            self._abandoned.append(job)
            self._running, self._thread = None, None
            refused = self._take_queue() if self._is_down() else []
            if self._queue:
                self._start_thread()
        job.done(LevelFailed(f"{job.name} took more than {self.timeout_s:g} s at level {self.level} and was given up"))
        for each in refused:
            each.done(LevelFailed(f"{each.name} was not begun at level {self.level}: {self._down_reason()}"))

    @property
    def pending(self) -> int:
        """Jobs that are queued or running, without those that were given up."""
        with self._changed:
            return len(self._queue) + (self._running is not None)

    def stop(self) -> None:
        """Begin nothing more and end the thread after the job it is at. Does not wait."""
        with self._changed:
            self._ended = True
            self._queue.clear()
            if self._running:
                self._running.cancel()
            self._changed.notify_all()

    def _refusal(self, job: Job) -> str | None:
        if self._ended:
            return "the agent is ending"
        if self._is_down():
            return self._down_reason()
        if any(each.name == job.name for each in self._abandoned):
            return "an earlier try of the same write hangs and may still come back"
        if len(self._queue) >= MAX_QUEUED:
            return f"{MAX_QUEUED} writes are waiting already; the level is too slow for how often it is written"
        return None

    def _is_down(self) -> bool:
        return len(self._abandoned) >= MAX_ABANDONED

    def _down_reason(self) -> str:
        return f"the level is down, {MAX_ABANDONED} writes hang; it is used again when one of them ends"

    def _take_queue(self) -> list[Job]:
        taken = list(self._queue)
        self._queue.clear()
        return taken

    def _start_thread(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name=f"write-{self.level}", daemon=True)
            self._thread.start()

    def _work(self) -> None:
        while (job := self._next()) is not None:
            error = _outcome(job)
            with self._changed:
                if job in self._abandoned:
                    self._abandoned.remove(job)
                    return
                self._running = None
            job.done(error)
            del job, error  # they hold the memory of an image

    def _next(self) -> Job | None:
        with self._changed:
            while not self._queue:
                if self._ended or self._thread is not threading.current_thread():
                    return None
                self._changed.wait()
            self._running, self._running_since = self._queue.popleft(), self._clock()
            return self._running


def _outcome(job: Job) -> ResilientError | None:
    """Run a job; the error that it ended with."""
    try:
        if not job.is_cancelled:
            job.run(lambda: job.is_cancelled)
    except ResilientError as error:
        return error
    except Cancelled:
        pass
    except Exception as error:  # a store of others may raise anything; it must fail this write and not the agent
        return LevelFailed(f"{job.name}: {type(error).__name__}: {error}")
    return LevelFailed(f"{job.name} was given up") if job.is_cancelled else None
