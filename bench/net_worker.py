"""What a rank of `bench/net.py` does: collectives by one method, with a stop before and after each kind.

    net_worker.py FOLDER METHOD PHASES REPEATS

PHASES: JSON of [collective, MiB] pairs. Rank 0 says `ready0` by a file in FOLDER, waits for `go0`, and leaves the times
in `done0`; and so on. The method "beside" takes sizes in bytes, and leaves `beside`: by size, our time and gloo's, of
which the median pair is taken: the two are run one right after the other.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import resilient.comms.backend  # noqa: F401  registers itself

_TIMEOUT = timedelta(seconds=120)
_WAIT_S = 60.0
_USUAL_MIB = 16


def main() -> None:
    folder, method, phases, repeats = Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3]), int(sys.argv[4])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=_TIMEOUT)
    if method == "beside":
        _beside(folder, [size for _, size in phases], repeats)
    else:
        groups = _groups(method)
        for number, (name, mib) in enumerate(phases):
            times = max(3, min(repeats, int(repeats * _USUAL_MIB / mib)))  # large ones take long
            _phase(folder, number, _call(name, int(mib * (1 << 20)), groups), times)
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)


def _groups(method: str) -> list[Any]:
    """One; or several, among which tensors are cut equally."""
    if method == "resilient":
        return [dist.new_group(backend="resilient", timeout=_TIMEOUT)]
    if method == "gloo":
        return [dist.new_group(backend="gloo", timeout=_TIMEOUT)]
    if method == "gloo, 4 groups":
        return [dist.new_group(backend="gloo", timeout=_TIMEOUT) for _ in range(4)]
    names = sorted(name for name in os.listdir("/sys/class/net") if name.startswith("eth"))
    names = names or [f"eth{number}" for number in range(2)]
    return [_on_interface(name) for name in names]


def _on_interface(name: str) -> Any:
    os.environ["GLOO_SOCKET_IFNAME"] = name
    return dist.new_group(backend="gloo", timeout=_TIMEOUT)


def _call(name: str, nbytes: int, groups: list[Any]) -> Callable[[], None]:
    """Of a tensor of so many bytes: the whole one, for those that gather or scatter."""
    size = dist.get_world_size()
    count = nbytes // 4 // len(groups) // size * size
    wholes = [torch.ones(count) for _ in groups]
    others = [torch.ones(count) for _ in groups]
    parts = [torch.ones(count // size) for _ in groups]

    def start(number: int) -> Any:
        group, whole, part = groups[number], wholes[number], parts[number]
        if name == "all_reduce":
            return dist.all_reduce(whole, group=group, async_op=True)
        if name == "all_gather":
            return dist.all_gather_into_tensor(whole, part, group=group, async_op=True)
        if name == "reduce_scatter":
            return dist.reduce_scatter_tensor(part, whole, group=group, async_op=True)
        return dist.all_to_all_single(others[number], whole, group=group, async_op=True)

    def call() -> None:
        for work in [start(number) for number in range(len(groups))]:
            work.wait()

    return call


def _phase(folder: Path, number: int, call: Callable[[], None], repeats: int) -> None:
    for _ in range(3):  # connections are made, and rates found out
        dist.barrier()
        call()
    dist.barrier()
    if dist.get_rank() == 0:
        (folder / f"ready{number}").touch()
        end = time.monotonic() + _WAIT_S
        while not (folder / f"go{number}").exists():
            assert time.monotonic() < end, "nobody says go"
            time.sleep(0.005)
    times = torch.zeros(repeats)
    for turn in range(repeats):
        dist.barrier()
        began = time.monotonic()
        call()
        times[turn] = time.monotonic() - began
    dist.all_reduce(times, dist.ReduceOp.MAX)
    if dist.get_rank() == 0:
        _leave(folder / f"done{number}", times.tolist())


def _beside(folder: Path, sizes: list[int], repeats: int) -> None:
    """In turns, so that both see the same machine."""
    groups = [dist.new_group(backend=name, timeout=_TIMEOUT) for name in ("resilient", "gloo")]
    found = {}
    for size in sizes:
        tensor = torch.zeros(max(1, size // 4))
        pairs = []
        for turn in range(repeats):
            took = [0.0, 0.0]
            for which in (turn % 2, 1 - turn % 2):  # neither is always the first
                dist.barrier()
                began = time.perf_counter()
                _reduce(tensor, groups[which])
                took[which] = time.perf_counter() - began
            pairs.append((took[0], took[1]))
        usual = median(gloo for _, gloo in pairs)
        found[size] = [usual * median(ours / gloo for ours, gloo in pairs), usual]
    if dist.get_rank() == 0:
        _leave(folder / "beside", found)


def _reduce(tensor: Tensor, group: Any) -> None:
    dist.all_reduce(tensor, group=group)


def _leave(path: Path, value: object) -> None:
    new = path.with_suffix(".new")
    new.write_text(json.dumps(value))
    new.rename(path)


if __name__ == "__main__":
    main()
