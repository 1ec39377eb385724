"""Snapshots that are made once, and the command line as scripts run it: by its installed entry point."""

import json
import os
import shutil
import subprocess
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from resilient.launch.cli import main
from tests.launch import snapshots
from tests.multiprocess.ranks import run


@dataclass(frozen=True, slots=True)
class Ended:
    """A command that has run."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Resilient = Callable[..., Ended]


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory, eventually: Callable[..., None]) -> tuple[Path, Path]:
    """(durable, local) as a job has left them; not to be changed."""
    folder = tmp_path_factory.mktemp("snapshots")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RESILIENT_RUNTIME_DIR", str(tmp_path_factory.mktemp("r")))
        run(snapshots.save, snapshots.RANKS, str(folder / "durable"), str(folder / "local"))
        claim = folder / "durable" / "claim.json"
        eventually(lambda: not claim.exists(), "the agent gives the claim back at its end")
    return folder / "durable", folder / "local"


@pytest.fixture
def one_thread() -> Iterator[None]:
    """So small a model is no work for several, which wait for one another where cores are few."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def durable(saved: tuple[Path, Path], tmp_path: Path) -> Path:
    """A copy of the durable level, to be changed."""
    shutil.copytree(saved[0], tmp_path / "durable")
    return tmp_path / "durable"


@pytest.fixture
def local(saved: tuple[Path, Path], tmp_path: Path) -> Path:
    """A copy of the local level, to be changed."""
    shutil.copytree(saved[1], tmp_path / "local")
    return tmp_path / "local"


@pytest.fixture
def resilient(capsys: pytest.CaptureFixture[str]) -> Resilient:
    """`resilient("ls", url)`: the command line in this process."""

    def call(*arguments: object) -> Ended:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return Ended(code, out, err)

    return call


@pytest.fixture
def script() -> Resilient:
    """The same with the installed script, in a process of its own."""

    def call(*arguments: object, **more: str) -> Ended:
        path = Path(sysconfig.get_path("scripts")) / "resilient"
        done = subprocess.run(
            [path, *map(str, arguments)],
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            env={**os.environ, **more},
            timeout=100,
            check=False,
        )
        return Ended(done.returncode, done.stdout, done.stderr)

    return call
