"""Runs a function in several processes that form a process group, as a launcher would, and brings back what it returns.

The processes are forked from a server that has imported torch already, so that a world of four starts in a second.
"""

import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch", "torch.distributed.fsdp", "resilient.checkpoint.checkpointer", __name__])


def run(
    body: Callable[..., Any], world_size: int, *arguments: Any, nodes: Sequence[str] = (), deadline_s: float = 90
) -> list[Any]:
    """`body(*arguments)` in `world_size` processes with a gloo group; what each returns, by rank.

    A rank that is killed by a signal returns None, and takes the others with it, as under a launcher. Fails with the
    traceback of the first rank that raises, and when the time is over. `nodes[r]` is what rank r calls its node.
    """
    with tempfile.TemporaryDirectory(prefix="rs-") as folder:
        rows = [_start(body, rank, world_size, folder, arguments, nodes) for rank in range(world_size)]
        try:
            return _wait(rows, time.monotonic() + deadline_s)
        finally:
            for process, _ in rows:
                process.kill()
                process.join()


_Row = tuple[BaseProcess, "Connection[Any, Any]"]


def _start(
    body: Callable[..., Any], rank: int, world_size: int, folder: str, arguments: tuple[Any, ...], nodes: Sequence[str]
) -> _Row:
    ours, theirs = _context.Pipe()
    settings = {name: value for name, value in os.environ.items() if name.startswith(("RESILIENT_", "AWS_"))}
    if nodes:
        settings["RESILIENT_NODE"] = nodes[rank]
    process = _context.Process(
        target=_rank, args=(theirs, body, rank, world_size, f"file://{folder}/group", settings, arguments, sys.path)
    )
    process.start()
    theirs.close()
    return process, ours


def _rank(
    answer: "Connection[Any, Any]",
    body: Callable[..., Any],
    rank: int,
    world_size: int,
    method: str,
    settings: dict[str, str],
    arguments: tuple[Any, ...],
    path: list[str],
) -> None:
    os.environ.update(settings)
    sys.path[:] = path
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo", init_method=method, rank=rank, world_size=world_size, timeout=timedelta(seconds=40)
        )
        answer.send(("result", body(*arguments)))
    except BaseException:  # whatever it is belongs into the parent's report
        answer.send(("error", f"rank {rank}:\n{traceback.format_exc()}"))
    os._exit(0)


def _wait(rows: list[_Row], deadline: float) -> list[Any]:
    results: dict[int, Any] = {}
    errors: list[str] = []
    ranks = {answer: rank for rank, (_, answer) in enumerate(rows)}
    while ranks:
        # After a first error the others have little time to add theirs: they may wait for one that is gone.
        ready = wait(list(ranks), min(5.0, deadline - time.monotonic()) if errors else deadline - time.monotonic())
        if not ready:
            break
        for answer in ready:
            assert isinstance(answer, Connection)
            rank = ranks.pop(answer)
            try:
                kind, value = answer.recv()
            except EOFError:
                process = rows[rank][0]
                process.join(10)
                if process.exitcode == -signal.SIGKILL:
                    return [None] * len(rows)
                kind, value = "error", f"rank {rank} ended with exit code {process.exitcode}"
            if kind == "error":
                errors.append(value)
            else:
                results[rank] = value
    if errors or ranks:
        raise AssertionError("\n".join([*errors, *(f"rank {rank} did not end" for rank in ranks.values())]))
    return [results[rank] for rank in range(len(rows))]


def scratch(name: str) -> Path:
    """A folder that all ranks of a test may use."""
    return Path(os.environ["RESILIENT_RUNTIME_DIR"]) / name
