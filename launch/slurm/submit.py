"""Hands a batch script to sbatch, on its standard input: no file is left behind."""

import subprocess

from resilient.errors import LevelFailed, UsageError

_TIMEOUT_S = 120.0


def submit(script: str) -> str:
    """The number of the job. Blocks on the controller. Raises UsageError where there is no sbatch or it refuses the
    script, LevelFailed when the controller does not answer.
    """
    try:
        done = subprocess.run(
            ["sbatch", "--parsable"], input=script, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
        )
    except FileNotFoundError:
        raise UsageError(
            "there is no sbatch on this machine: run this on a login node of the cluster, or leave --submit out and "
            "take the script there"
        ) from None
    except subprocess.TimeoutExpired as error:
        raise LevelFailed(f"sbatch did not answer within {_TIMEOUT_S:g} s; is the job there (squeue)?") from error
    if done.returncode != 0:
        raise UsageError(f"sbatch refused the script: {done.stderr.strip() or f'exit code {done.returncode}'}")
    return done.stdout.strip().partition(";")[0]
