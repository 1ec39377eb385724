"""What tests run under mpirun: `python programs.py NAME`. Each says what it has found on its standard output."""

import json
import os
import sys
from dataclasses import asdict


def places() -> None:
    """Where MPI says that this process is, and what scripts for torchrun are told."""
    from resilient.launch import mpi

    place = mpi.join()
    told = {name: value for name, value in os.environ.items() if name in ("LOCAL_RANK", "GROUP_RANK", "MASTER_ADDR")}
    told |= {name: value for name, value in os.environ.items() if name.startswith("RESILIENT_")}
    # One write each, so that lines of several ranks do not mix.
    sys.stdout.write(json.dumps({"place": asdict(place), "told": told}) + "\n")


def torchrun_style() -> None:
    """A script that knows nothing of MPI."""
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    total = torch.tensor([float(os.environ["RANK"]) + 1])
    dist.all_reduce(total)
    sys.stdout.write(json.dumps({"argv": sys.argv[2:], "name": __name__, "sum": total.item()}) + "\n")
    if sys.argv[-1] == "raise" and dist.get_rank() == 1:
        raise ValueError("rank 1 has had enough")
    if sys.argv[-1] == "exit" and dist.get_rank() == 1:
        sys.exit(3)
    if sys.argv[-1] == "raise":
        from mpi4py import MPI

        MPI.COMM_WORLD.Barrier()  # rank 0 waits for one that does not come, and learns nothing from the network
    if sys.argv[-1] == "exit":
        dist.all_reduce(total)


if __name__ == "__main__":
    {"places": places, "torchrun_style": torchrun_style}[sys.argv[1]]()
