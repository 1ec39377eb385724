"""The thread that carries a group's collectives out, one after the other, and the handle that callers wait on."""

import queue
import threading
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from resilient.errors import CollectiveFailed

_END_S = 5.0


class Work(dist.Work):
    """A collective under way; its value is `tensors`. Each `wait` after a failure raises the same error."""

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        super().__init__()
        self._tensors = tensors
        self._done = threading.Event()
        self._error: Exception | None = None
        # C++ callers (DDP) take an exception that is set for a value; one that is raised in a callback they understand.
        self._base: torch.futures.Future[None] = torch.futures.Future()
        self._future = self._base.then(self._value)

    def finish(self, error: Exception | None = None) -> None:
        """By the worker, once."""
        self._error = error
        self._done.set()
        self._base.set_result(None)

    def carry_out(self, call: Callable[[], None]) -> None:
        """Call, and finish with what it raises."""
        try:
            call()
        except Exception as error:
            self.finish(error)
        else:
            self.finish()

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        """Blocks until it is done; `timeout` 0: as long as the group's. Raises CollectiveFailed, CollectiveMismatch."""
        if not self._done.wait(timeout.total_seconds() or None):
            raise TimeoutError(f"the collective is not done after {timeout}")
        if self._error is not None:
            raise self._error
        return True

    def synchronize(self) -> None:
        self.wait()

    def is_completed(self) -> bool:
        return self._done.is_set()

    def is_success(self) -> bool:
        return self._done.is_set() and self._error is None

    def exception(self) -> Exception | None:
        return self._error

    def result(self) -> list[torch.Tensor]:
        return self._tensors

    def get_future(self) -> torch.futures.Future[Any]:
        return self._future

    def _value(self, _: object) -> list[torch.Tensor]:
        if self._error is not None:
            raise self._error
        return self._tensors


class Worker:
    """Runs calls in the order in which they were submitted. The thread starts with the first."""

    def __init__(self, name: str) -> None:
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._lock = threading.Lock()
        self._closed = False

    def submit(self, call: Callable[[], None], tensors: list[torch.Tensor]) -> Work:
        """The call's exception becomes the work's. Raises CollectiveFailed after `close`."""
        work = Work(tensors)
        self.put(partial(work.carry_out, call))
        return work

    def put(self, call: Callable[[], None]) -> None:
        """The same for a call that raises nothing. Raises CollectiveFailed after `close`."""
        with self._lock:
            if self._closed:
                raise CollectiveFailed("the process group is closed; make a new one")
            if not self._thread.is_alive():
                self._thread.start()
            self._calls.put(call)

    def close(self) -> None:
        """Waits for a few seconds for what is under way. Again is nothing."""
        with self._lock:
            closed, self._closed = self._closed, True
            self._calls.put(None)
        if not closed and self._thread.is_alive():
            self._thread.join(_END_S)

    def _run(self) -> None:
        while (call := self._calls.get()) is not None:
            call()
            del call  # a thread that waits for its next call keeps nobody's tensors
