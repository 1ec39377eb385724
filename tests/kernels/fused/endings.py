"""What the ranks of the fused kernels' tests do where calls fail, ranks or groups end: bodies as those of `jobs`."""

import functools
import gc
import os
import threading
import time
import weakref
from pathlib import Path

import torch
import torch.distributed as dist

from resilient.kernels import fused
from resilient.kernels.fused.workspace import workspace
from tests.kernels.fused.jobs import FUNCTIONS, TINY, drawn, refused, replace_kernel


def different_calls(kind: str) -> list[tuple[str, str, float]]:
    """Rank 1 makes another call than the others; then all make the same one."""
    odd = dist.get_rank() == 1
    left, weight = drawn(9, 8, seed=1), drawn(8, 8, seed=2)
    if kind != "at first":
        fused.all_gather_matmul(drawn(16, 16, seed=1), drawn(16, 16, seed=1), tile=TINY)  # memory is there

    def call() -> None:
        if kind == "operation":
            FUNCTIONS["matmul_all_reduce" if odd else "matmul_reduce_scatter"](left, weight, tile=TINY)
        elif kind == "shape":
            fused.all_gather_matmul(left, weight[:, : 5 if odd else 6], tile=TINY)
        elif kind == "activation":
            fused.all_gather_matmul(left, weight, activation="relu" if odd else None, tile=TINY)
        elif kind == "dtype":
            dtype = torch.float16 if odd else torch.float32
            fused.all_gather_matmul(left.to(dtype), weight.to(dtype), tile=TINY)
        else:  # one that needs more memory than there is, and on the others one that does not, or less
            rows = 200 if odd else 8
            fused.all_gather_matmul(drawn(rows, 8, seed=1), weight, tile=TINY)

    return [refused(call), refused(lambda: fused.all_gather_matmul(left, weight, tile=TINY))]


def a_rank_that_does_not_come(timeout_s: float) -> tuple[str, str, float]:
    """Rank 1 leaves one call out until the others have given up on it."""
    left, weight = drawn(8, 8, seed=1), drawn(8, 8, seed=2)
    fused.all_gather_matmul(left, weight, tile=TINY)
    workspace(fused.group_of(None), left.device).timeout_s = timeout_s
    if dist.get_rank() == 1:
        store = dist.distributed_c10d._get_default_store()
        store.wait(["given up"])

    def call() -> None:
        fused.all_gather_matmul(left, weight, tile=TINY)
        fused.check()

    found = refused(call)
    if dist.get_rank() == 0:
        dist.distributed_c10d._get_default_store().set("given up", "")
    return found


def a_rank_that_is_late_for_others(mutated: str, timeout_s: float) -> tuple[str, str, float]:
    """Rank 1 stops after it has entered an all-reduce, until rank 0 has given up."""
    rank, store = dist.get_rank(), dist.distributed_c10d._get_default_store()
    if rank == 1:
        replace_kernel(mutated)
    left, weight = drawn(32, 8, seed=1), drawn(8, 8, seed=2)
    fused.all_gather_matmul(drawn(64, 8, seed=1), weight, tile=TINY)  # takes all the memory that is needed
    if rank == 0:
        workspace(fused.group_of(None), left.device).timeout_s = timeout_s
        store.wait(["entered"])
    found = refused(lambda: fused.matmul_all_reduce(left, weight, tile=TINY))
    if rank == 0:
        store.set("given up", "")
    return found


def another_name_of_the_device(timeout_s: float) -> list[str]:
    """What `check` and `close` say and do when the device is named with an index, or not at all."""
    found = [a_rank_that_does_not_come(timeout_s)[0]]
    device = torch.get_default_device()
    numbered = torch.device(device.type, device.index or 0)
    for one in (numbered, torch.device(device.type), None):
        found.append(refused(functools.partial(fused.check, None, one))[0])
    space = workspace(fused.group_of(None), device)
    fused.close(None, numbered)
    return [*found, refused(lambda: space.memory)[1]]


def groups_that_are_over() -> None:
    """Of a group that is destroyed nothing stays: neither itself, nor its memory's thread and descriptors."""
    left, weight, found = drawn(4, 6, seed=1), drawn(6, 5, seed=2), []
    for _ in range(4):
        group = dist.new_group()
        assert isinstance(group, dist.ProcessGroup)
        fused.all_gather_matmul(left, weight, group, tile=TINY)
        over = weakref.ref(group)
        dist.barrier()
        dist.destroy_process_group(group)
        del group
        gc.collect()
        assert over() is None
        dist.barrier()
        threads = sum(one.name == "resilient-symmetric" for one in threading.enumerate())
        found.append((threads, Path("/proc/self/maps").read_text().count("resilient-fused")))
    assert found == [(0, 0)] * 4


def go_or_report(rank: int, world: int, folder: str, mutated: str | None = None) -> None:
    """A process of its own: the last rank is killed in the middle of the others' call, and they write what they got.

    With `mutated`, for the next to last, the last exits in order after its first call; the others write of both calls.
    """
    os.environ["TRITON_INTERPRET"] = "1"
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=world)
    torch.set_num_threads(1)
    left, weight = drawn(8, 8, seed=1), drawn(8, 8, seed=2)
    os.environ["RESILIENT_RUNTIME_DIR"] = folder
    if mutated is not None and rank == world - 2:
        replace_kernel(mutated)
    first = refused(lambda: fused.all_gather_matmul(left, weight, tile=TINY))[1]
    if rank == world - 1:
        if mutated is not None:
            return
        Path(folder, f"ready {os.getpid()}").touch()
        time.sleep(600)
    kind, said, _ = refused(lambda: fused.all_gather_matmul(left, weight, tile=TINY))
    Path(folder, f"writing {rank}").write_text(f"{kind}: {said}\nfirst: {first}")
    Path(folder, f"writing {rank}").rename(Path(folder, f"rank {rank}"))
    os._exit(0)
