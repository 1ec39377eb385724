"""SLURM: a batch script from a few facts (`script.py`), its submission, and ranks under `srun` without torchrun.

The script is the whole integration: whoever wants another one prints it, reads it and changes it (`docs/slurm.md`).
"""

from resilient.launch.slurm.job import SlurmJob
from resilient.launch.slurm.ranks import rank_variables, set_rank_variables
from resilient.launch.slurm.script import batch_script
from resilient.launch.slurm.submit import submit

__all__ = ["SlurmJob", "batch_script", "rank_variables", "set_rank_variables", "submit"]
