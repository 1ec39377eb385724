"""A checkpoint of one job loaded by another: beside torch's DCP on the same state, and beside a raw read.

For each pair of jobs a snapshot (model and AdamW, about 1.06 GB) is saved both ways; then the other job loads both,
from a cold cache, in turns. Ours is `Checkpointer.restore()`, which verifies every byte; DCP's is `dcp.load` alone,
without putting the loaded state into the model. The limit is every rank reading, all at once and with O_DIRECT, as many
bytes as it needs. Bytes are those that the processes asked the system for (`rchar`). Also: one slice of one large
tensor.
"""

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from bench.levels import evict
from bench.processes import Failure, launch
from bench.report import Report, Rounds, Target, ratio
from bench.settings import Settings

PAIRS = (("fsdp", 4, "fsdp", 2), ("fsdp", 2, "fsdp", 4), ("tensor parallel", 2, "ddp", 2), ("fsdp", 2, "plain", 1))
MIB = 1 << 20
SLICE = "1 MiB of a 64 MiB tensor"


def save(*, folder: str, store: str, shape: str, kind: str) -> dict[str, Any]:
    """Save the job's state both ways into `store`. On every rank."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict

    import resilient

    model, optimizer = job(kind, shape, seed=1)
    state = {"model": model, "optimizer": optimizer}
    checkpointer = resilient.Checkpointer(f"{store}/ours", state, resilient.Policy(durable_every=1))
    checkpointer.save(1).durable("durable").result()
    checkpointer.close()
    both: dict[str, Any] = dict(zip(("model", "optim"), get_state_dict(model, optimizer), strict=True))
    dcp.save(both, checkpoint_id=f"{store}/dcp")
    return {"saved": True}


def load(*, folder: str, store: str, shape: str, kind: str, times: int) -> dict[str, Any]:
    """Median seconds, and bytes read, of both loads and of the limit. On every rank; of the slowest."""
    import torch
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict

    import resilient
    from bench.limits import filled_buffer

    model, optimizer = job(kind, shape, seed=2)
    state = {"model": model, "optimizer": optimizer}
    needed = sum(_local(tensor).nbytes for tensor in _tensors(model, optimizer))
    buffer = filled_buffer(needed)
    files = sorted(Path(store, "ours").rglob("*.safetensors"))
    found: dict[str, list[tuple[float, float]]] = {"ours": [], "dcp": [], "limit": []}

    def ours() -> float:
        checkpointer = resilient.Checkpointer(f"{store}/ours", state, resilient.Policy(durable_every=0))
        seconds = _timed(lambda: checkpointer.restore())
        checkpointer.close()
        return seconds

    def theirs() -> float:
        wanted: dict[str, Any] = dict(zip(("model", "optim"), get_state_dict(model, optimizer), strict=True))
        return _timed(lambda: dcp.load(wanted, checkpoint_id=f"{store}/dcp"))

    acts: dict[str, Callable[[], float]] = {
        "limit": lambda: _timed(lambda: _read(files, buffer)),
        "ours": ours,
        "dcp": theirs,
    }
    for _ in range(times):
        for name, act in acts.items():
            if _rank() == 0:
                evict(Path(store))
            _barrier()
            before = _bytes_read()
            seconds = act()
            read = needed if name == "limit" else _bytes_read() - before
            found[name].append((_most(seconds), _sum(read)))
    assert torch.is_tensor(next(model.parameters()))
    total = _sum(needed)
    return {
        name: {"seconds": median(a for a, _ in rows), "read": median(b for _, b in rows) / total}
        for name, rows in found.items()
    }


def read_slice(*, folder: str, rows: int) -> dict[str, Any]:
    """Bytes that are read for the first rows of a saved tensor of 64 MiB, by us and by DCP."""
    import torch
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp

    import resilient
    from resilient.checkpoint.formats.fetch import fetch
    from resilient.checkpoint.formats.registry import open_source
    from resilient.checkpoint.formats.source import Reference

    weight = torch.randn(64 * rows, 4096)
    checkpointer = resilient.Checkpointer(f"{folder}/ours", {"weight": weight}, resilient.Policy(durable_every=1))
    checkpointer.save(1).durable("durable").result()
    checkpointer.close()
    dcp.save({"weight": weight}, checkpoint_id=f"{folder}/dcp")
    part = torch.zeros(rows, 4096)
    with open_source(Reference(url=f"{folder}/ours")) as source:
        before = _bytes_read()
        fetch(source, source.catalog.tensors["weight"], part.numpy().data.cast("B"), (rows, 0), (rows, 4096))
        ours = _bytes_read() - before
    assert torch.equal(part, weight[rows : 2 * rows])
    theirs = _sharded(rows)
    before = _bytes_read()
    dcp.load({"weight": theirs}, checkpoint_id=f"{folder}/dcp", no_dist=True)
    read = _bytes_read() - before
    dist.destroy_process_group()  # what it said of our rank was not so
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return {"ours": {"read": ours / part.nbytes}, "dcp": {"read": read / part.nbytes}}


def _sharded(rows: int) -> Any:
    """The rows as rank 1 of 64 would ask DCP for them."""
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():  # for one rank, by who started this
        dist.destroy_process_group()
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=64)
    mesh = init_device_mesh("cpu", (64,))
    return DTensor.from_local(torch.zeros(rows, 4096), mesh, [Shard(0)], run_check=False)


def job(kind: str, shape: str, seed: int) -> tuple[Any, Any]:
    """Model and optimizer of a job, with values of its own; AdamW's moments are there."""
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
    from torch.nn.parallel import DistributedDataParallel

    from bench.state import SHAPES, Gpt

    torch.manual_seed(seed)
    model: Any = Gpt(SHAPES[shape])
    if kind == "fsdp":
        for block in model.blocks:
            fully_shard(block)
        fully_shard(model)
    elif kind == "tensor parallel":
        styles: Any = {"query_key_value": ColwiseParallel(), "attended": RowwiseParallel()}
        styles |= {"widen": ColwiseParallel(), "narrow": RowwiseParallel()}
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        parallelize_module(model, mesh, {f"blocks.*.{name}": style for name, style in styles.items()})
    elif kind == "ddp":
        model = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 0.01 * seed)
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


