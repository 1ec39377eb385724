"""Writes the batch scripts of this folder anew: what `resilient slurm` prints for the jobs below.

python examples/slurm/generate.py
"""

from pathlib import Path

from resilient.launch.slurm import SlurmJob, batch_script

COMMAND = ("train.py", "--url", "/shared/runs/gpt")
JOBS = {
    "train.sbatch": SlurmJob(command=COMMAND, nodes=4, gpus_per_node=8, time="24:00:00"),
    "spares.sbatch": SlurmJob(
        command=COMMAND,
        nodes=16,
        spares=2,
        gpus_per_node=8,
        time="24:00:00",
        grace_s=300,
        variables={"RESILIENT_PARITY": "4+1", "RESILIENT_LOCAL": "/nvme/run"},
    ),
    "array.sbatch": SlurmJob(
        command=("sweep.py", "--url", "/shared/runs/sweep-$SLURM_ARRAY_TASK_ID", "--seed", "$SLURM_ARRAY_TASK_ID"),
        gpus_per_node=1,
        time="4:00:00",
        name="sweep",
        array="0-31%8",
    ),
    "torchrun.sbatch": SlurmJob(command=COMMAND, nodes=4, gpus_per_node=8, time="24:00:00", launcher="torchrun"),
    "srun.sbatch": SlurmJob(command=COMMAND, nodes=4, gpus_per_node=8, time="24:00:00", launcher="srun"),
}


def main() -> None:
    for name, job in JOBS.items():
        (Path(__file__).parent / name).write_text(batch_script(job))


if __name__ == "__main__":
    main()
