"""What the ranks of the backend's tests do: bodies for `tests.multiprocess.ranks.run`, in processes of their own."""

import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import resilient.comms.backend as backend
from resilient.errors import CollectiveFailed, CollectiveMismatch, UsageError

LARGE = 300_001  # numbers; more than 1 MiB of float32, and nothing divides it


def group(**more: Any) -> Any:
    made = dist.new_group(backend="resilient", timeout=timedelta(seconds=30), **more)
    assert made is not None
    return made


def values(count: int, dtype: torch.dtype, seed: int = 0, rank: int | None = None) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * seed + (dist.get_rank() if rank is None else rank))
    if dtype.is_floating_point:
        return torch.randn(count, generator=generator).to(dtype)
    return torch.randint(-3, 4, (count,), generator=generator).to(dtype)


def same(one: Tensor, other: Tensor, tolerance: float = 0.0) -> None:
    torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def striped_bytes(made: Any) -> int:
    """How much has gone over lanes from this rank."""
    return sum(lane["bytes"] for lane in made.striped.report()["lanes"])


def which_group_it_is() -> list[str]:
    """The kind of group that this rank gets, and what its backend is called."""
    made = group()
    return [type(made).__name__, made.name() if hasattr(made, "name") else ""]


def all_as_gloo() -> None:
    """Every collective, large and small, beside gloo's."""
    ours, size, rank = group(), dist.get_world_size(), dist.get_rank()
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.int64: 0.0}
    for dtype in tolerance:
        for count in (3, LARGE):
            for op in (dist.ReduceOp.SUM, dist.ReduceOp.MIN, dist.ReduceOp.MAX, dist.ReduceOp.PRODUCT):
                one, other = values(count, dtype), values(count, dtype)
                dist.all_reduce(one, op, group=ours)
                dist.all_reduce(other, op)
                same(one, other, tolerance[dtype])
            for root in range(size):
                one = values(count, dtype)
                dist.broadcast(one, root, group=ours)
                same(one, values(count, dtype, rank=root))
            gathered = torch.empty(size * count, dtype=dtype)
            dist.all_gather_into_tensor(gathered, values(count, dtype), group=ours)
            same(gathered, torch.cat([values(count, dtype, rank=r) for r in range(size)]))
            parts = [torch.empty(count, dtype=dtype) for _ in range(size)]
            dist.all_gather(parts, values(count, dtype), group=ours)
            same(torch.cat(parts), gathered)
            _scattered(ours, count, dtype, tolerance[dtype])
            _exchanged(ours, count, dtype)
    average = values(LARGE, torch.float32)
    dist.all_reduce(average, dist.ReduceOp.AVG, group=ours)
    same(average, torch.stack([values(LARGE, torch.float32, rank=r) for r in range(size)]).mean(0), 1e-5)
    bits = torch.full((LARGE,), 1 << rank, dtype=torch.int32)
    dist.all_reduce(bits, dist.ReduceOp.BOR, group=ours)
    assert int(bits[5]) == (1 << size) - 1
    assert striped_bytes(ours) > 10 * LARGE
    dist.destroy_process_group(ours)


def _scattered(ours: Any, count: int, dtype: torch.dtype, tolerance: float) -> None:
    size, rank = dist.get_world_size(), dist.get_rank()
    wanted = torch.stack([values(size * count, dtype, 3, r) for r in range(size)]).sum(0)
    wanted = wanted[rank * count : (rank + 1) * count]
    output = torch.empty(count, dtype=dtype)
    dist.reduce_scatter_tensor(output, values(size * count, dtype, 3), group=ours)
    same(output, wanted, 2 * tolerance)
    output.zero_()
    dist.reduce_scatter(output, list(values(size * count, dtype, 3).chunk(size)), group=ours)
    same(output, wanted, 2 * tolerance)


