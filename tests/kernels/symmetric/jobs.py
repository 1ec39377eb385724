"""What the processes of the symmetric memory's tests do."""

import gc
import os
import random
import resource
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from resilient.errors import ResilientError
from resilient.kernels.symmetric import FREE_WORD, SymmetricMemory, open_symmetric
from resilient.kernels.symmetric.peers import Member, make_segment, open_segments

CPU = torch.device("cpu")


def opened(
    name: str = "test",
    *,
    buffer_bytes: int = 4096,
    words: int = 64,
    timeout_s: float = 30.0,
    device: torch.device = CPU,
) -> SymmetricMemory:
    return open_symmetric(None, device, name=name, buffer_bytes=buffer_bytes, signal_words=words, timeout_s=timeout_s)


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


def late(name: str, device: str = "cpu") -> str:
    """Rank 1 does not come to the barrier, or does not even open the memory, before others have given up."""
    store = dist.distributed_c10d._get_default_store()
    memory: Any = None
    try:
        if name == "barrier":
            memory = opened()
        if dist.get_rank() == 1:
            store.wait(["given up"])
            if device == "cuda":  # which there need not be
                return ""
        memory = memory or opened(timeout_s=0.2, device=torch.device(device))
        memory.barrier(0, 0.2)
    except ResilientError as error:
        return f"{type(error).__name__}: {error}"
    finally:
        if dist.get_rank() == 0:
            store.set("given up", "")
    return "no error"


def different_sizes(device: str) -> str:
    try:
        opened(buffer_bytes=4096 * (1 + dist.get_rank()), device=torch.device(device))
    except ResilientError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def one_cannot_open() -> str:
    """Rank 1 has no descriptors left, once the memory of the first open is let go of."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    memory = opened("first")
    before = len(os.listdir("/proc/self/fd"))
    found = []
    for room in range(2, 5):  # each step of the opening takes its turn to fail
        dist.barrier()
        if dist.get_rank() == 1:
            resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free(room), limits[1]))
        try:
            opened(f"short of {room}", timeout_s=20.0)
        except ResilientError as error:
            found.append(f"{type(error).__name__}: {error}")
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        dist.barrier()
        assert len(os.listdir("/proc/self/fd")) == before
    memory.close()
    return "\n".join(found)


def no_address_space() -> None:
    """A rank's memory cannot be mapped: that is said, and its descriptor does not stay open."""
    own, other = make_segment(64 << 20, "own"), make_segment(64 << 20, "other")
    member = Member(place="", host="here", pid=os.getpid(), fd=other.fd, nonce=other.nonce, sizes=(1,))
    limits = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (32 << 20), limits[1]))
    try:
        open_segments([member, member], 0, own)
        said = "no error"
    except ResilientError as error:
        said = f"{type(error).__name__}: {error}"
    resource.setrlimit(resource.RLIMIT_AS, limits)
    assert said.startswith("OverBudget: the system does not map"), said
    assert len(os.listdir("/proc/self/fd")) == before


def a_fork_lets_go() -> None:
    """A process that was forked off lets go of the memory; nobody takes that for the rank's own leave."""
    memory, other = opened("forked"), 1 - dist.get_rank()
    child = os.fork()
    if child == 0:
        memory.close()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    dist.barrier()
    assert any(one.name == "resilient-symmetric" and one.is_alive() for one in threading.enumerate())
    memory.put_signal(other)
    memory.wait_signal(other)
    memory.barrier()
    memory.close()


def lowest_free(count: int) -> int:
    """The limit under which so many descriptors can still be opened."""
    taken = {int(one) for one in os.listdir("/proc/self/fd")}
    return [number for number in range(1 << 12) if number not in taken][count]


def open_descriptors(closed: bool) -> list[int]:
    """How many descriptors and threads of Python are there after each of several memories is closed or dropped."""
    found = []
    for number in range(6):
        memory = opened(f"again {number}")
        memory.barrier()
        if closed:
            memory.close()
        del memory
        gc.collect()
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


def finish_without_one(rank: int, world: int, folder: str) -> None:
    """A process of its own: rank 0 exits in order; the others go on, then miss it, and write what they got."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=world)
    memory = opened("leaving")
    memory.barrier()
    if rank == 0:
        return
    said = []
    if rank == 2:
        wait_for(Path(folder, "rank 0 has ended"))
        memory.put_signal(1, channel=1)
    for other in (3 - rank, 0):
        try:
            memory.wait_signal(other, channel=1, timeout_s=60.0)
            if rank == 1:
                memory.put_signal(2, channel=1)
            said.append("signalled")
        except ResilientError as error:
            said.append(f"{type(error).__name__}: {error}")
    Path(folder, f"writing {rank}").write_text("\n".join(said))
    Path(folder, f"writing {rank}").rename(Path(folder, f"rank {rank}"))
    os._exit(0)


def wait_for(path: Path, deadline_s: float = 60.0) -> None:
    end = time.monotonic() + deadline_s
    while not path.exists():
        assert time.monotonic() < end, path
        time.sleep(0.005)
