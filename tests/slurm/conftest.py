"""One SLURM for all tests of the folder, and jobs as users submit them: by `resilient slurm`."""

import os
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.slurm import train
from tests.slurm.cluster import Cluster, processes_of

JOB = Path(train.__file__)
PATIENCE_S = 100.0


@dataclass(frozen=True, slots=True)
class Submitted:
    """A job in the queue, with what it has written so far."""

    cluster: Cluster
    number: str
    folder: Path

    def wait_for_step(self, step: int) -> None:
        self.wait(lambda: step in self.steps, f"step {step}")

    def wait_for_end(self) -> None:
        self.wait(lambda: self.state in ("COMPLETED", "FAILED", "CANCELLED", "NODE_FAIL"), "the end of the job")

    def resume(self) -> None:
        """Let a requeued job start, which would wait two minutes."""
        self.wait(lambda: self.state == "PENDING", "the job is requeued")
        self.cluster.start_soon(self.number)

    def wait(self, condition: Callable[[], object], what: str) -> None:
        end = time.monotonic() + PATIENCE_S
        while not condition():
            if time.monotonic() > end:
                pytest.fail(f"not within {PATIENCE_S:g} s: {what}\n{self.logs()}\n{self.cluster.logs()}")
            time.sleep(0.1)

    @property
    def state(self) -> str:
        return self.cluster.state(self.number)

    @property
    def lines(self) -> list[str]:
        path = self.folder / "steps.txt"
        return path.read_text().splitlines() if path.exists() else []

    @property
    def steps(self) -> list[int]:
        return [int(line.split()[1]) for line in self.lines if line.startswith("step")]

    @property
    def lives(self) -> list[dict[str, str]]:
        """Of each: `from` which level, `step`, `world`, `nodes`."""
        lives = [line.split() for line in self.lines if line.startswith("life")]
        return [{"from": life[3], "step": life[4], "world": life[6], "nodes": life[8]} for life in lives]

    @property
    def said(self) -> str:
        """What the batch shell said."""
        return (self.folder / f"slurm-{self.number}.txt").read_text()

    @property
    def result(self) -> str:
        return (self.folder / "result.txt").read_text()

    def logs(self) -> str:
        files = sorted(path for path in self.folder.rglob("*.txt"))
        return "\n".join(f"==> {path.relative_to(self.folder)}\n{path.read_text()[-3000:]}" for path in files)


Submit = Callable[..., Submitted]


@pytest.fixture(scope="package")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Three nodes, n1 to n3. What is missing of SLURM is an error that says how to install it."""
    cluster = Cluster(tmp_path_factory.mktemp("slurm"), nodes=3)
    scripts = sysconfig.get_path("scripts")
    cluster.environment["PATH"] = os.pathsep.join([scripts, cluster.environment.get("PATH", "")])
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        left = [pid for node in cluster.nodes for pid in processes_of(node)]
    assert left == []


@pytest.fixture
def submit(cluster: Cluster, tmp_path: Path) -> Iterator[Submit]:
    """`submit("--nodes", "2", steps=40)`: the job `train.py`, submitted with these options."""
    submitted: list[str] = []

    def run(*options: str, script: Path = JOB, steps: int = 40, pace_s: float = 0.0, below: str = ".") -> Submitted:
        folder = tmp_path / below
        arguments = [str(script), "--url", f"{folder}/durable", "--out", str(folder)]
        arguments += ["--steps", str(steps), "--pace-s", str(pace_s)]
        done = subprocess.run(
            [sys.executable, "-m", "resilient.launch.cli", "slurm", "--submit", *options, "--", *arguments],
            env=cluster.environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        submitted.append(done.stdout.strip())
        return Submitted(cluster, submitted[-1], tmp_path)

    yield run
    cluster.run("scancel", *submitted, check=False)


@pytest.fixture(scope="session")
def undisturbed() -> Callable[[int], str]:
    """The result of so many steps in this process, without SLURM and without us."""

    def digest(steps: int) -> str:
        model, optimizer = train.made(mib=0.01)
        for step in range(1, steps + 1):
            train.loss(model, step).backward()
            optimizer.step()
            optimizer.zero_grad()
        return train.digest_of(model)

    return digest
