"""A job under MPICH and under Open MPI: found, killed, resumed from the memory that it left on the node, preempted."""

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from resilient.launch.cli.listing import checkpoints
from tests.bad_days.conftest import Agents
from tests.mpi.conftest import PYTHON, RESILIENT, ROOT, Mpi, find, finish

TRAIN = ROOT / "examples" / "mpi_train.py"
PROGRAMS = Path(__file__).with_name("programs.py")
STEPS = 60


def lines(done: "subprocess.CompletedProcess[str]") -> list[Any]:
    """What the ranks said, as JSON, in no order."""
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return [json.loads(line) for line in done.stdout.splitlines()]


def weights(done: "subprocess.CompletedProcess[str]") -> str:
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("weights ")]
    return line


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What a job that nobody disturbs ends with."""
    folder = tmp_path_factory.mktemp("calm")
    done = find("mpich").run(PYTHON, TRAIN, folder / "url", "--steps", STEPS, RESILIENT_RUNTIME_DIR=str(folder / "r"))
    return weights(done)


def train_on(mpi: Mpi, nodes: tuple[str, ...], *arguments: object) -> "subprocess.CompletedProcess[str]":
    """Two ranks on one node, or on two: what MPI starts may have variables of its own."""
    job = [("env", f"RESILIENT_NODE={node}", PYTHON, TRAIN, *arguments) for node in nodes]
    ranks = 2 // len(nodes)
    return mpi.run(*job[0], *(word for more in job[1:] for word in (":", "-n", ranks, *more)), ranks=ranks)


@pytest.mark.parametrize(("name", "nodes"), [("mpich", ("a",)), ("openmpi", ("a", "b"))])
def test_a_killed_rank_ends_mpirun_and_the_next_goes_on_from_memory_with_the_same_bits(
    name: str, nodes: tuple[str, ...], calm: str, agents: Agents, eventually: Callable[..., None], tmp_path: Path
) -> None:
    mpi, url = find(name), tmp_path / "url"
    killed = train_on(mpi, nodes, url, "--steps", STEPS, "--die-at-step", 40)
    assert killed.returncode != 0
    assert "weights" not in killed.stdout
    survivors = set(agents.pids())
    assert len(survivors) == len(nodes)
    resumed = train_on(mpi, nodes, url, "--steps", STEPS)
    assert weights(resumed) == calm
    # The rank dies before the fence of step 39: that image may still have been on its way.
    assert any(f"restored step {step} from ['memory']" in resumed.stdout for step in (38, 39)), resumed.stdout
    eventually(lambda: survivors.isdisjoint(agents.pids()), "the agents end with the job")


def test_scripts_for_torchrun_run_unchanged(mpi: Mpi, runtime_dir: Path) -> None:
    said = lines(mpi.run(RESILIENT, "mpi", PROGRAMS, "torchrun_style", "--lr", "1"))
    assert said == [{"argv": ["--lr", "1"], "name": "__main__", "sum": 3.0}] * 2


def test_modules_run_as_with_python(mpich: Mpi, tmp_path: Path) -> None:
    (tmp_path / "file.json").write_text('{"a": 1}')
    done = mpich.run(RESILIENT, "mpi", "-m", "json.tool", "--compact", tmp_path / "file.json", ranks=1)
    assert done.stdout == '{"a":1}\n', done.stderr


@pytest.mark.parametrize("end", ["raise", "exit"])
def test_a_rank_that_leaves_alone_ends_the_job_and_what_it_raised_is_told(
    end: str, mpi: Mpi, runtime_dir: Path
) -> None:
    ended = mpi.run(RESILIENT, "mpi", PROGRAMS, "torchrun_style", end)
    assert ended.returncode != 0
    if end == "raise":
        assert "rank 1 has had enough" in ended.stderr
        assert "runpy" not in ended.stderr, "only the script's own frames are of interest"


def test_nodes_are_told_apart_by_name_and_rank_0_tells_its_settings(mpi: Mpi, runtime_dir: Path) -> None:
    """Two nodes of two ranks. Their names stand for two machines; only the first has been given the token."""
    program = (PYTHON, PROGRAMS, "places")
    first = ("env", "RESILIENT_NODE=a", "RESILIENT_TOKEN=secret", "RESILIENT_PEER_ADDRESS=127.0.0.1", *program)
    second = ("env", "RESILIENT_NODE=b", *program)
    said = sorted(lines(mpi.run(*first, ":", "-n", "2", *second)), key=lambda one: one["place"]["rank"])
    assert [one["place"]["nodes"] for one in said] == [["a", "a", "b", "b"]] * 4
    assert [(one["told"]["GROUP_RANK"], one["told"]["LOCAL_RANK"]) for one in said] == [
        ("0", "0"), ("0", "1"), ("1", "0"), ("1", "1"),
    ]  # fmt: skip
    assert {one["told"]["RESILIENT_TOKEN"] for one in said} == {"secret"}
    assert ["RESILIENT_PEER_ADDRESS" in one["told"] for one in said] == [True, True, False, False]
    assert {one["told"]["MASTER_ADDR"] for one in said} == {"127.0.0.1"}


def test_several_machines_meet_at_the_address_that_rank_0_is_told(mpich: Mpi, runtime_dir: Path) -> None:
    """MPICH can act as if every other rank were on another machine."""
    program = (PYTHON, PROGRAMS, "places")
    first, second = (
        ("env", "RESILIENT_NODE=a", "MASTER_ADDR=localhost", *program),
        ("env", "RESILIENT_NODE=b", *program),
    )
    said = lines(mpich.run(*first, ":", "-n", "1", *second, ranks=1, MPIR_CVAR_ODD_EVEN_CLIQUES="1"))
    assert {one["told"]["MASTER_ADDR"] for one in said} == {"localhost"}
    assert {(one["place"]["node_rank"], one["place"]["local_world_size"]) for one in said} == {(0, 1), (1, 1)}


def test_two_machines_of_one_name_are_refused_on_all_ranks(mpich: Mpi, runtime_dir: Path) -> None:
    refused = mpich.run(RESILIENT, "mpi", PROGRAMS, "places", MPIR_CVAR_ODD_EVEN_CLIQUES="1")
    assert refused.returncode != 0
    assert refused.stderr.count("give each its own host name, or its own RESILIENT_NODE") == 2
    assert refused.stdout == ""


def test_the_mpirun_of_another_mpi_is_recognised(mpich: Mpi, runtime_dir: Path) -> None:
    other = find("openmpi").environment()["MPI4PY_LIBMPI"]
    refused = mpich.run(RESILIENT, "mpi", PROGRAMS, "places", MPI4PY_LIBMPI=other)
    assert refused.returncode == 2
    assert "use the mpirun of the same MPI" in refused.stderr


def test_a_missing_mpi4py_is_named_with_what_to_install() -> None:
    program = "import sys; sys.modules['mpi4py'] = None\nfrom resilient.launch.cli import main; sys.exit(main())"
    done = subprocess.run([sys.executable, "-c", program, "mpi", PROGRAMS], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "pip install 'torch-resilient[mpi]'" in done.stderr


def test_a_signal_to_mpirun_makes_the_job_safe_and_it_ends_as_preempted(
    mpi: Mpi, agents: Agents, tmp_path: Path
) -> None:
    url = tmp_path / "url"
    with mpi.start(
        PYTHON, TRAIN, url, "--steps", 100_000, RESILIENT_PREEMPT_SIGNALS="SIGUSR1", RESILIENT_DURABLE_EVERY="0"
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("step 50:"):
                break
        process.send_signal(signal.SIGUSR1)
        stopped = finish(process)
    assert stopped.returncode == 75, stopped.stderr
    (safe,) = [one for one in checkpoints(str(url)) if one.is_complete]
    assert safe.step is not None
    assert safe.step >= 50
    agents.signal(signal.SIGKILL)
    resumed = mpi.run(PYTHON, TRAIN, url, "--steps", safe.step + 1)
    assert f"restored step {safe.step} from ['durable']" in resumed.stdout