def _tensors(model: Any, optimizer: Any) -> list[Any]:
    import torch

    states = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    return [*model.parameters(), *states]


def _local(tensor: Any) -> Any:
    return getattr(tensor, "_local_tensor", tensor)


def _read(files: list[Path], buffer: Any) -> None:
    """As many bytes as the buffer holds, from the files in turn, each rank from another place, with O_DIRECT."""
    from concurrent.futures import ThreadPoolExecutor

    from bench.limits import REQUEST_BYTES

    opened = [os.open(path, os.O_RDONLY | os.O_DIRECT) for path in files]
    try:
        parts = [
            (number, at) for number, path in enumerate(files) for at in range(0, path.stat().st_size, REQUEST_BYTES)
        ]
        first = len(parts) * _rank() // max(1, _size())
        parts = (parts[first:] + parts[:first]) * 2
        wanted = [(at, min(at + REQUEST_BYTES, len(buffer))) for at in range(0, len(buffer), REQUEST_BYTES)]
        with memoryview(buffer) as view, ThreadPoolExecutor(4) as pool:
            list(
                pool.map(
                    lambda row: os.preadv(opened[row[1][0]], [view[row[0][0] : row[0][1]]], row[1][1]),
                    zip(wanted, parts, strict=False),
                )
            )
    finally:
        for file in opened:
            os.close(file)


def _bytes_read() -> int:
    for line in Path("/proc/self/io").read_text().splitlines():
        if line.startswith("rchar:"):
            return int(line.split()[1])
    raise AssertionError("this system does not count what a process reads")


def _timed(act: Callable[[], object]) -> float:
    _barrier()
    began = time.perf_counter()
    act()
    return time.perf_counter() - began


