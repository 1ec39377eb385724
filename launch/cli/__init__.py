"""The command line `resilient`: what is in checkpoints, whether they are whole, and how to move them elsewhere.

    command.py     the group, its exit codes, how errors are told       (start here)
    look.py        ls, inspect
    check.py       verify, diff
    conversion.py  convert
    keeping.py     repair, prune
    agent.py, doctor.py, mpi.py, running.py, slurm.py    the doors: jobs, their machines and their agents

Commands are thin: they decide what to show. What they do lies below them (`checkpoint/formats`) or in a module named
for it here (`listing`, `comparing`, `repairing`, `pruning`). Nothing imports torch before a checkpoint is opened, so
that `--help` and shell completion are quick.
"""

from resilient.launch.cli.command import main

__all__ = ["main"]
