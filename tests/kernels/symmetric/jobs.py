"""What the processes of the symmetric memory's tests do."""

import os
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from resilient.errors import ResilientError
from resilient.kernels.symmetric import FREE_WORD, SymmetricMemory, open_symmetric

CPU = torch.device("cpu")


def opened(
    name: str = "test", *, buffer_bytes: int = 4096, words: int = 64, timeout_s: float = 30.0
) -> SymmetricMemory:
    return open_symmetric(None, CPU, name=name, buffer_bytes=buffer_bytes, signal_words=words, timeout_s=timeout_s)


def together(body: Callable[..., Any], *arguments: Any) -> Any:
    """Runs a body once all ranks are connected: one that is done at once would leave while gloo still connects."""
    dist.barrier()
    return body(*arguments)


def everybody_writes_to_everybody() -> None:
    memory, rank, size = opened(), dist.get_rank(), dist.get_world_size()
    assert (memory.rank, memory.size) == (rank, size)
    for other in range(size):
        assert not memory.get_signals(other)[FREE_WORD:].any()
    memory.barrier()
    for other in range(size):
        memory.get_buffer(other, (size, 4), torch.float32, 64)[rank] = rank * 10 + other
        memory.get_signals(other)[FREE_WORD + rank] = rank + 1
    memory.barrier(1)
    own = memory.get_buffer(rank, (size, 4), torch.float32, 64)
    assert own[:, 0].tolist() == [other * 10 + rank for other in range(size)]
    assert memory.get_signals(rank)[FREE_WORD : FREE_WORD + size].tolist() == list(range(1, size + 1))
    assert memory.buffer_addresses[rank] == memory.get_buffer(rank, (1,), torch.uint8).data_ptr()
    memory.barrier()
    memory.close()
    memory.close()
    assert own[:, 0].tolist() == [other * 10 + rank for other in range(size)]  # what is held stays


def signals_carry_what_was_written_before(rounds: int) -> None:
    """A token goes round; every rank adds to what came with it."""
    memory, rank, size = opened(), dist.get_rank(), dist.get_world_size()
    own = memory.get_buffer(rank, (1,), torch.int64)
    theirs = memory.get_buffer((rank + 1) % size, (1,), torch.int64)
    chance = random.Random(rank)
    for number in range(rounds):
        if rank > 0 or number > 0:
            memory.wait_signal((rank - 1) % size, channel=2)
        if chance.random() < 0.01:
            time.sleep(0.001)
        theirs[0] = own[0] + 1
        memory.put_signal((rank + 1) % size, channel=2)
    if rank == 0:
        memory.wait_signal(size - 1, channel=2)
        assert int(own[0]) == rounds * size
    memory.barrier()


def two_signals_count_as_two() -> None:
    memory, rank = opened(), dist.get_rank()
    if rank == 0:
        memory.put_signal(1)
        memory.put_signal(1)
    else:
        memory.wait_signal(0)
        memory.wait_signal(0)
    memory.barrier()
    memory.close()


def what_is_refused() -> list[str]:
    memory, said = opened(), []
    for shape, dtype, offset in (((1025,), torch.float32, 0), ((1,), torch.float32, 2), ((1,), torch.uint8, -1)):
        try:
            memory.get_buffer(0, shape, dtype, offset)
        except ResilientError as error:
            said.append(f"{type(error).__name__}: {error}")
    memory.barrier()
    return said


def late(name: str) -> str:
    """Rank 1 does not come to the barrier, or does not even open the memory, before others have given up."""
    store = dist.distributed_c10d._get_default_store()
    memory: Any = None
    try:
        if name == "barrier":
            memory = opened()
        if dist.get_rank() == 1:
            store.wait(["given up"])
        memory = memory or opened(timeout_s=0.2)
        memory.barrier(0, 0.2)
    except ResilientError as error:
        return f"{type(error).__name__}: {error}"
    finally:
        if dist.get_rank() == 0:
            store.set("given up", "")
    return "no error"


def different_sizes() -> str:
    try:
        opened(buffer_bytes=4096 * (1 + dist.get_rank()))
    except ResilientError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def open_descriptors() -> list[int]:
    """How many descriptors and threads of Python this process has, after each of several memories is closed."""
    found = []
    for number in range(6):
        memory = opened(f"again {number}")
        memory.barrier()
        memory.close()
        del memory
        found.append(len(os.listdir("/proc/self/fd")) + threading.active_count())
    dist.barrier()
    return found


def wait_for_the_dead(rank: int, world: int, folder: str) -> None:
    """A process of its own: the last rank is killed while the others wait for it; they write what they got."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=world)
    memory = opened("dying", buffer_bytes=1 << 20)
    memory.barrier()
    if rank == world - 1:
        Path(folder, "ready").touch()
        time.sleep(600)
    begin = time.monotonic()
    try:
        memory.wait_signal(world - 1, timeout_s=60.0)
        said = "no error"
    except ResilientError as error:
        said = f"{type(error).__name__}: {error}"
    Path(folder, f"writing {rank}").write_text(f"{time.monotonic() - begin:.3f} {said}")
    Path(folder, f"writing {rank}").rename(Path(folder, f"rank {rank}"))
    os._exit(0)
