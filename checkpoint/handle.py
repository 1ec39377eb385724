"""What `save` returns, and the register of all that is still awaited."""

import threading
from collections import deque
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress

from resilient.errors import RankFailed, ResilientError, SnapshotSkipped

LEVELS = ("memory", "parity", "local", "durable")


class SaveHandle:
    """The progress of one `save`.

    `captured` is resolved with the step when this rank's image is whole and checked; `durable(level)` when the
    snapshot is complete at that level, on every rank. Both fail with the error that ended them; a level that is not
    due at this step fails with SnapshotSkipped at once. Waiting is safe from any thread but holds up that thread.
    """

    def __init__(self, step: int, due: tuple[str, ...]) -> None:
        self.step = step
        self.levels = due
        self.captured: Future[int] = Future()
        self._durable: dict[str, Future[int]] = {level: Future() for level in due}
        if not due:
            self.captured.set_exception(self._skipped())

    def durable(self, level: str) -> Future[int]:
        """The future of one level: "memory", "parity", "local" or "durable". Raises KeyError for any other name."""
        if level in self._durable:
            return self._durable[level]
        if level not in LEVELS:
            raise KeyError(level)
        future: Future[int] = Future()
        future.set_exception(self._skipped())
        return future

    def _add(self, level: str) -> Future[int]:
        """The step is due at one more level, after all; the future of that."""
        if level not in self._durable:
            self._durable[level] = Future()
            self.levels = (*self.levels, level)
        return self._durable[level]

    def _skipped(self) -> SnapshotSkipped:
        return SnapshotSkipped(f"step {self.step} is not due at this level by the policy")


class Pending:
    """Handles whose snapshots are not settled yet. Any thread may call any method.

    Failures are also kept, at most some hundred, until `take_failures` reports them.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._handles: dict[int, SaveHandle] = {}
        self._failures: deque[str] = deque(maxlen=256)
        self.failed = 0

    def add(self, handle: SaveHandle) -> None:
        """Await this handle. What is still awaited for this step or a later one is superseded: the run went back."""
        for earlier in self.waiting():
            if earlier.step >= handle.step and not _is_settled(earlier):
                reason = f"step {earlier.step} was not safe yet when the run went back to step {handle.step}"
                self.fail("memory", earlier.step, SnapshotSkipped(reason))
        with self._lock:
            self._handles[handle.step] = handle

    def also(self, level: str, step: int) -> Future[int]:
        """Await a step at one more level, whether or not anything is awaited for it already."""
        with self._lock:
            handle = self._handles.get(step)
            if handle is None:
                handle = self._handles[step] = SaveHandle(step, (level,))
                handle.captured.set_result(step)
            return handle._add(level)

    def captured(self, step: int) -> None:
        handle = self._handles.get(step)
        if handle is not None:
            self._settle(handle.captured, step, None)

    def complete(self, level: str, step: int) -> None:
        """The snapshot is complete at a level. Repeats are ignored."""
        handle = self._handles.get(step)
        if handle is not None:
            self._settle(handle.durable(level), step, None)
            self._forget_settled(handle)

    def fail(self, level: str, step: int, error: ResilientError) -> None:
        """A level will never have this snapshot. Memory takes the other levels with it: they are written from it."""
        handle = self._handles.get(step)
        if handle is None:
            return
        # Its frames hold the buffer that was being filled: whoever keeps the handle would keep the memory mapped.
        error.__traceback__ = None
        for name in handle.levels if level == "memory" else (level,):
            self._settle(handle.durable(name), step, error)
        if level == "memory" and not isinstance(error, RankFailed):
            self._settle(handle.captured, step, error)
        self._note(f"step {step} at level {level}: {error}")
        self._forget_settled(handle)

    def fail_all(self, error: ResilientError) -> None:
        """Whatever is still awaited will not come any more."""
        for step in list(self._handles):
            self.fail("memory", step, error)

    def take_failures(self) -> list[str]:
        """The failures since the last call, oldest first."""
        with self._lock:
            taken = list(self._failures)
            self._failures.clear()
        return taken

    def waiting(self) -> list[SaveHandle]:
        with self._lock:
            return list(self._handles.values())

    @staticmethod
    def _settle(future: "Future[int]", step: int, error: ResilientError | None) -> None:
        # Without the lock: a future's callbacks run in here and may call us again.
        with suppress(InvalidStateError):
            if error is None:
                future.set_result(step)
            else:
                future.set_exception(error)

    def _note(self, text: str) -> None:
        with self._lock:
            self.failed += 1
            self._failures.append(text)

    def _forget_settled(self, handle: SaveHandle) -> None:
        if _is_settled(handle):
            with self._lock:
                if self._handles.get(handle.step) is handle:  # a later attempt at the step may have come meanwhile
                    del self._handles[handle.step]


def _is_settled(handle: SaveHandle) -> bool:
    """Whether nothing more is to come of it."""
    return handle.captured.done() and all(handle.durable(level).done() for level in handle.levels)
