"""Hugging Face's Trainer and Lightning under torchrun, killed with SIGKILL: the same bits as undisturbed.

The jobs are the examples, as a user starts them.
"""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
pytestmark = [pytest.mark.usefixtures("runtime_dir"), pytest.mark.timeout(400)]


def run(script: str, out: Path, *options: str, ranks: int = 1, restarts: int = 0) -> int:
    """The job as a user starts it; its exit code."""
    job = [str(EXAMPLES / script), "--url", str(out / "run"), "--out", str(out), *options]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command = [*torchrun, f"--max-restarts={restarts}", *job] if ranks > 1 else [sys.executable, *job]
    settings = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "RESILIENT_AGENT_IDLE_S": "60"}
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, timeout=300)
    if done.returncode > 0:
        pytest.fail(done.stderr[-6000:])
    return done.returncode


def losses(out: Path, rank: int) -> dict[int, list[float]]:
    """Of each step those of its last attempt, one for each batch."""
    found: dict[int, list[float]] = {}
    last = 0
    for process, step, loss in rows(out, rank):
        if process != last:  # another life
            found = {known: values for known, values in found.items() if known < step}
        found.setdefault(step, []).append(loss)
        last = process
    return found


def rows(out: Path, rank: int) -> list[tuple[int, int, float]]:
    """(process, step, loss) of each batch."""
    return [tuple(json.loads(line)) for line in (out / f"losses.{rank}").read_text().splitlines()]


def assert_same(calm: Path, disturbed: Path, ranks: int) -> None:
    for rank in range(ranks):
        assert losses(disturbed, rank) == losses(calm, rank)
    ours, theirs = torch.load(calm / "model.pt"), torch.load(disturbed / "model.pt")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(
    ("script", "steps", "die_at"),
    [
        ("train_huggingface.py", 18, random.Random(os.getpid()).randrange(2, 18)),
        ("train_lightning.py", 15, random.Random(os.getpid()).randrange(2, 15)),
        ("train_lightning.py", 15, 8),  # in the middle of an epoch that is not the first
    ],
    ids=["huggingface", "lightning", "lightning, second epoch"],
)
def test_two_ranks_of_which_one_is_killed_end_with_the_bits_of_an_undisturbed_run(
    script: str, steps: int, die_at: int, tmp_path: Path
) -> None:
    calm, disturbed = tmp_path / "calm", tmp_path / "disturbed"
    assert run(script, calm, ranks=2) == 0
    assert run(script, disturbed, "--die-at-step", str(die_at), ranks=2, restarts=1) == 0
    assert_same(calm, disturbed, 2)
    attempts = [step for _, step, _ in rows(disturbed, 0)]
    assert attempts.count(die_at) == 2, f"rank 0 was to die in step {die_at}"
    assert len(attempts) <= steps + 3, "it went back further than to the newest snapshot but one"


def test_a_single_process_that_is_killed_while_it_accumulates_gradients_goes_on_from_the_step_before(
    tmp_path: Path,
) -> None:
    calm, disturbed = tmp_path / "calm", tmp_path / "disturbed"
    assert run("train_huggingface.py", calm, "--accumulate", "5") == 0
    assert run("train_huggingface.py", disturbed, "--accumulate", "5", "--die-at-step", "4") == -9
    assert run("train_huggingface.py", disturbed, "--accumulate", "5") == 0
    assert_same(calm, disturbed, 1)
