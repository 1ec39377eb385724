"""Two real MPIs. Both bring a program `mpirun`, so each lies in a folder of its own within this environment."""

import os
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.bad_days.conftest import Agents

ROOT = Path(__file__).resolve().parents[2]
LONG_S = 100.0
LIBRARIES = {"mpich": "libmpi.so.12", "openmpi": "libmpi.so.40"}
# For Open MPI: tests may run as root and with more ranks than cores, and need no network.
OPTIONS = {
    "mpich": (),
    "openmpi": (
        *("--allow-run-as-root", "--oversubscribe", "--bind-to", "none"),
        *("--mca", "osc", "^ucx", "--mca", "pml", "ob1", "--mca", "btl", "self,sm"),
    ),
}
PYTHON = sys.executable
RESILIENT = str(Path(sysconfig.get_path("scripts")) / "resilient")


@dataclass(frozen=True, slots=True, kw_only=True)
class Mpi:
    """One MPI: its mpirun, and the variables that have mpi4py load its library."""

    name: str
    folder: Path

    def start(self, *command: object, ranks: int = 2, **variables: str) -> "subprocess.Popen[str]":
        """mpirun -n ranks command; further words may begin other programs (`:`). Its output is to be read."""
        return subprocess.Popen(
            [str(self.folder / "bin" / "mpirun"), *OPTIONS[self.name], "-n", str(ranks), *map(str, command)],
            env=self.environment(**variables),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )

    def run(self, *command: object, ranks: int = 2, **variables: str) -> "subprocess.CompletedProcess[str]":
        """As `start`, to its end."""
        with self.start(*command, ranks=ranks, **variables) as process:
            return finish(process)

    def environment(self, **variables: str) -> dict[str, str]:
        library = str(self.folder / "lib" / LIBRARIES[self.name])
        return {**os.environ, "MPI4PY_LIBMPI": library, "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1", **variables}


def finish(process: "subprocess.Popen[str]") -> "subprocess.CompletedProcess[str]":
    """Its end, and what it has printed; killed when it takes too long."""
    try:
        out, err = process.communicate(timeout=LONG_S)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)  # mpirun ends its ranks then
        out, err = process.communicate(timeout=LONG_S)
        pytest.fail(f"mpirun did not end within {LONG_S:g} s:\n{out}\n{err}")
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def find(name: str) -> Mpi:
    folder = Path(sys.prefix) / name
    assert (folder / "bin" / "mpirun").exists(), f"there is no {folder}: `make test` installs it"
    return Mpi(name=name, folder=folder)


@pytest.fixture(params=["mpich", "openmpi"])
def mpi(request: pytest.FixtureRequest) -> Mpi:
    return find(request.param)


@pytest.fixture
def mpich() -> Mpi:
    return find("mpich")


@pytest.fixture
def agents(runtime_dir: Path) -> Iterator[Agents]:
    """The agents of this test; those that are left are killed at its end."""
    found = Agents(runtime_dir)
    yield found
    found.signal(signal.SIGKILL)
