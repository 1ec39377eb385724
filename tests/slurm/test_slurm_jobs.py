"""Jobs on a real SLURM: what ends them, and how they go on. Every job ends with the bits of an undisturbed one."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from tests.slurm import train
from tests.slurm.cluster import Cluster, command_of, processes_of
from tests.slurm.conftest import Submit

Undisturbed = Callable[[int], str]

pytestmark = pytest.mark.timeout(400)  # each wait has a deadline of its own


def ranks_on(node: str) -> list[int]:
    return [pid for pid in processes_of(node) if f"python {train.__file__} " in command_of(pid)]


def token_of(pid: int) -> str:
    """The secret of the job's agents, which was made in the job."""
    variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    [token] = [value.partition(b"=")[2] for value in variables if value.startswith(b"RESILIENT_TOKEN=")]
    assert len(token) == 64
    return token.decode()


def running() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]


def places_of(token: str, folder: Path) -> list[Path]:
    """Files below with it: logs, scripts, the controller's state."""
    found = []
    for path in folder.rglob("*"):
        with suppress(OSError):  # it has gone, or is none
            if token.encode() in path.read_bytes():
                found.append(path)
    return found


def test_a_job_that_another_preempts_is_safe_in_its_grace_time_and_goes_on_at_that_step(
    cluster: Cluster, submit: Submit, undisturbed: Undisturbed
) -> None:
    job = submit("--nodes", "2", "--time", "1:00:00", "--grace", "60", steps=40, pace_s=0.1)
    job.wait_for_step(5)
    urgent = cluster.run(
        "sbatch", "--parsable", "-p", "high", "-N3", "--exclusive", "-o", "/dev/null", "--wrap", "exit 0"
    )
    job.resume()
    job.wait_for_end()

    assert (job.state, job.result) == ("COMPLETED", undisturbed(40))
    assert cluster.state(urgent.strip()) == "COMPLETED"
    assert "requeued: the training has stopped, and its last step is safe" in job.said
    assert [life["from"] for life in job.lives] == ["nothing", "durable"]
    assert job.steps == list(range(1, 41))  # no step was done twice


def test_a_notice_before_the_time_is_up_reaches_torchrun_too_and_the_job_is_requeued(
    cluster: Cluster, submit: Submit, undisturbed: Undisturbed
) -> None:
    job = submit("--nodes", "2", "--launcher", "torchrun", steps=40, pace_s=0.1)
    job.wait_for_step(5)
    cluster.run("scancel", "--batch", "--signal=USR1", job.number)  # as SLURM does it, for --signal=B:USR1@120
    job.resume()
    job.wait_for_end()

    assert (job.state, job.result) == ("COMPLETED", undisturbed(40))
    assert [(life["from"], life["world"]) for life in job.lives] == [("nothing", "2"), ("durable", "2")]
    assert job.steps == list(range(1, 41))


def test_a_rank_that_is_killed_costs_no_step_because_the_agents_outlive_the_training_step(
    cluster: Cluster, submit: Submit, undisturbed: Undisturbed
) -> None:
    job = submit("--nodes", "2", "--launcher", "srun", steps=40, pace_s=0.05)
    job.wait_for_step(10)
    node = job.lives[0]["nodes"].split(",")[1]
    token = token_of(ranks_on(node)[0])
    assert [pid for pid in running() if token in command_of(pid)] == []
    assert places_of(token, cluster.folder) == []
    os.kill(ranks_on(node)[0], signal.SIGKILL)
    job.wait_for_end()
    assert places_of(token, job.folder) == []

    assert (job.state, job.result) == ("COMPLETED", undisturbed(40))
    assert [life["from"] for life in job.lives] == ["nothing", "memory"]
    assert job.steps.index(int(job.lives[1]["step"]) + 1) >= 10
    assert not (job.folder / "durable").exists() or not list((job.folder / "durable").glob("step_*"))


def test_a_spare_steps_in_for_a_node_that_dies(cluster: Cluster, submit: Submit, undisturbed: Undisturbed) -> None:
    job = submit("--nodes", "2", "--spares", "1", "--set", "parity=1+1", steps=60, pace_s=0.1)
    job.wait_for_step(10)
    lost = next(node for node in job.lives[0]["nodes"].split(",") if node != batch_node(cluster, job.number))
    try:
        cluster.kill_node(lost)
        job.wait_for_end()
    finally:
        cluster.start_node(lost)

    assert (job.state, job.result) == ("COMPLETED", undisturbed(60))
    assert [life["from"] for life in job.lives] in (["nothing", "parity"], ["nothing", "memory+parity"])
    assert lost not in job.lives[1]["nodes"]


