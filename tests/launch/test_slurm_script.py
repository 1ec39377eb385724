"""Batch scripts as text: what stands in them, that they are sound shell, and what is refused beforehand."""

import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from examples.slurm.generate import JOBS
from resilient.errors import UsageError
from resilient.launch.slurm import SlurmJob, batch_script, rank_variables, set_rank_variables
from resilient.launch.slurm.job import seconds_of
from resilient.launch.slurm.script import quoted
from tests.launch.conftest import Resilient

EXAMPLES = Path(__file__).parents[2] / "examples" / "slurm"
TRAIN = SlurmJob(command=("train.py",), nodes=2)


def test_the_examples_are_what_the_function_makes() -> None:
    written = {path.name: path.read_text() for path in EXAMPLES.glob("*.sbatch")}
    assert written == {name: batch_script(job) for name, job in JOBS.items()}, "run examples/slurm/generate.py"


def test_every_example_is_clean_shell() -> None:
    assert shutil.which("shellcheck"), "apt-get install --no-install-recommends shellcheck"
    scripts = sorted(EXAMPLES.glob("*.sbatch"))
    checked = subprocess.run(["shellcheck", *scripts], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout
    assert max(len(line) for path in scripts for line in path.read_text().splitlines()) <= 120


def test_the_command_prints_the_script_of_its_options(resilient: Resilient) -> None:
    options = ["--nodes", "16", "--spares", "2", "--gpus-per-node", "8", "--time", "24:00:00", "--grace", "300"]
    policy = ["--set", "parity=4+1", "--set", "local=/nvme/run"]
    done = resilient("slurm", *options, *policy, "--", "train.py", "--url", "/shared/runs/gpt")
    assert (done.code, done.out) == (0, (EXAMPLES / "spares.sbatch").read_text())


def test_the_token_is_made_in_the_job_and_stands_in_no_command() -> None:
    for job in JOBS.values():
        naming = [line for line in batch_script(job).splitlines() if "RESILIENT_TOKEN" in line]
        assert naming == ["RESILIENT_TOKEN=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \\n')", "export RESILIENT_TOKEN"]


def test_arguments_reach_the_program_as_they_are_and_slurms_variables_are_filled_in() -> None:
    given = ["plain", "a b", "it's", '$HOME "`x`"', "run-$SLURM_ARRAY_TASK_ID", '"${SLURM_JOB_ID}"$HOME\\', "$SLURM_x"]
    printed = subprocess.run(
        ["bash", "-c", "printf '%s\\0' " + " ".join(map(quoted, given))],
        env={**os.environ, "SLURM_ARRAY_TASK_ID": "7", "SLURM_JOB_ID": "42"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split("\0")[:-1]
    assert printed == ["plain", "a b", "it's", '$HOME "`x`"', "run-7", '"42"$HOME\\', "$SLURM_x"]


def test_a_policy_file_and_keys_are_checked_before_the_job_is_made(resilient: Resilient, tmp_path: Path) -> None:
    policy = tmp_path / "policy.toml"
    policy.write_text("durable_every = 7\n")
    assert f"export RESILIENT_POLICY={policy}\n" in resilient("slurm", "--policy", str(policy), "--", "train.py").out

    policy.write_text("durable_evry = 7\n")
    wrong = resilient("slurm", "--policy", str(policy), "--", "train.py")
    assert (wrong.code, "did you mean durable_every?" in wrong.err) == (2, True)
    wrong = resilient("slurm", "--set", "durable_evry=7", "--", "train.py")
    assert (wrong.code, "did you mean RESILIENT_DURABLE_EVERY?" in wrong.err) == (2, True)
    wrong = resilient("slurm", "--set", "keep_last", "--", "train.py")
    assert (wrong.code, wrong.err) == (2, "resilient: --set keep_last cannot be; write it as --set durable_every=500\n")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--nodes", "0"], "--nodes 0 cannot be; give it 1 or more"),
        (["--spares", "-1"], "--spares -1 cannot be; give it 0 or more"),
        (["--gpus-per-node", "-8"], "--gpus-per-node -8 cannot be; give it 0 or more"),
        (["--processes-per-node", "0"], "--processes-per-node 0 cannot be; give it 1 or more"),
        (["--grace", "0"], "--grace 0 cannot be; SLURM takes 1 to 65535 s"),
        (["--grace", "65536"], "--grace 65536 cannot be; SLURM takes 1 to 65535 s"),
        (["--grace", "600", "--time", "10"], "--grace 600 cannot be within --time 10 (600 s)"),
        (["--time", "soon"], "--time soon cannot be"),
        (["--array", "0-"], "--array 0- cannot be; write it as 0-7, 1,3,5 or 0-99%4"),
        (["--name", "a b"], "--name 'a b' cannot be"),
        (["--sbatch", "partition=gpu"], "--sbatch 'partition=gpu' cannot be; write it as --sbatch=--partition=gpu"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(resilient: Resilient, options: list[str], says: str) -> None:
    done = resilient("slurm", *options, "--", "train.py")
    assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)
    assert says in done.err


def test_a_machine_without_sbatch_says_where_to_go(
    resilient: Resilient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    done = resilient("slurm", "--submit", "--", "train.py")
    assert (done.code, done.out) == (2, "")
    assert "there is no sbatch on this machine: run this on a login node of the cluster" in done.err


def test_what_the_cluster_needs_besides_is_passed_on(resilient: Resilient) -> None:
    options = ["--sbatch=--partition=gpu", "--sbatch=--account=x", "--setup", "module load cuda", "--restarts", "9"]
    script = resilient("slurm", *options, "--", "train.py").out
    assert "#SBATCH --partition=gpu\n#SBATCH --account=x\n" in script
    assert "set -u\nmodule load cuda\n" in script
    assert "--max-restarts=9" in script


def test_only_a_job_with_spares_goes_on_without_a_node() -> None:
    assert "#SBATCH --no-kill" not in batch_script(TRAIN)
    assert "#SBATCH --no-kill" in batch_script(replace(TRAIN, spares=1))


@pytest.mark.parametrize(
    ("time", "seconds"),
    [
        ("90", 5400),
        ("90:30", 5430),
        ("2:00:01", 7201),
        ("1-12", 129600),
        ("1-12:30", 131400),
        ("1-12:30:05", 131405),
        ("UNLIMITED", None),
    ],
)
def test_a_time_limit_means_what_slurm_takes_it_for(time: str, seconds: int | None) -> None:
    assert seconds_of(time) == seconds


def test_a_task_of_srun_finds_its_rank_and_the_master() -> None:
    task = {
        "SLURM_PROCID": "5",
        "SLURM_NTASKS": "7",
        "SLURM_LOCALID": "1",
        "SLURM_NODEID": "1",
        "SLURM_JOB_ID": "123456",
        "SLURM_STEP_NODELIST": "n[07-08]",
        "SLURM_STEP_TASKS_PER_NODE": "4,3",
        "SLURMD_NODENAME": "n08",
    }
    assert rank_variables(task) == {
        "RANK": "5",
        "WORLD_SIZE": "7",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "3",
        "MASTER_ADDR": "n07",
        "MASTER_PORT": "23456",
        "RESILIENT_NODE": "n08",
    }
    assert rank_variables({**task, "SLURM_STEP_TASKS_PER_NODE": "4(x2)"})["LOCAL_WORLD_SIZE"] == "4"
    environment = {**task, "MASTER_ADDR": "10.0.0.1"}
    set_rank_variables(environment)
    assert (environment["MASTER_ADDR"], environment["RANK"]) == ("10.0.0.1", "5")
    with pytest.raises(UsageError, match="was not started by srun: SLURM_PROCID not set"):
        rank_variables({key: value for key, value in task.items() if key != "SLURM_PROCID"})
