"""The library itself as one of the methods: to memory, and to memory and the local disk.

Used as a job would use it: a Checkpointer over model and optimizer, `save` after each step; the fence is the
optimizer's own hook, so `updating` has nothing to add.
"""

import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import resilient
from bench.peers import PEERS, Memcpy, Method, Nothing
from bench.state import Training
from resilient.errors import SnapshotSkipped

MEMORY, LOCAL = "resilient, memory", "resilient, memory + local"
OURS = (MEMORY, LOCAL)


def policy(folder: Path, *, local: bool, parity: str | None = None) -> resilient.Policy:
    """Memory at every step and, if wished, the parity of a group of nodes or the local disk too; nothing durable."""
    return resilient.Policy(
        memory_every=1,
        local=str(folder / "local") if local else None,
        local_every=1,
        durable_every=0,
        parity=parity,
        agent_idle_s=30.0,  # if a measurement is cut short, its agent goes soon
    )


class Resilient(Method):
    """Our Checkpointer; a save is safe once it is durable at the lowest level asked for."""

    is_async = True

    def __init__(
        self, training: Training, folder: Path, *, fsynced: bool, local: bool, parity: str | None = None
    ) -> None:
        super().__init__(training, folder, fsynced=fsynced)
        self._level = "local" if local else "parity" if parity is not None else "memory"
        self._checkpointer = resilient.Checkpointer(
            f"file://{folder}/durable",
            state={"model": training.model, "optimizer": training.optimizer},
            policy=policy(folder, local=local, parity=parity),
        )

    def save(self, step: int) -> Future[float]:
        handle = self._checkpointer.save(step)
        safe = when_done(handle.durable(self._level))
        self._after.append(safe)
        return safe

    def finish(self) -> None:
        for future in self._after:
            if not isinstance(future.exception(), SnapshotSkipped):  # a skip is for the benchmark to count
                future.result()
        self._checkpointer.close()
        self._thread.shutdown()


def when_done(future: Future[Any]) -> Future[float]:
    """A future of the `time.perf_counter()` at which another one succeeded; it fails as that one does."""
    moment: Future[float] = Future()

    def pass_on(done: Future[Any]) -> None:
        error = done.exception()
        if error is None:
            moment.set_result(time.perf_counter())
        else:
            moment.set_exception(error)

    future.add_done_callback(pass_on)
    return moment


def _memory(training: Training, folder: Path, *, fsynced: bool) -> Method:
    return Resilient(training, folder, fsynced=fsynced, local=False)


def _local(training: Training, folder: Path, *, fsynced: bool) -> Method:
    return Resilient(training, folder, fsynced=fsynced, local=True)


METHODS: dict[str, Callable[..., Method]] = {
    "no checkpoint": Nothing,
    "one memcpy": Memcpy,
    MEMORY: _memory,
    LOCAL: _local,
    **PEERS,
}
