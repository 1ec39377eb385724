"""Runs one measurement in a process of its own (or one a rank, by torchrun) and brings back what it returned.

A fresh process for each measurement gives every method the same heap, page tables and threads. A measurement that fails
or hangs becomes a `Failure` with its reason, which the report shows; the others go on.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
WORKER = Path(__file__).resolve().with_name("worker.py")


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Why a measurement has no result."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where measurements run: a folder on the disk that is measured, and where the logs of failures stay."""

    scratch: Path
    logs: Path

    def fresh(self) -> Path:
        """An empty folder, with nothing of the measurements before it on its way to the disk."""
        shutil.rmtree(self.scratch, ignore_errors=True)
        self.scratch.mkdir(parents=True)
        os.sync()
        return self.scratch

    def remove(self) -> None:
        """Leave nothing behind but results and logs."""
        shutil.rmtree(self.scratch, ignore_errors=True)
        for folder in (self.scratch.parent, self.logs):
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()


def launch(
    place: Place,
    target: str,
    arguments: dict[str, Any],
    *,
    ranks: int = 1,
    threads: int = 2,
    timeout_s: float = 900,
    launcher: Sequence[str] = (),
) -> dict[str, Any] | Failure:
    """Call `module:function` with `arguments` and a fresh `folder` in new processes; blocks until they have ended.

    `launcher`: Python's arguments for one that starts the processes, instead of torchrun or nothing.
    The function's result (JSON values) as rank 0 returned it. The folder's content is deleted afterwards. The output of
    a measurement that fails stays in the logs.
    """
    folder = place.fresh()
    result = folder.with_name(folder.name + ".result.json")
    result.unlink(missing_ok=True)
    command = [str(WORKER), target, json.dumps({**arguments, "folder": str(folder)}), str(result)]
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    starting = launcher or (torchrun if ranks > 1 else [])
    log = place.logs / f"{_slug(' '.join([target, arguments.get('method', '')]))}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    try:
        reason = _run([sys.executable, *starting, *command], _environment(threads), log, timeout_s)
        if reason is None and result.exists():
            measured: dict[str, Any] = json.loads(result.read_text())
            log.unlink()
            return measured
        return Failure(reason=f"{reason or 'no result'}; see {log}")
    finally:
        result.unlink(missing_ok=True)
        place.fresh()


def _environment(threads: int) -> dict[str, str]:
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([*paths, str(ROOT)]),
        "PYTHONSAFEPATH": "1",
        "OMP_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "passive",  # spinning threads make a step 10 times as long when anything else wants a core
        "MASTER_ADDR": "127.0.0.1",
    }


def _run(command: list[str], environment: dict[str, str], log: Path, timeout_s: float) -> str | None:
    """Why the command failed, or None. Ends the whole process group that it started when time is up."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return f"it did not end within {timeout_s:.0f} s"
        finally:
            _end_group(process)
    return None if status == 0 else f"exit status {status}: {_last_error(log)}"


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """Kill what is left of the group: the process itself after a timeout, or children that a peer left behind."""
    with suppress(ProcessLookupError):  # all have ended, as they should
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _last_error(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line and not line.startswith(" ")]
    return (errors or lines or ["no output"])[-1][:200]


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9_]+", "-", text.removeprefix("bench.")).strip("-")
