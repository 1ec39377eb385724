"""A training job under mpirun, protected: kill a rank, start mpirun again, and it goes on from the memory of the node.

    mpirun -n 2 python examples/mpi_train.py /tmp/run --steps 200

Ranks and hosts come from MPI (`resilient.launch.mpi`); the rest is as under torchrun. At the end rank 0 prints a digest
of the weights: the same bits whether the job was killed on the way or not. `--die-at-step` kills rank 1 in mid-step.
"""

import argparse
import hashlib
import os
import signal

import torch
import torch.distributed as dist

import resilient
from resilient.launch import mpi

parser = argparse.ArgumentParser()
parser.add_argument("url", help="where durable snapshots go; it also names the job")
parser.add_argument("--steps", type=int, default=200)
parser.add_argument("--die-at-step", type=int, metavar="S", help="SIGKILL to rank 1 between backward and optimizer")
arguments = parser.parse_args()

place = mpi.init_process_group()  # in place of torch.distributed.init_process_group()
torch.manual_seed(0)
torch.set_num_threads(1)
model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.GELU(), torch.nn.Linear(256, 1))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
network = torch.nn.parallel.DistributedDataParallel(model)
torch.manual_seed(1 + place.rank)  # each rank has data of its own

checkpointer = resilient.Checkpointer(arguments.url, state={"model": model, "optimizer": optimizer})
start = checkpointer.restore() or 0
if place.rank == 0 and checkpointer.last_restore is not None:
    print(f"restored step {start} from {sorted(set(checkpointer.last_restore.levels.values()))}", flush=True)
for step in range(start + 1, arguments.steps + 1):
    x = torch.randn(64, 64)
    loss = (network(x) - x.sin().sum(1, keepdim=True)).square().mean()
    loss.backward()
    if step == arguments.die_at_step and place.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    optimizer.step()
    optimizer.zero_grad()
    checkpointer.save(step)
    if place.rank == 0 and step % 50 == 0:
        print(f"step {step}: loss {loss.item():.3f}", flush=True)
if place.rank == 0:
    weights = b"".join(value.numpy().tobytes() for value in model.state_dict().values())
    print(f"weights {hashlib.blake2s(weights).hexdigest()}", flush=True)
checkpointer.close()
dist.destroy_process_group()
