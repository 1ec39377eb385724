"""Starts an agent process for a folder and returns when it serves. Used by `client.py`; nothing else is done here.

Of several ranks that find no agent at the same time one starts it, under the folder's lock, and the others find it.
The process is a session of its own and no child of ours: it outlives the trainer, and never becomes its zombie. Where
RESILIENT_AGENT_STEP names an agent step (`step.py`), that one is asked to start it, outside our process tree.
"""

import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from resilient.checkpoint.agent import step
from resilient.checkpoint.agent.address import Address, drop_lock, make_folder, take_lock
from resilient.errors import LevelFailed, ResilientError

POLL_S = 0.02

log = logging.getLogger("resilient")


def start_agent(address: Address, answers: Callable[[], bool], deadline: float) -> None:
    """Return when an agent serves the folder, ours or another's. Blocks until `deadline` (monotonic) at most.

    `answers()` says whether one does. Raises LevelFailed when none could be started, UsageError for a folder that is
    not ours.
    """
    lock = _wait_for_lock(address, answers, deadline)
    if lock is None:
        return
    try:
        if not answers() and not _started_by_step(address, deadline):
            _spawn(address, deadline)
    finally:
        drop_lock(lock)


def _wait_for_lock(address: Address, answers: Callable[[], bool], deadline: float) -> int | None:
    while True:
        try:
            make_folder(address)
            lock = take_lock(address.lock)
        except FileNotFoundError:  # an agent that ends has just removed the folder
            lock = None
        if lock is not None:
            return lock
        if answers():
            return None
        if time.monotonic() > deadline:
            raise LevelFailed(
                f"no agent came up in {address.folder}, and another process holds its lock; see {address.log}"
            )
        time.sleep(POLL_S)


def _started_by_step(address: Address, deadline: float) -> bool:
    """Whether an agent step has started the agent. False where there is none: then the agent is to be ours."""
    socket_path = os.environ.get(step.VARIABLE)
    if not socket_path:
        return False
    left_s = _left_s(deadline)
    request = {
        "op": "start",
        "folder": str(address.folder),
        "executable": sys.executable,
        "environment": _environment(),
        "patience_s": left_s,
    }
    try:
        step.ask(Path(socket_path), request, within_s=left_s + 1.0)
    except (OSError, ResilientError) as error:  # LevelFailed is both
        log.warning(
            "the agent step at %s (%s) did not start an agent (%s); this process starts one itself, which may end "
            "with the job's training step",
            *(socket_path, step.VARIABLE, error),
        )
        return False
    return True


def _left_s(deadline: float) -> float:
    return max(1.0, deadline - time.monotonic())


def _spawn(address: Address, deadline: float) -> None:
    """Run the starter, which ends once its detached child serves."""
    left_s = _left_s(deadline)
    command = [sys.executable, "-m", "resilient.checkpoint.agent", str(address.folder), "--patience", f"{left_s:.1f}"]
    try:
        done = subprocess.run(
            command,
            env=_environment(),
            cwd="/",
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=left_s,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise LevelFailed(f"the agent could not be started ({error}); see {address.log}") from error
    if done.returncode != 0:
        raise LevelFailed(f"the agent could not be started: {done.stderr.strip()[-2000:]}")


def _environment() -> dict[str, str]:
    """Ours, with the import path of this process, so that the agent finds the same library."""
    path = os.pathsep.join(entry for entry in sys.path if os.path.isabs(entry))
    return {**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1"}
