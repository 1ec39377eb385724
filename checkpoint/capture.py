"""Lazy capture: the state of one step flows into a buffer while the next forward and backward run.

`save` prepares a `Job` on the training thread; one capture thread carries it out: take a buffer, copy, compare, seal.
The fence lets the training thread lend a hand instead of only waiting. At most one job is under way.

    submit ── capture thread: buffer → header and objects → copies ──┬── compare with the samples → seal
    fence  ── training thread: helps with the copies ────────────────┘ (from here on parameters may change)
"""

import logging
import queue
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from resilient.checkpoint import copying
from resilient.checkpoint.image import header
from resilient.checkpoint.objects import Encoded
from resilient.checkpoint.plan import Look, Plan, capacity, data_start
from resilient.checkpoint.priority import run_behind
from resilient.checkpoint.tail import Tail
from resilient.errors import AgentLost, LevelFailed, ResilientError, SnapshotSkipped, TornCapture

_log = logging.getLogger("resilient")
_NICE = 10
_TELL_BYTES = 16 << 20  # how much is new before the agent is told to digest it


class Buffer(Protocol):
    """A buffer of the agent, mapped here: `view` is all of it, page aligned, at `address`."""

    id: int
    capacity: int
    view: memoryview
    address: int


class Buffers(Protocol):
    """Where images go. `AgentLink` is the real one. All methods are called by the capture thread."""

    def take(self, plan: Plan, capacity: int, timeout_s: float, given_up: Callable[[], bool]) -> Buffer: ...
    def begin(self, buffer: Buffer, step: int) -> None: ...
    def filled(self, buffer: Buffer, step: int, upto: int) -> None: ...
    def seal(self, buffer: Buffer, step: int, image_bytes: int, levels: tuple[str, ...]) -> None: ...
    def abort(self, buffer: Buffer | None, step: int, reason: str) -> None: ...


@dataclass(slots=True, eq=False)
class Job:
    """One image on its way. `copied` is set, whatever happens, once the training may change the tensors again."""

    step: int
    due: tuple[str, ...]
    plan: Plan
    look: Look | None
    samples: Any
    objects: Callable[[], Encoded]
    metadata: dict[str, str]
    work: copying.SharedWork | None = None
    working: threading.Event = field(default_factory=threading.Event)
    copied: threading.Event = field(default_factory=threading.Event)
    given_up: bool = False