def test_a_job_whose_node_is_taken_down_is_requeued_by_slurm_and_goes_on_from_the_newest_durable_step(
    cluster: Cluster, submit: Submit, undisturbed: Undisturbed
) -> None:
    job = submit("--nodes", "2", "--set", "durable_every=5", "--launcher", "srun", steps=40, pace_s=0.1)
    job.wait_for_step(12)
    lost = next(node for node in job.lives[0]["nodes"].split(",") if node != batch_node(cluster, job.number))
    cluster.run("scontrol", "update", f"NodeName={lost}", "State=DOWN", "Reason=test")
    try:
        job.resume()
        job.wait_for_end()
    finally:
        cluster.run("scontrol", "update", f"NodeName={lost}", "State=RESUME", check=False)

    assert (job.state, job.result) == ("COMPLETED", undisturbed(40))
    assert [life["from"] for life in job.lives] == ["nothing", "durable"]


def test_each_task_of_an_array_has_its_own_url_and_agents_and_is_requeued_alone(
    cluster: Cluster, tmp_path: Path, submit: Submit, undisturbed: Undisturbed
) -> None:
    folders = [tmp_path / "run-0", tmp_path / "run-1"]
    for folder in folders:
        folder.mkdir()
    array = submit("--array", "0-1", "--launcher", "srun", steps=40, pace_s=0.1, below="run-$SLURM_ARRAY_TASK_ID")
    first, second = (replace(array, number=f"{array.number}_{at}", folder=folder) for at, folder in enumerate(folders))
    for task in (first, second):
        task.wait_for_step(3)
    cluster.run("scancel", "--batch", "--signal=USR1", second.number)  # the last task has the number of the array
    second.resume()
    for task in (first, second):
        task.wait_for_end()

    assert [task.result for task in (first, second)] == [undisturbed(40)] * 2
    assert [[life["from"] for life in task.lives] for task in (first, second)] == [["nothing"], ["nothing", "durable"]]
    assert array.logs().count("it had started 1 agent(s)") == 3  # one in each life of each task


def test_a_program_that_srun_starts_for_each_rank_finds_its_place_by_itself(cluster: Cluster) -> None:
    """The nodes' names are none of this host, so the address of the first is told."""
    program = """
from resilient.launch.slurm import set_rank_variables
set_rank_variables()
import os, torch, torch.distributed as dist
dist.init_process_group("gloo")
total = torch.tensor([10.0 ** dist.get_rank()])
dist.all_reduce(total)
print(int(total), os.environ["LOCAL_RANK"], os.environ["LOCAL_WORLD_SIZE"], os.environ["RESILIENT_NODE"])
dist.destroy_process_group()
"""
    command = ("srun", "-N", "2", "--ntasks-per-node=2", "--overcommit", sys.executable, "-c", program)
    said = sorted(cluster.run(*command, environment={"MASTER_ADDR": "127.0.0.1"}).split("\n")[:-1])
    ranks = [line.split() for line in said]
    assert [rank[:3] for rank in ranks] == [["1111", "0", "2"]] * 2 + [["1111", "1", "2"]] * 2
    assert len({rank[3] for rank in ranks} & set(cluster.nodes)) == 2


def test_a_job_that_its_user_cancels_is_safe_and_stays_cancelled(cluster: Cluster, submit: Submit) -> None:
    job = submit("--launcher", "srun", steps=1000, pace_s=0.05)
    job.wait_for_step(5)
    cluster.run("scancel", job.number)
    job.wait(lambda: not cluster.run("squeue", "-h", "-j", job.number, check=False).strip(), "it leaves the queue")
    assert job.state == "CANCELLED"
    assert [path.name for path in (job.folder / "durable").glob("step_*")] == [f"step_{job.steps[-1]:08d}"]


def test_a_job_that_cannot_run_is_given_up_after_its_restarts(submit: Submit) -> None:
    job = submit("--launcher", "srun", "--restarts", "1", script=Path("/no/such/train.py"))
    job.wait_for_end()
    assert job.state == "FAILED"
    assert "given up: the training failed 2 times, at last with code 2" in job.said


def test_what_sbatch_refuses_is_told_in_its_words(cluster: Cluster) -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "resilient.launch.cli",
            "slurm",
            "--submit",
            "--sbatch=--partition=none",
            "--",
            "train.py",
        ],
        env=cluster.environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(
        "resilient: sbatch refused the script: sbatch: error: invalid partition specified: none"
    )


def batch_node(cluster: Cluster, number: str) -> str:
    return cluster.show(number)["BatchHost"]
