"""The example for DeepSpeed under torchrun: a rank is killed in the middle; started again, the job goes on."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples/train_deepspeed.py"


@pytest.mark.timeout(240)
def test_a_job_of_which_a_rank_was_killed_goes_on_where_it_was(runtime_dir: Path, tmp_path: Path) -> None:
    status, said, began = _run(tmp_path, kill_at=50)
    assert status != 0
    assert began == 0
    status, said, began = _run(tmp_path)
    assert status == 0, "".join(said[-30:])
    assert 45 <= began < 120  # those that were complete on both ranks when one died
    assert any(line.startswith("step 120:") for line in said)
    assert (tmp_path / "checkpoints/latest").read_text() == "global_step120"


def _run(folder: Path, kill_at: int | None = None) -> tuple[int, list[str], int]:
    """Exit status, what was said, and the step after which rank 1 began; it is killed after the step `kill_at`."""
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    settings = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1", "PYTHONWARNINGS": "ignore"}
    said: list[str] = []
    victim, began = 0, -1
    with subprocess.Popen(
        [sys.executable, *torchrun, str(EXAMPLE), str(folder), "3", "120"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | settings,
        start_new_session=True,
    ) as job:
        try:
            assert job.stdout is not None
            for line in job.stdout:
                said.append(line)
                start = re.search(r"rank 1, process (\d+): after step (\d+)", line)
                if start:
                    victim, began = int(start[1]), int(start[2])
                if kill_at is not None and line.startswith(f"step {kill_at}:"):
                    os.kill(victim, signal.SIGKILL)
            return job.wait(60), said, began
        finally:
            if job.poll() is None:
                os.killpg(job.pid, signal.SIGKILL)
