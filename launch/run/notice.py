"""Signals to the launcher, kept until its loop takes them; while it waits for other nodes they end the wait at once."""

import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import FrameType


class StopRequested(BaseException):
    """A signal came while the launcher waited for other nodes. Not an Exception: torch's retries must not catch it."""


class Notice:
    """The signals of one launcher, on its main thread. `install` again after whatever else sets handlers.

    `interrupts`: of two, workers are ended at once.
    """

    def __init__(self, signals: Iterable[signal.Signals]) -> None:
        self._signals = tuple(signals)
        self._pending: list[signal.Signals] = []
        self._waiting = False
        self.interrupts = 0
        self.first: signal.Signals | None = None

    def install(self) -> None:
        for number in self._signals:
            signal.signal(number, self._handle)

    def take(self) -> signal.Signals | None:
        """The oldest signal that was not taken yet."""
        return self._pending.pop(0) if self._pending else None

    @contextmanager
    def interrupting(self) -> Iterator[None]:
        """In here a signal raises StopRequested, also one that came before."""
        self._waiting = True
        try:
            if self._pending:
                raise StopRequested
            yield
        finally:
            self._waiting = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        got = signal.Signals(number)
        self.first = self.first or got
        self.interrupts += {signal.SIGINT: 1, signal.SIGQUIT: 2}.get(got, 0)
        self._pending.append(got)
        if self._waiting:
            self._waiting = False
            raise StopRequested