def _exchanged(ours: Any, count: int, dtype: torch.dtype) -> None:
    size, rank = dist.get_world_size(), dist.get_rank()
    output = torch.empty(size * count, dtype=dtype)
    dist.all_to_all_single(output, values(size * count, dtype, 4), group=ours)
    wanted = [values(size * count, dtype, 4, r)[rank * count : (rank + 1) * count] for r in range(size)]
    same(output, torch.cat(wanted))
    sent = [[(3 * i + j) % 4 * (count // 3) for j in range(size)] for i in range(size)]
    received = [sent[r][rank] for r in range(size)]
    output = torch.empty(sum(received), dtype=dtype)
    dist.all_to_all_single(output, values(sum(sent[rank]), dtype, 5), received, sent[rank], group=ours)
    wanted = [values(sum(sent[r]), dtype, 5, r).split(sent[r])[rank] for r in range(size)]
    same(output, torch.cat(wanted))
    pieces = [torch.empty(number, dtype=dtype) for number in received]
    dist.all_to_all(pieces, list(values(sum(sent[rank]), dtype, 5).split(sent[rank])), group=ours)
    same(torch.cat(pieces), output)


def in_every_manner() -> None:
    """Async, futures, shapes that are not contiguous, objects, functional, coalesced, point to point, subgroups."""
    ours, size, rank = group(), dist.get_world_size(), dist.get_rank()
    total = size * (size + 1) // 2
    works = [(tensor := torch.full((LARGE,), float(rank + 1)), dist.all_reduce(tensor, group=ours, async_op=True))]
    works += [(small := torch.ones(5), dist.all_reduce(small, group=ours, async_op=True))]
    works += [(other := torch.full((LARGE,), 2.0), dist.all_reduce(other, group=ours, async_op=True))]
    for _, work in reversed(works):
        assert work is not None
        work.wait()
        assert work.is_completed()
    assert (float(tensor[7]), float(small[0]), float(other[-1])) == (total, size, 2 * size)
    work = dist.all_reduce(tensor, group=ours, async_op=True)
    assert work is not None
    assert work.get_future().then(lambda done: float(done.value()[0][0])).wait() == total * size

    slanted = torch.full((700, 800), float(rank + 1)).t()
    dist.all_reduce(slanted, group=ours)
    assert bool((slanted == total).all())
    gathered = torch.zeros(size * 800, 700)
    dist.all_gather_into_tensor(gathered, slanted, group=ours)
    assert bool((gathered == total).all())
    bare = torch.zeros(LARGE, dtype=torch.bool)
    dist.broadcast(bare.logical_not_() if rank == 0 else bare, 0, group=ours)
    assert bool(bare.all())

    objects: list[Any] = [None] * size
    dist.all_gather_object(objects, {"rank": rank}, group=ours)
    assert objects == [{"rank": number} for number in range(size)]
    dist.barrier(group=ours)
    if rank == 0:
        dist.send(torch.full((LARGE,), 3.0), 1, group=ours)
    elif rank == 1:
        box = torch.zeros(LARGE)
        dist.recv(box, 0, group=ours)
        assert float(box[-1]) == 3.0
        assert "name the source" in caught(UsageError, lambda: dist.recv(box, group=ours))
    _passed_around(ours)

    summed = functional.all_reduce(torch.full((LARGE,), 1.0), "sum", ours)
    assert float(summed[0]) == size
    spread = functional.reduce_scatter_tensor(torch.ones(size * LARGE), "sum", 0, ours)
    assert spread.shape == (LARGE,)
    assert float(spread[0]) == size
    joined = functional.all_gather_tensor(torch.full((LARGE,), float(rank)), 0, ours)
    assert [float(joined[number * LARGE]) for number in range(size)] == list(range(size))
    many = functional.all_reduce_coalesced([torch.ones(LARGE), torch.ones(2)], "sum", ours)
    assert [float(one[0]) for one in many] == [size, size]

    pair = group(ranks=[0, size - 1])
    if rank in (0, size - 1):
        one = torch.full((LARGE,), float(rank + 1))
        dist.all_reduce(one, group=pair)
        assert float(one[0]) == size + 1
    dist.barrier()
    dist.destroy_process_group(ours)


def _passed_around(ours: Any) -> None:
    """Messages both ways at once, of two tags, the later ones received first; one of them is not contiguous."""
    size, rank = dist.get_world_size(), dist.get_rank()
    after, before = (rank + 1) % size, (rank - 1) % size
    boxes = [torch.zeros(600, 800).t(), torch.zeros(LARGE), torch.zeros(4)]
    sent = [torch.full((800, 600), float(rank)), torch.full((LARGE,), rank + 0.5), torch.full((4,), rank + 0.25)]
    works = [dist.irecv(box, before, group=ours, tag=tag) for tag, box in reversed(list(enumerate(boxes)))]
    works += [dist.isend(tensor, after, group=ours, tag=tag) for tag, tensor in enumerate(sent)]
    for work in works:
        assert work is not None
        work.wait()
    assert [float(box.reshape(-1)[-1]) for box in boxes] == [before, before + 0.5, before + 0.25]


def compiled() -> None:
    ours, size = group(), dist.get_world_size()

    def step(tensor: Tensor) -> Tensor:
        summed: Tensor = functional.all_reduce(tensor * 2, "sum", ours)
        return summed + 1

    made = torch.compile(step, backend="aot_eager", fullgraph=True)(torch.ones(LARGE))
    assert float(made[0]) == 2 * size + 1
    dist.barrier()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(256, 2048), nn.Linear(2048, 64)

    def forward(self, batch: Tensor) -> Tensor:
        output: Tensor = self.second(torch.relu(self.first(batch)))
        return output


def _net() -> Net:
    torch.manual_seed(0)
    return Net()


def _trained(model: nn.Module, steps: int = 4) -> list[float]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for step in range(steps):
        batch = values(32 * 256, torch.float32, 100 + step).view(32, 256)
        loss = model(batch).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        whole = loss.detach().clone()
        dist.all_reduce(whole, dist.ReduceOp.AVG)
        losses.append(float(whole))
    return losses


def _close(one: list[float], other: list[float]) -> None:
    torch.testing.assert_close(torch.tensor(one), torch.tensor(other), rtol=1e-4, atol=1e-6)
    assert one[0] != one[-1]


def trains_with_ddp() -> None:
    ours = group()
    plain = _trained(DistributedDataParallel(_net()))
    _close(_trained(DistributedDataParallel(_net(), process_group=ours)), plain)
    assert striped_bytes(ours) > 1 << 20
    striped = backend.stripe(timeout=timedelta(seconds=30))
    hooked = DistributedDataParallel(_net())
    hooked.register_comm_hook(striped, backend.all_reduce_hook)
    _close(_trained(hooked), plain)
    assert sum(lane["bytes"] for lane in striped.report()["lanes"]) > 1 << 20
    striped.close()
    dist.barrier()


def trains_with_fsdp2() -> None:
    size = dist.get_world_size()
    mesh = init_device_mesh("cpu", (size,))
    plain = _trained(_sharded(mesh))
    ours = group()
    _close(_trained(_sharded(DeviceMesh.from_group(ours, "cpu"))), plain)
    assert striped_bytes(ours) > 1 << 20
    striped = backend.stripe(timeout=timedelta(seconds=30))
    model = _sharded(mesh)
    model.set_custom_all_gather(backend.AllGather(striped))
    model.set_custom_reduce_scatter(backend.ReduceScatter(striped))
    _close(_trained(model), plain)
    assert sum(lane["bytes"] for lane in striped.report()["lanes"]) > 1 << 20
    weight = distribute_tensor(torch.arange(12.0).view(6, 2), mesh, [Shard(0)])
    assert isinstance(weight, DTensor)
    assert float(weight.full_tensor().sum()) == 66
    striped.close()
    dist.barrier()


def _sharded(mesh: Any) -> Any:
    return fully_shard(_net(), mesh=mesh)


def caught(kind: type[Exception], call: Any) -> str:
    try:
        call()
    except kind as error:
        return str(error)
    raise AssertionError(f"no {kind.__name__}")


def wrong_calls() -> list[str]:
    """Each is an error on all ranks, before anything is sent; the group goes on."""
    ours, size = group(), dist.get_world_size()
    made = ours.striped
    texts = [
        caught(UsageError, lambda: dist.all_reduce(torch.zeros(LARGE * 4, dtype=torch.int16), group=ours)),
        caught(UsageError, lambda: dist.all_reduce(torch.zeros(LARGE), dist.ReduceOp.BAND, group=ours)),
        caught(UsageError, lambda: made.all_gather(torch.zeros(LARGE), torch.zeros(LARGE))),
        caught(UsageError, lambda: made.broadcast(torch.zeros(LARGE), size)),
        caught(UsageError, lambda: made.all_to_all(torch.zeros(LARGE), torch.zeros(LARGE), [1] * size, [1] * size)),
        caught(UsageError, lambda: made.reduce_scatter(torch.zeros(2), torch.zeros(2 * size, dtype=torch.float64))),
    ]
    tensor = torch.ones(LARGE)
    dist.all_reduce(tensor, group=ours)
    assert float(tensor[0]) == size
    dist.destroy_process_group(ours)
    return texts


def disagreement() -> str:
    """Ranks that call different collectives."""
    ours, rank = group(), dist.get_rank()
    tensor = torch.zeros(LARGE)

    def call() -> None:
        if rank == 1:
            dist.broadcast(tensor, 0, group=ours)
        else:
            dist.all_reduce(tensor, group=ours)

    text = caught(CollectiveMismatch, call)
    assert caught(CollectiveMismatch, lambda: dist.all_reduce(tensor, group=ours)) == text
    dist.barrier()
    return text


def abort_and_again() -> str:
    """One rank gives up; a new group of the same ranks works."""
    ours, rank, size = group(), dist.get_rank(), dist.get_world_size()
    tensor = torch.ones(LARGE)
    if rank == 1:
        ours.abort()
    text = caught(CollectiveFailed, lambda: dist.all_reduce(tensor, group=ours))
    assert isinstance(_failure(ours), RuntimeError)
    again = group()
    tensor = torch.ones(LARGE)
    dist.all_reduce(tensor, group=again)
    assert float(tensor[0]) == size
    dist.barrier()
    return text


def _failure(ours: Any) -> Exception | None:
    work = dist.all_reduce(torch.ones(LARGE), group=ours, async_op=True)
    assert work is not None
    caught(CollectiveFailed, work.wait)
    error: Exception | None = work.exception()
    return error


def as_the_default_group() -> None:
    """By both of its names, one after the other, with torchrun's way of meeting; then after a failure."""
    rank, size = dist.get_rank(), dist.get_world_size()
    folder = os.environ["RESILIENT_TOPOLOGY"] + ".stores"
    os.makedirs(folder, exist_ok=True)
    for turn, name in enumerate(("resilient", "cpu:resilient", "resilient")):
        dist.destroy_process_group()
        store = dist.FileStore(f"{folder}/{turn}", size)
        dist.init_process_group(name, store=store, rank=rank, world_size=size, timeout=timedelta(seconds=30))
        assert dist.group.WORLD is not None
        tensor = torch.ones(LARGE)
        dist.all_reduce(tensor)
        assert float(tensor[0]) == size
        assert striped_bytes(dist.group.WORLD) > LARGE
        if turn == 1:
            dist.barrier()
            if rank == 0:
                dist.group.WORLD.abort()
            caught(CollectiveFailed, lambda: dist.all_reduce(torch.ones(LARGE)))


def stripes_of_subgroups() -> None:
    """Ranks that have made different numbers of stripes before meet all the same."""
    rank = dist.get_rank()
    pair: Any = dist.new_group([0, 1])
    made = [backend.stripe(pair, timeout=timedelta(seconds=30))] if rank < 2 else []
    made.append(backend.stripe(timeout=timedelta(seconds=30)))
    for striped in made:
        tensor = torch.ones(LARGE)
        striped.all_reduce(tensor).wait()
        assert float(tensor[0]) == striped.size
    dist.barrier()
    for striped in made:
        striped.close()


def refused() -> str:
    return caught(UsageError, group)


def no_lanes() -> str:
    return caught(UsageError, lambda: backend.stripe(timeout=timedelta(seconds=30)))


def lists_of_other_sizes() -> None:
    """What one rank sends and gets is equal, and small; what others do is not."""
    ours, rank = group(), dist.get_rank()
    sent = [[10, 10, 10], [10, 5, 20], [10, 20, 5]]
    outputs = [torch.zeros(sent[other][rank]) for other in range(3)]
    dist.all_to_all(outputs, [torch.full((count,), float(rank)) for count in sent[rank]], group=ours)
    assert [float(output[0]) for output in outputs] == [0, 1, 2]
    dist.barrier()