class Capture:
    """The capture thread and its queue of one. `on_captured(step)` and `on_failed(step, error)` run on that thread."""

    def __init__(
        self,
        buffers: Buffers,
        *,
        threads: int,
        fence_timeout_s: float,
        on_captured: Callable[[int], None],
        on_failed: Callable[[int, ResilientError], None],
    ) -> None:
        self._buffers = buffers
        self._threads = threads
        self._timeout_s = fence_timeout_s
        self._on_captured = on_captured
        self._on_failed = on_failed
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._current: Job | None = None
        self._idle = threading.Event()
        self._idle.set()
        self._thread = threading.Thread(target=self._loop, name="resilient-capture", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Hand over a job; the fence of the one before has been passed. Returns at once."""
        self._current = job
        self._idle.clear()
        self._jobs.put(job)

    def fence(self) -> None:
        """Return when the tensors may change; help with the copies meanwhile. Called on the training thread.

        Waits at most `fence_timeout_s`; after that the snapshot is given up and the training goes on.
        """
        job = self._current
        if job is None:
            return
        deadline = time.monotonic() + self._timeout_s
        if job.working.wait(self._timeout_s) and job.work is not None:
            job.work.help()
        if not job.copied.wait(max(0.0, deadline - time.monotonic())):
            self._give_up(job)
        else:
            for device in job.plan.devices:
                device.fence()
        self._current = None

    def wait_idle(self, timeout_s: float) -> bool:
        """Wait until nothing is under way, sealing included."""
        return self._idle.wait(timeout_s)

    def close(self, timeout_s: float | None = None) -> None:
        """End the capture thread after the job under way, which is given up when the time is over."""
        self._jobs.put(None)
        self._thread.join(self._timeout_s if timeout_s is None else timeout_s)
        job = self._current
        if self._thread.is_alive() and job is not None:
            self._give_up(job)
            self._thread.join(1.0)

    def _give_up(self, job: Job) -> None:
        job.given_up = True
        if job.work is not None:
            job.work.stop()
        _log.warning("step %d: the copies were not done within %g s; snapshot given up", job.step, self._timeout_s)

    def _loop(self) -> None:
        run_behind(_NICE)
        while (job := self._jobs.get()) is not None:
            try:
                self._run(job)
            finally:
                job.working.set()
                job.copied.set()
                self._idle.set()

    def _run(self, job: Job) -> None:
        buffer: Buffer | None = None
        try:
            if job.look is None:
                job.look = job.plan.look()
            if job.plan.moved(job.look):
                job.samples = job.plan.fingerprints.take()
            tail = Tail(job.objects(), job.plan.data_bytes)
            begins = data_start(job.plan, tail.header_text)
            needed = capacity(job.plan, begins, tail.nbytes)
            buffer = self._buffers.take(job.plan, needed, self._timeout_s, lambda: job.given_up)
            self._fill(job, buffer, tail, begins)
        except ResilientError as error:
            self._fail(job, buffer, error)
        except Exception as error:  # a defect here must fail the snapshot by name, not end the thread silently
            _log.exception("capture of step %d", job.step)
            self._fail(job, buffer, LevelFailed(f"step {job.step}: capture failed: {type(error).__name__}: {error}"))

    def _fill(self, job: Job, buffer: Buffer, tail: Tail, begins: int) -> None:
        plan, step = job.plan, job.step
        data = buffer.view[begins:]
        self._buffers.begin(buffer, step)
        buffer.view[:begins] = header([plan.header_text, tail.header_text], job.metadata, begins)
        tail.write(data)
        for device in plan.devices:
            device.start(data)
        self._copy_host(job, buffer, begins)
        for device in plan.devices:
            device.finish()
        torn = plan.changed(job.samples, data)
        if torn:
            raise TornCapture(_torn_message(step, torn), tuple(torn))
        self._buffers.seal(buffer, step, begins + tail.end, job.due)
        self._on_captured(step)

    def _copy_host(self, job: Job, buffer: Buffer, begins: int) -> None:
        """Copy what lies in host memory, together with whoever helps; then the fence is open."""
        moves, ends = job.plan.moves(buffer.address + begins)
        only_host = not job.plan.devices

        sent = 0

        def progress(done: int) -> None:
            nonlocal sent
            upto = begins + ends[done - 1] if done else 0
            if only_host and upto >= sent + _TELL_BYTES and not job.given_up:
                sent = upto
                self._buffers.filled(buffer, job.step, upto)

        job.work = copying.SharedWork(moves, progress)
        job.working.set()
        try:
            copying.help_with_threads(job.work, self._threads)
            job.work.wait()
        finally:
            job.work.release()
        if job.given_up:
            raise SnapshotSkipped(f"step {job.step}: given up at the fence after {self._timeout_s:g} s")
        assert job.look is not None
        torn = job.plan.torn(job.look, job.plan.look())
        job.copied.set()
        if torn:
            raise TornCapture(_torn_message(job.step, torn), tuple(torn))

    def _fail(self, job: Job, buffer: Buffer | None, error: ResilientError) -> None:
        job.copied.set()
        # Whoever keeps the handle must not keep views of the buffer with it.
        traceback.clear_frames(error.__traceback__)
        self._on_failed(job.step, error)  # first, or the agent's echo of it might settle the handle with less
        try:
            self._buffers.abort(buffer, job.step, str(error))
        except AgentLost:
            _log.debug("step %d failed while the agent was gone", job.step)
        except Exception:  # without this thread every later save would wait for it in vain
            _log.exception("step %d failed, and its buffer could not be given back", job.step)


def _torn_message(step: int, names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return (
        f"step {step}: {', '.join(repr(name) for name in names[:3])}{more} changed while being copied, so the snapshot "
        "was dropped. Change parameters only inside optimizer.step(), or call checkpointer.fence() before you do"
    )