def _rank() -> int:
    import torch.distributed as dist

    return dist.get_rank() if dist.is_initialized() else 0


def _size() -> int:
    import torch.distributed as dist

    return dist.get_world_size() if dist.is_initialized() else 1


def _barrier() -> None:
    import torch.distributed as dist

    if dist.is_initialized():
        dist.barrier()


def _most(value: float) -> float:
    return _reduced(value, "MAX")


def _sum(value: float) -> float:
    return _reduced(value, "SUM")


def _reduced(value: float, how: str) -> float:
    import torch
    import torch.distributed as dist

    if not dist.is_initialized():
        return value
    found = torch.tensor([value], dtype=torch.float64)
    dist.all_reduce(found, getattr(dist.ReduceOp, how))
    return float(found.item())


def run(settings: Settings) -> list[Report]:
    rounds = Rounds()
    shape = "tiny" if settings.smoke else "large"
    store = settings.place.scratch.with_name("reshape-store")
    try:
        for number in range(settings.rounds):
            rounds.begin()
            for before, size, after, other in PAIRS:
                name = f"{before} {size} → {after} {other}"
                settings.say(f"reshape, round {number + 1} of {settings.rounds}: {name}")
                shutil.rmtree(store, ignore_errors=True)
                store.mkdir(parents=True)
                arguments: dict[str, Any] = {"store": str(store), "shape": shape, "kind": before}
                found = launch(settings.place, "bench.reshape:save", arguments, ranks=size, threads=1)
                if not isinstance(found, Failure):
                    arguments |= {"kind": after, "times": 2 if settings.quick else 3}
                    found = launch(settings.place, "bench.reshape:load", arguments, ranks=other, threads=1)
                _note(rounds, name, found)
            found = launch(settings.place, "bench.reshape:read_slice", {"rows": 8 if settings.smoke else 64})
            _note(rounds, SLICE, found)
    finally:
        shutil.rmtree(store, ignore_errors=True)
    return [_report(rounds)]


def _note(rounds: Rounds, name: str, found: dict[str, Any] | Failure) -> None:
    if isinstance(found, Failure):
        rounds.failed(name, found.reason)
    else:
        rounds.add(name, {f"{who} {what}": value for who, row in found.items() for what, value in row.items()})


def _middle(rounds: Rounds, name: str, measure: str) -> float | None:
    found = [value for value in rounds.series(name, measure) if value is not None]
    return median(found) if found else None


def _report(rounds: Rounds) -> Report:
    rows: dict[str, list[float | None]] = {}
    targets = []
    for before, size, after, other in PAIRS:
        name = f"{before} {size} → {after} {other}"
        ours, dcp, limit = (rounds.series(name, f"{who} seconds") for who in ("ours", "dcp", "limit"))
        read = [_middle(rounds, name, f"{who} read") for who in ("ours", "dcp")]
        rows[name] = [ratio(limit, ours), ratio(ours, dcp), *read]
        targets += [
            Target(what=f"{name}: speed / raw read", value=rows[name][0], bound=0.85, at_most=False),
            Target(what=f"{name}: time / DCP's load", value=rows[name][1], bound=1.0),
            Target(what=f"{name}: bytes read / needed", value=rows[name][2], bound=1.1),
        ]
    slices = [_middle(rounds, SLICE, f"{who} read") for who in ("ours", "dcp")]
    rows[SLICE] = [None, None, *slices]
    targets.append(Target(what=f"{SLICE}: bytes read / needed", value=slices[0], bound=1.1))
    return Report(
        name="reshape",
        title="Loading a checkpoint into a job of another shape",
        columns=("speed / raw read", "time / DCP", "read / needed", "DCP's read / needed"),
        rows=rows,
        targets=targets,
        plotted=("speed / raw read", "time / DCP"),
        samples=rounds.samples,
        failures=rounds.failures,
        notes=("raw read: every rank reads as many bytes as it needs, all at once, with O_DIRECT",),
    )
