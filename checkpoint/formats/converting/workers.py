"""Processes that carry out the tasks of a conversion, and the loop that gives them out.

Each worker opens the source itself and has a pipe to the parent. A worker whose parent is gone ends: its pipe ends, and
between chunks it looks. One that fails, or dies, ends the conversion. With one worker all is done in this process.
"""

import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from resilient.checkpoint.catalog.catalog import File
from resilient.checkpoint.formats.converting.filling import Filler, parent_lives
from resilient.checkpoint.formats.converting.tasks import Done, Schedule, Stream, Task
from resilient.checkpoint.formats.folder import Folder
from resilient.checkpoint.formats.source import Reference, Source
from resilient.errors import LevelFailed, ResilientError, UsageError

Opener = Callable[[Reference], Source]
_GRACE_S = 5.0  # for a worker that was told to end; then it is killed


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What a worker needs to know from the start. It pickles. `files`: those of the source's catalog."""

    open_source: Opener
    reference: Reference
    files: tuple[File, ...]
    target_url: str
    token: str


@dataclass(frozen=True, slots=True)
class Failure:
    """What a worker tells instead of Done. `error` None: one that nobody expects, as text."""

    error: Exception | None
    text: str


def run_here(schedule: Schedule, source: Source, job: Job, done: Callable[[Done], None]) -> None:
    """Carry out all tasks in this process. Raises what they raise."""
    target = Folder(job.target_url)
    filler = Filler(source, target, job.token)
    try:
        while (task := schedule.next()) is not None:
            result = filler.run(task)
            schedule.done(task, result)
            done(result)
    finally:
        filler.close()
        target.close()


def run_in_workers(schedule: Schedule, count: int, job: Job, done: Callable[[Done], None]) -> None:
    """Carry out all tasks in `count` new processes. Raises the first failure; then none of them runs any longer."""
    with _workers(count, job) as pipes:
        busy: dict[Connection, Task] = {}
        while True:
            for pipe in [pipe for pipe in pipes if pipe not in busy]:
                task = schedule.next()
                if task is None:
                    break
                busy[pipe] = task
                with suppress(OSError):  # its end is seen below
                    pipe.send(task)
            if not busy:
                break
            for ready in wait(list(busy)):
                assert isinstance(ready, Connection)
                result = _result(ready, busy[ready], pipes[ready])
                schedule.done(busy.pop(ready), result)
                done(result)


def _result(pipe: Connection, task: Task, process: BaseProcess) -> Done:
    try:
        result: Done | Failure = pipe.recv()
    except (EOFError, OSError):
        process.join(_GRACE_S)
        raise LevelFailed(
            f"a worker ended (exit code {process.exitcode}) while it wrote {_name(task)}; if the system was short of "
            "memory, use fewer workers"
        ) from None
    if isinstance(result, Done):
        return result
    if result.error is not None:
        raise result.error
    raise RuntimeError(f"a worker failed while it wrote {_name(task)}:\n{result.text}")


def _name(task: Task) -> str:
    return task.whole.name if isinstance(task, Stream) else task.name


@contextmanager
def _workers(count: int, job: Job) -> Iterator[dict[Connection, BaseProcess]]:
    """So many processes, by their pipes; ended and gone when this is left."""
    context = multiprocessing.get_context("spawn")  # a fork would copy what threads hold
    pipes: dict[Connection, BaseProcess] = {}
    try:
        for _ in range(count):
            ours, theirs = context.Pipe()
            process: BaseProcess = context.Process(
                target=_work, args=(theirs, job, os.getpid()), daemon=True, name="resilient-convert"
            )
            pipes[ours] = process
            with _no_interrupt():
                process.start()
            theirs.close()
        yield pipes
        for pipe in pipes:
            pipe.close()
        for process in pipes.values():
            process.join(_GRACE_S)
    finally:
        for pipe, process in pipes.items():
            pipe.close()
            _end(process)


def _end(process: BaseProcess) -> None:
    with suppress(ValueError, AssertionError):  # never started
        process.terminate()
        process.join(_GRACE_S)
        if process.is_alive():
            process.kill()
            process.join()


@contextmanager
def _no_interrupt() -> Iterator[None]:
    """A process that is started here gets no SIGINT, ever: Ctrl-C is for the parent, which ends it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _work(pipe: Connection, job: Job, parent: int) -> None:
    """A worker: tasks in, results out, until the pipe ends."""
    target = Folder(job.target_url)
    try:
        with job.open_source(job.reference) as source:
            if tuple(source.catalog.files) != job.files:
                raise UsageError(f"{job.reference.url} changed while it was converted: name a step that stays")
            filler = Filler(source, target, job.token, parent_lives(parent))
            while True:
                pipe.send(filler.run(pipe.recv()))
    except EOFError:
        return
    except Exception as error:
        expected = isinstance(error, ResilientError | OSError)
        with suppress(OSError):
            pipe.send(Failure(_plain(error) if expected else None, traceback.format_exc()))
    finally:
        target.close()


def _plain(error: Exception) -> Any:
    """The error as it travels: without what does not pickle."""
    error.__cause__ = error.__context__ = None
    return error
