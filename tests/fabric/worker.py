"""What a rank does in the emulated networks, by its first argument; results as JSON lines on the standard output."""

import json
import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import resilient.comms.backend  # noqa: F401  registers itself
from resilient.comms.probe import hop

BATCH, WIDTH = 8, 512
STORE_PORT = 29400


def joined(backend: str, timeout_s: float = 40) -> tuple[int, int]:
    torch.set_num_threads(1)
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = dist.TCPStore(os.environ["MASTER_ADDR"], STORE_PORT, size, rank == 0, timedelta(seconds=60))
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timedelta(seconds=timeout_s))
    return rank, size


def say(**content: Any) -> None:
    print(json.dumps(content), flush=True)


def collectives(mib: str, rounds: str) -> None:
    """Each collective, `rounds` times, with results checked."""
    rank, size = joined("resilient")
    count = int(float(mib) * (1 << 18)) // size * size
    for _ in range(int(rounds)):
        tensor = torch.arange(count, dtype=torch.float32) % 97 + rank
        dist.all_reduce(tensor)
        wanted = (torch.arange(count, dtype=torch.float32) % 97) * size + size * (size - 1) // 2
        assert torch.equal(tensor, wanted)
        part = torch.full((count // size,), float(rank))
        gathered = torch.empty(count)
        dist.all_gather_into_tensor(gathered, part)
        assert gathered.view(size, -1)[:, -1].tolist() == list(range(size))
        dist.reduce_scatter_tensor(part, gathered)
        assert float(part[0]) == rank * size
        exchanged = torch.empty(count)
        dist.all_to_all_single(exchanged, torch.full((count,), float(rank)))
        assert exchanged.view(size, -1)[:, 0].tolist() == list(range(size))
    made: Any = dist.group.WORLD
    say(rank=rank, report=made.striped.report())
    dist.barrier()
    dist.destroy_process_group()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.ReLU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, batch: Tensor) -> Tensor:
        output: Tensor = self.layers(batch)
        return output


def batch_of(step: int, rank: int) -> Tensor:
    return torch.randn(BATCH, WIDTH, generator=torch.Generator().manual_seed(100 * step + rank))


def trains(backend: str, steps: str, progress: str = "") -> None:
    """DDP for some steps; after each, rank 0 writes its number into the file `progress`."""
    rank, _ = joined(backend)
    torch.manual_seed(0)
    model = DistributedDataParallel(Net())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    loss, took = torch.zeros(()), []
    for step in range(int(steps)):
        began = time.monotonic()
        loss = model(batch_of(step, rank)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        took.append(time.monotonic() - began)
        if progress and rank == 0:
            Path(progress).write_text(str(step))
    whole = loss.detach().clone()
    dist.all_reduce(whole)
    say(rank=rank, loss=float(whole), took=took)
    dist.barrier()
    dist.destroy_process_group()


def probes(target: str, *ports: str) -> None:
    """The second router on the way of a flow from each port."""
    source = os.environ["FABRIC_ADDRESS"]
    say(hops=[hop(source, int(port), (target, 9000)) for port in ports])


if __name__ == "__main__":
    jobs: dict[str, Callable[..., None]] = {"collectives": collectives, "trains": trains, "probes": probes}
    jobs[sys.argv[1]](*sys.argv[2:])
