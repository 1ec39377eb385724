"""Launchers that run, with what they and their workers print: for the tests of `resilient run`."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Self

import pytest

JOB = Path(__file__).with_name("run_job.py")
DEADLINE_S = 100.0


class Launched:
    """A launcher that runs, in a session of its own, and what it and its workers print."""

    def __init__(self, folder: Path, *arguments: str, node: str = "n1", of: str = "resilient.launch.cli run") -> None:
        """`of`: the module that is the launcher, and what it is told first."""
        folder.mkdir(parents=True, exist_ok=True)
        self.node = node
        self.logs = folder / "logs"
        self._output = folder / f"{node}.txt"
        command = [sys.executable, "-m", *of.split(), "--log-dir", str(self.logs), *arguments]
        with self._output.open("ab") as output:
            self.process = subprocess.Popen(
                command,
                env=os.environ | {"RESILIENT_NODE": node, "OMP_NUM_THREADS": "1"},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def output(self) -> str:
        return self._output.read_text(errors="replace")

    def told(self, event: str) -> list[dict[str, Any]]:
        """The lines of one kind that this node's launcher has left."""
        path = self.logs / f"resilient-{self.node}.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [told for told in map(json.loads, lines) if told["event"] == event]

    def wait(self) -> int:
        try:
            return self.process.wait(DEADLINE_S)
        except subprocess.TimeoutExpired:
            pytest.fail(f"{self.node} did not end:\n{self.output}")

    def workers(self) -> list[int]:
        found = []
        for entry in Path("/proc").glob("[0-9]*/stat"):
            with suppress(OSError):
                if int(entry.read_text().rpartition(")")[2].split()[1]) == self.process.pid:
                    found.append(int(entry.parent.name))
        return found

    def leads(self) -> bool:
        """Whether rank 0 is one of its workers."""
        variables = [Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") for pid in self.workers()]
        return any(b"RANK=0" in each for each in variables)

    def kill(self) -> None:
        """As when the node goes: launcher and workers at once."""
        for pid in (self.process.pid, *self.workers()):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()


Start = Callable[..., Launched]
Meet = Callable[[str], "Nodes"]


@pytest.fixture
def start(runtime_dir: Path) -> Iterator[Start]:
    """Starts launchers, and ends what is left of them."""
    started: list[Launched] = []

    def begin(folder: Path, *arguments: str, **how: str) -> Launched:
        started.append(Launched(folder, *arguments, **how))
        return started[-1]

    yield begin
    for launched in started:
        launched.kill()
    for pid in agents(runtime_dir):
        os.kill(pid, signal.SIGKILL)


def agents(runtime_dir: Path) -> list[int]:
    """Processes of agents whose folders are in there."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            if b"resilient.checkpoint.agent" in (words := entry.read_bytes()) and str(runtime_dir).encode() in words:
                found.append(int(entry.parent.name))
    return found


def progress(folder: Path) -> list[tuple[int, int, int]]:
    """Life, world size and number of each step that rank 0 has done."""
    path = folder / "progress"
    lines = path.read_text().splitlines() if path.exists() else []
    return [(int(life), int(world), int(step)) for life, world, step in map(str.split, lines)]


class Nodes:
    """Starts the same command on nodes of one job, which meet at a rendezvous of its own: any node may be killed."""

    def __init__(self, folder: Path, count: str, start: Start) -> None:
        command = [sys.executable, "-m", "resilient.launch.cli", "rendezvous", "127.0.0.1:0"]
        self._server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert self._server.stderr is not None
        endpoint = self._server.stderr.readline().split()[-1]
        meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint, "--local-addr", "127.0.0.1"]
        sooner = ["--rdzv-conf", "keep_alive_interval=1,last_call_timeout=1"]
        self._options = ["--nnodes", count, "--nproc-per-node", "1", *meeting, *sooner]
        self._start = start
        self._folder = folder

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with self._server:
            self._server.terminate()
            assert self._server.wait(DEADLINE_S) == 0

    def start(self, node: str, *command: str) -> Launched:
        job = command or (str(JOB), str(self._folder))
        return self._start(self._folder, *self._options, *job, node=node)


@pytest.fixture
def meet(tmp_path: Path, start: Start) -> Iterator[Meet]:
    """`meet("1:3")`: nodes of a job that may have so many."""
    with ExitStack() as open_:
        yield lambda count: open_.enter_context(Nodes(tmp_path, count, start))


def wait_for(condition: Callable[[], bool], launched: Launched) -> None:
    end = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < end, launched.output
        time.sleep(0.02)


def a_script(folder: Path, text: str) -> str:
    path = folder / "script.py"
    path.write_text(text)
    return str(path)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def listens(port: int) -> bool:
    with suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
        return True
    return False
