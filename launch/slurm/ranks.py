"""Ranks for `srun python train.py` without torchrun: what SLURM says of a task, as torch.distributed reads it.

The batch script does the same in its shell; this is for programs that are started by a script of somebody else's.
"""

import os
from collections.abc import Mapping, MutableMapping

from resilient.ec.hostlist import expand
from resilient.errors import UsageError

_FIRST_PORT, _PORTS = 20000, 10000  # as in the batch script


def rank_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT and RESILIENT_NODE of a task of `srun`.

    What is set already stays as it is. Raises UsageError outside a step of SLURM.
    """
    names = {"SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_JOB_ID"}
    if missing := sorted(names - environment.keys()):
        raise UsageError(f"this process was not started by srun: {', '.join(missing)} not set; start it with srun")
    nodes = expand(environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "localhost"))
    found = {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": environment["SLURM_NTASKS"],
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": _tasks_here(environment),
        "MASTER_ADDR": nodes[0],
        "MASTER_PORT": str(_FIRST_PORT + int(environment["SLURM_JOB_ID"]) % _PORTS),
        "RESILIENT_NODE": environment.get("SLURMD_NODENAME", ""),
    }
    return {name: environment.get(name) or value for name, value in found.items() if environment.get(name) or value}


def set_rank_variables(environment: MutableMapping[str, str] | None = None) -> None:
    """Call it first in a program that `srun` starts once for each rank; then `init_process_group()` finds its place.

    Changes `environment` (the process's own if not given). Raises UsageError outside a step of SLURM.
    """
    environment = os.environ if environment is None else environment
    environment.update(rank_variables(environment))


def _tasks_here(environment: Mapping[str, str]) -> str:
    """SLURM_STEP_TASKS_PER_NODE is "4(x2),3": the count of each node, runs of equal ones in short."""
    text = environment.get("SLURM_STEP_TASKS_PER_NODE") or environment.get("SLURM_TASKS_PER_NODE", "")
    node = int(environment.get("SLURM_NODEID", "0"))
    for part in text.split(","):
        count, _, times = part.partition("(x")
        run = int(times.rstrip(")")) if times else 1
        if node < run:
            return count
        node -= run
    return ""
