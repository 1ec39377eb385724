"""The library as people get it: built, installed into a fresh environment, and used there, away from the checkout.

The environment has a `site-packages` of its own with our wheel, and after it the one of the tests for all that we
depend on: torch need not be downloaded again, and the editable installation there is not found, because its hook is a
`.pth` file, which Python only reads in an environment's own folder.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import venv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.bad_days.conftest import Agents

ROOT = Path(__file__).parents[1]
SDIST = "import setuptools.build_meta as backend, sys; print(backend.build_sdist(sys.argv[1]))"
SCRIPT = """
import os, signal, torch, resilient
from resilient.launch.joining import join_group
join_group()
model = torch.nn.Linear(8, 8)
optimizer = torch.optim.Adam(model.parameters())
rank, life = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
with resilient.Checkpointer(os.environ["URL"], {"model": model, "optimizer": optimizer}) as checkpointer:
    start = checkpointer.restore() or 0
    print(f"rank {rank} life {life} starts after {start} from {resilient.__file__}", flush=True)
    for step in range(start + 1, 13):
        model(torch.ones(1, 8)).sum().backward()
        if step == 9 and rank == 1 and life == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        optimizer.step()
        handle = checkpointer.save(step)
        handle.durable("memory").result(60)
"""


@dataclass(frozen=True, slots=True)
class Fresh:
    """An environment with nothing of ours but the wheel."""

    folder: Path

    @property
    def site_packages(self) -> Path:
        return Path(sysconfig.get_path("purelib", "venv", {"base": str(self.folder)}))

    def run(self, program: str, *arguments: object, **variables: str) -> "subprocess.CompletedProcess[str]":
        """A program of its `bin`, from a folder that holds nothing."""
        away = self.folder / "away"
        away.mkdir(exist_ok=True)
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        return subprocess.run(
            [self.folder / "bin" / program, *map(str, arguments)],
            cwd=away,
            env={**environment, "OMP_NUM_THREADS": "1", **variables},
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )


def build(folder: Path) -> tuple[Path, Path]:
    """The sdist, from a copy of the checkout without what is not part of it, and the wheel from the sdist alone."""
    checkout = folder / "checkout"
    skipped = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "runs", "*.egg-info")
    shutil.copytree(ROOT, checkout, symlinks=True, ignore=skipped)
    made = subprocess.run(
        [sys.executable, "-c", SDIST, folder], cwd=checkout, capture_output=True, text=True, check=False
    )
    assert made.returncode == 0, made.stderr
    (sdist,) = folder.glob("torch_resilient-*.tar.gz")
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    built = subprocess.run(
        [*pip, "--wheel-dir", folder, sdist], cwd=folder, capture_output=True, text=True, check=False
    )
    assert built.returncode == 0, built.stderr
    (wheel,) = folder.glob("torch_resilient-*.whl")
    return sdist, wheel


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Fresh:
    _, wheel = build(tmp_path_factory.mktemp("built"))
    made = Fresh(tmp_path_factory.mktemp("fresh"))
    venv.create(made.folder, with_pip=False, symlinks=True)
    pip = [sys.executable, "-m", "pip", "--python", str(made.folder / "bin" / "python"), "install", "--quiet"]
    subprocess.run([*pip, "--no-deps", "--no-index", wheel], check=True, stdin=subprocess.DEVNULL)
    (made.site_packages / "the_rest.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return made


@pytest.fixture
def agents(runtime_dir: Path) -> Any:
    found = Agents(runtime_dir)
    yield found
    found.signal(signal.SIGKILL)


def test_the_command_works_and_nothing_comes_from_the_checkout(fresh: Fresh) -> None:
    asked = fresh.run("resilient", "--help")
    assert asked.returncode == 0, asked.stderr
    assert all(command in asked.stdout for command in ("convert", "doctor", "mpi", "run", "slurm", "verify"))
    modules = ("resilient", "resilient.checkpoint.checkpointer", "resilient.launch.cli")
    for module in modules:
        found = fresh.run("python", "-c", f"import {module} as m; print(m.__file__)")
        assert found.returncode == 0, found.stderr
        assert Path(found.stdout.strip()).is_relative_to(fresh.folder)
    version = fresh.run("resilient", "--version")
    assert version.stdout.startswith("resilient, version ")


def test_the_doctor_finds_the_environment_well(fresh: Fresh, runtime_dir: Path, tmp_path: Path) -> None:
    ended = fresh.run("resilient", "doctor", "--url", tmp_path, "--json")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    (findings,) = json.loads(ended.stdout)["nodes"].values()
    assert {finding["name"] for finding in findings} >= {"torch", "resilient", "url rights"}


def test_a_job_that_loses_a_rank_comes_back_and_its_snapshots_are_whole(
    fresh: Fresh, agents: Agents, tmp_path: Path
) -> None:
    script, url = tmp_path / "train.py", tmp_path / "url"
    script.write_text(SCRIPT)
    job = ("--standalone", "--nproc-per-node", 2, "--max-restarts", 3, script)
    done = fresh.run("python", "-m", "torch.distributed.run", *job, URL=str(url), RESILIENT_DURABLE_EVERY="4")
    assert done.returncode == 0, done.stdout + done.stderr
    came_back = [line for line in done.stdout.splitlines() if " life 1 " in line or " life 2 " in line]
    assert came_back, done.stdout
    assert all("starts after 8 from" in line and str(fresh.folder) in line for line in came_back)
    listed = fresh.run("resilient", "ls", url, "--json")
    assert listed.returncode == 0, listed.stderr
    steps = {row["step"] for row in json.loads(listed.stdout)["checkpoints"] if row["complete"]}
    assert 12 in steps
    verified = fresh.run("resilient", "verify", url, "--json")
    assert verified.returncode == 0, verified.stderr
    assert json.loads(verified.stdout)["well"] is True


def test_what_a_url_needs_and_lacks_is_named_with_its_extra(fresh: Fresh) -> None:
    """The package for S3 is there, by way of the other environment; here it is as if it were not."""
    program = "import sys; sys.modules['s3fs'] = None\nfrom resilient.launch.cli import main; sys.exit(main())"
    ended = fresh.run("python", "-c", program, "ls", "s3://bucket/run")
    assert ended.returncode == 2
    assert "pip install 'torch-resilient[s3]'" in ended.stderr
