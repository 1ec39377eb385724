"""What matmuls and collectives cost here, measured by all ranks of a group together, in a quarter of a second or so."""

import time
from collections.abc import Callable
from statistics import median

import torch
import torch.distributed as dist
from torch import Tensor

from resilient.kernels.dispatch.costs import Costs, Line
from resilient.kernels.overlap.call import Operation
from resilient.kernels.overlap.exchange import Gather, Group, Swap

_ROWS = (32, 256, 1024)
_SIDE = {"cpu": 512}  # of the matmuls; a GPU needs larger ones to be filled
_GPU_SIDE = 4096
_SMALL, _LARGE = 1 << 12, 1 << 20  # numbers in the whole tensor
_WIDTH = 64
_ROUNDS = 3


def measure(group: Group, device: torch.device, dtype: torch.dtype) -> Costs:
    """Blocks; all ranks of the group have to call it. The same numbers on all: those of the slowest."""
    side = _SIDE.get(device.type, _GPU_SIDE)
    weight = torch.ones(side, side, dtype=dtype, device=device)
    seconds = []
    for rows in _ROWS:
        input, output = weight.new_ones(rows, side), weight.new_empty(rows, side)
        seconds.append(_timed(lambda a=input, b=output: torch.mm(a, weight, out=b), device))  # type: ignore[misc]
    for operation in COLLECTIVES.values():
        for numbers in (_SMALL, _LARGE):
            rows = numbers // _WIDTH // group.size() * group.size()
            whole = torch.ones(max(rows, group.size()), _WIDTH, dtype=dtype, device=device)
            seconds.append(_timed(lambda run=operation, a=whole: run(a, group), device, group))  # type: ignore[misc]
    agreed = torch.tensor(seconds, dtype=torch.float64).to(device)
    dist.all_reduce(agreed, dist.ReduceOp.MAX, group=group)
    return _costs(agreed.tolist(), side, weight.element_size(), group.size())


def _costs(seconds: list[float], side: int, item: int, world: int) -> Costs:
    rates = {rows: 2 * rows * side * side / took for rows, took in zip(_ROWS, seconds, strict=False)}
    lines: dict[Operation, Line] = {}
    for number, name in enumerate(COLLECTIVES):
        small, large = seconds[len(_ROWS) + 2 * number :][:2]
        per_byte = max(large - small, large / 100) / ((_LARGE - _SMALL) * item)
        lines[name] = Line(latency_s=max(small - _SMALL * item * per_byte, small / 10), bytes_per_s=1 / per_byte)
    return Costs(rates=rates, lines=lines)


def _gather(whole: Tensor, group: Group) -> None:
    rows = len(whole) // group.size()
    gather = Gather(whole[:rows], torch.empty_like(whole), [(0, rows)], group)
    gather.wait(0)
    gather.finish()


def _swap(whole: Tensor, group: Group) -> None:
    swap = Swap(whole, whole.shape[1], [(0, len(whole) // group.size())], group)
    box = swap.outgoing(0)
    for slot in range(len(box)):
        swap.sent(0, slot)
    swap.wait(0)
    swap.finish()


def _reduce(whole: Tensor, group: Group) -> None:
    dist.all_reduce(whole, group=group)


COLLECTIVES: dict[Operation, Callable[[Tensor, Group], None]] = {
    "all_gather_matmul": _gather,
    "matmul_reduce_scatter": _swap,
    "matmul_all_reduce": _reduce,
}


def _timed(call: Callable[[], object], device: torch.device, group: Group | None = None) -> float:
    """Median seconds, the first call apart. With a group, all of its ranks begin at the same time."""
    series = []
    for number in range(_ROUNDS + 1):
        if group is not None:
            dist.barrier(group=group)
        clock = Stopwatch(device)
        call()
        clock.stop()
        if number:
            series.append(clock.seconds())
    return max(median(series), 1e-7)


class Stopwatch:
    """Seconds between its making and `stop`, on the device's own clock where it has one."""

    def __init__(self, device: torch.device) -> None:
        self._events: list[torch.cuda.Event] = []
        if device.type == "cuda":
            self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            self._events[0].record()
        self._began = time.perf_counter()
        self._took = 0.0

    def stop(self) -> None:
        if self._events:
            self._events[1].record()
        self._took = time.perf_counter() - self._began

    def seconds(self) -> float:
        """Blocks until a GPU has done what was between."""
        if not self._events:
            return self._took
        self._events[1].synchronize()
        return float(self._events[0].elapsed_time(self._events[1])) / 1e3
