"""A tiny deterministic job for SLURM: its end depends on all of its steps, not on where it was interrupted or by whom.

    train.py --url URL --out FOLDER --steps N --pace-s S      under srun, torchrun or `resilient run`

All ranks compute the same, so a job of any size has one result. Rank 0 appends to FOLDER/steps.txt a line for each life
and each step, and leaves FOLDER/result.txt, the digest of the weights.
"""

import argparse
import os
import time
from hashlib import sha256
from pathlib import Path

import torch
import torch.distributed as dist

import resilient


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--url", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--pace-s", type=float, default=0.0)
    parser.add_argument("--mib", type=float, default=0.01, help="of weights")
    options = parser.parse_args()
    dist.init_process_group("gloo")
    train(options, dist.get_rank())
    dist.destroy_process_group()


def train(options: argparse.Namespace, rank: int) -> None:
    model, optimizer = made(options.mib)
    checkpointer = resilient.Checkpointer(options.url, state={"model": model, "optimizer": optimizer})
    start = checkpointer.restore() or 0
    restored = checkpointer.last_restore
    levels = "+".join(sorted(set(restored.levels.values()))) if restored else "nothing"
    nodes = ",".join(sorted(set(checkpointer.world.nodes)))
    note(options, rank, f"life {os.getpid()} from {levels} {start} world {dist.get_world_size()} nodes {nodes}")
    for step in range(start + 1, options.steps + 1):
        time.sleep(options.pace_s)  # the pace of a larger model
        loss(model, step).backward()
        for parameter in model.parameters():
            dist.all_reduce(parameter.grad, op=dist.ReduceOp.MAX)
        optimizer.step()
        optimizer.zero_grad()
        note(options, rank, f"step {step}")
        checkpointer.save(step)
    if rank == 0:
        (options.out / "result.txt").write_text(digest_of(model))
    checkpointer.close()


def made(mib: float) -> tuple[torch.nn.Linear, torch.optim.Optimizer]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = torch.nn.Linear(64, max(1, int(mib * (1 << 20) / 4 / 64)))
    return model, torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)


def loss(model: torch.nn.Linear, step: int) -> torch.Tensor:
    inputs = torch.randn(4, 64, generator=torch.Generator().manual_seed(step))
    output: torch.Tensor = model(inputs)
    return output.square().mean()


def digest_of(model: torch.nn.Linear) -> str:
    return sha256(b"".join(parameter.detach().numpy().tobytes() for parameter in model.parameters())).hexdigest()


def note(options: argparse.Namespace, rank: int, line: str) -> None:
    if rank == 0:
        with (options.out / "steps.txt").open("a") as file:
            file.write(line + "\n")


if __name__ == "__main__":
    main()
