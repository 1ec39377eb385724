"""`resilient slurm`: a batch script for a training job, printed or submitted."""

from pathlib import Path
from typing import Any

import click

from resilient.errors import UsageError
from resilient.launch.cli.output import Exit, remark, tell

_PREFIX = "RESILIENT_"


@click.command(context_settings={"ignore_unknown_options": False})
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED, metavar="-- SCRIPT [ARGUMENTS]...")
@click.option("--nodes", type=int, default=1, show_default=True, help="Nodes that train.")
@click.option("--spares", type=int, default=0, show_default=True, help="Further nodes, to step in for lost ones.")
@click.option("--gpus-per-node", type=int, default=0, show_default=True, help="GPUs of a node, and ranks on it.")
@click.option("--processes-per-node", type=int, help="Ranks on a node, if not one for each GPU.")
@click.option("--time", help="SLURM's time limit; the job is requeued before it is over.")
@click.option("--grace", "grace_s", type=int, default=120, show_default=True, help="Seconds from notice to the end.")
@click.option("--name", default="train", show_default=True, help="The job's name.")
@click.option("--array", help="An array, such as 0-7%4; $SLURM_ARRAY_TASK_ID in ARGUMENTS is filled in.")
@click.option(
    "--launcher",
    type=click.Choice(["run", "torchrun", "srun"]),
    default="run",
    show_default=True,
    help="What starts the ranks: `resilient run`, torchrun, or srun alone.",
)
@click.option("--restarts", type=int, default=3, show_default=True, help="Failures in a row before it is given up.")
@click.option("--policy", type=click.Path(path_type=Path), help="A policy file; checked here, read by the job.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="A key of the policy, above the file.")
@click.option("--sbatch", "options", multiple=True, metavar="OPTION", help="A further #SBATCH line: --partition=gpu.")
@click.option("--setup", multiple=True, metavar="LINE", help="A line of shell to begin with: module load cuda.")
@click.option("--submit", "submits", is_flag=True, help="Hand it to sbatch.")
def slurm(policy: Path | None, settings: tuple[str, ...], submits: bool, **facts: Any) -> int:
    """Print (or submit) a batch script that trains through preemption, requeue and the loss of nodes.

    The script is complete and made to be read: keep it and change it where your cluster differs (docs/slurm.md).
    """
    from resilient.launch.slurm import SlurmJob, batch_script, submit

    job = SlurmJob(variables=_variables(policy, settings), **facts)
    script = batch_script(job)
    if not submits:
        tell(script.rstrip("\n"))
        return Exit.OK
    number = submit(script)
    remark(f"submitted as job {number}; it says what happens in slurm-{number}.txt, its nodes in slurm-{number}/")
    tell(number)
    return Exit.OK


def _variables(policy: Path | None, settings: tuple[str, ...]) -> dict[str, str]:
    """The RESILIENT_ variables for the job, checked together. Raises PolicyError, UsageError."""
    from resilient.policy import Policy

    variables = {f"{_PREFIX}POLICY": str(policy.absolute())} if policy is not None else {}
    for setting in settings:
        key, sign, value = setting.partition("=")
        if not sign:
            raise UsageError(f"--set {setting} cannot be; write it as --set durable_every=500")
        variables[f"{_PREFIX}{key.strip().upper()}"] = value
    Policy.from_environment(environment=variables)
    return variables
