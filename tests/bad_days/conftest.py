"""What bad days need: forked trainers to kill, the agents of a test to find, and a disk that is full on purpose."""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from resilient.checkpoint.checkpointer import Checkpointer
from resilient.policy import Policy

_CHECKOUT = Path(__file__).resolve().parents[2]
_LONG_S = 60.0
torch.set_num_threads(1)  # the trainings here are tiny, and two threads for one of them only get in each other's way


@pytest.fixture(scope="session")
def zygote() -> Iterator["subprocess.Popen[str]"]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
    command = [sys.executable, str(Path(__file__).with_name("zygote.py")), str(_CHECKOUT)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as made:
        assert made.stdout is not None
        assert made.stdin is not None
        assert made.stdout.readline() == "ready\n"
        yield made
        made.stdin.close()


@dataclass
class Child:
    """One forked process. `told` is what it has said so far by `jobs.tell`."""

    pid: int
    pidfd: int
    folder: Path

    @property
    def told(self) -> list[str]:
        path = self.folder / "told"
        return path.read_text().splitlines() if path.exists() else []

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text(errors="replace")

    @property
    def lives(self) -> bool:
        return not select.select([self.pidfd], [], [], 0)[0]

    def kill(self, number: int = signal.SIGKILL) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, number)
        if number == signal.SIGKILL:
            self.wait()

    def wait(self, timeout_s: float = _LONG_S) -> None:
        assert select.select([self.pidfd], [], [], timeout_s)[0], f"still running after {timeout_s:g} s:\n{self.log}"

    def until_told(self, word: str, timeout_s: float = _LONG_S) -> None:
        """Return once it has said a line that begins with `word`."""
        end = time.monotonic() + timeout_s
        while not any(line.startswith(word) for line in self.told):
            assert self.lives, f"it ended without saying {word!r}:\n{self.log}"
            assert time.monotonic() < end, (
                f"not said within {timeout_s:g} s: {word!r}; told {self.told[-5:]}\n{self.log}"
            )
            time.sleep(0.005)

    def numbers(self, word: str) -> list[int]:
        """The numbers that it has said after a word."""
        return [int(line.split()[1]) for line in self.told if line.startswith(f"{word} ")]

    def kill_after(self, seconds: float) -> None:
        """Kill it at a moment that the test has drawn."""
        select.select([self.pidfd], [], [], seconds)
        self.kill()

    def outcome(self, timeout_s: float = _LONG_S) -> dict[str, Any]:
        """{"value": what it returned} or {"error": class, "message": text}; waits for its end."""
        self.wait(timeout_s)
        path = self.folder / "result"
        assert path.exists(), f"it died without a result:\n{self.log}"
        answer: dict[str, Any] = json.loads(path.read_text())
        return answer

    def value(self, timeout_s: float = _LONG_S) -> Any:
        answer = self.outcome(timeout_s)
        assert "value" in answer, f"{answer}\n{self.log}"
        return answer["value"]


@dataclass
class Trainers:
    """Starts functions of `jobs.py` in processes of their own."""

    zygote: "subprocess.Popen[str]"
    folder: Path
    started: list[Child] = field(default_factory=list)

    def start(self, function: str, **arguments: Any) -> Child:
        folder = self.folder / f"child_{len(self.started)}"
        folder.mkdir()
        request = {
            "function": f"tests.bad_days.jobs:{function}",
            "arguments": arguments,
            "environment": {**os.environ, "BAD_DAY_FOLDER": str(folder)},
            "log": str(folder / "log"),
            "result": str(folder / "result"),
        }
        assert self.zygote.stdin is not None
        assert self.zygote.stdout is not None
        self.zygote.stdin.write(json.dumps(request) + "\n")
        self.zygote.stdin.flush()
        pid = int(self.zygote.stdout.readline())
        child = Child(pid, os.pidfd_open(pid), folder)
        self.started.append(child)
        return child

    def ranks(self, function: str, **arguments: Any) -> list[Child]:
        """The same function on the two ranks of a gloo world."""
        meeting = self.folder / f"meeting_{len(self.started)}"
        return [self.start(function, rank=rank, world_size=2, meeting=str(meeting), **arguments) for rank in range(2)]

    def end(self) -> None:
        for child in self.started:
            if child.lives:
                child.kill()
            os.close(child.pidfd)


@pytest.fixture
def trainers(zygote: "subprocess.Popen[str]", tmp_path: Path, agents: "Agents") -> Iterator[Trainers]:
    made = Trainers(zygote, tmp_path)
    yield made
    made.end()


@dataclass
class Agents:
    """The agent processes of this test, found by the folder that their command line names."""

    runtime_dir: Path

    def pids(self) -> list[int]:
        return [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if self._is_ours(pid)]

    def one(self) -> int:
        (pid,) = self.pids()
        return pid

    def signal(self, number: int, pids: list[int] | None = None) -> None:
        """Send a signal to all of them; a killed one is gone on return."""
        for pid in self.pids() if pids is None else pids:
            with contextlib.suppress(ProcessLookupError):
                fd = os.pidfd_open(pid)
                try:
                    signal.pidfd_send_signal(fd, number)
                    if number == signal.SIGKILL:
                        assert select.select([fd], [], [], _LONG_S)[0]
                finally:
                    os.close(fd)

    def log(self) -> str:
        return "\n".join(path.read_text(errors="replace") for path in self.runtime_dir.rglob("agent.log*"))

    def shared_memory(self, pid: int) -> list[Path]:
        """The agent's memory files, as paths that can be opened: those of huge pages, and others."""
        found = sorted(Path(f"/proc/{pid}/fd").iterdir(), key=lambda path: int(path.name))
        return [path for path in found if str(path.resolve()).startswith(("/resilient-rank", "/memfd:resilient-rank"))]

    def _is_ours(self, pid: int) -> bool:
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes()
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return False
        return b"resilient.checkpoint.agent" in words and os.fsencode(self.runtime_dir) in words and state not in "ZX"


@pytest.fixture
def agents(runtime_dir: Path) -> Iterator[Agents]:
    found = Agents(runtime_dir)
    yield found
    found.signal(signal.SIGKILL)


Make = Callable[..., Checkpointer]


@pytest.fixture
def checkpointer(agents: Agents) -> Iterator[Make]:
    """`checkpointer(url, state, **policy)`, closed at the end of the test; its agent is killed then in any case."""
    made: list[Checkpointer] = []

    def make(url: object, state: dict[str, object], **policy: Any) -> Checkpointer:
        one = Checkpointer(str(url), state, Policy(**{"write_timeout_s": 20.0, **policy}))
        made.append(one)
        return one

    yield make
    agents.signal(signal.SIGKILL)
    for one in made:
        one.close(keep_memory=True)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)], check=True)
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)
