"""The fused kernels on GPUs: python bench/gpu.py docs/gpu.md [--quick]. `make bench-gpu` does it.

One rank: the product alone, beside cuBLAS. As many ranks as GPUs, where there are several: each kernel beside cuBLAS
with NCCL's collective, and beside torch's own fused operators. Where there is one, two ranks share it, for correctness
only: kernels that wait for one another then take turns on the GPU, and no time of theirs means anything.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch import Tensor  # noqa: E402

from bench.overlap_job import in_turn  # noqa: E402
from resilient.kernels import fused  # noqa: E402
from resilient.kernels.fused.shapes import OPERATIONS, Operation  # noqa: E402

Way = Callable[[], object]
TARGET = 0.85  # of cuBLAS, the product alone
_ALONE = ((4096, 4096, 4096), (8192, 4096, 4096), (8192, 8192, 8192))  # m, n, k
_TOGETHER = ((2048, 8192, 8192), (8192, 8192, 4096))  # m, and n and k of all ranks
_DTYPES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True, kw_only=True)
class Timed:
    """`seconds` of each way. `flops`: of one rank."""

    what: str
    shape: tuple[int, int, int]
    dtype: str
    flops: float
    seconds: dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What a page is made of. `differences`: the largest of each operation, as a share of the largest number."""

    device: str
    versions: str
    ranks: int
    alone: Sequence[Timed]
    together: Sequence[Timed]
    differences: dict[str, float]


def page(found: Found) -> str:
    """docs/gpu.md."""
    peak = max(one.flops / min(one.seconds.values()) for one in found.alone)
    lines = [
        "# The fused kernels on GPUs",
        "",
        f"{found.device}, {found.versions}. Written by `make bench-gpu`; medians. The measured peak is the quickest "
        f"product below, {peak / 1e12:.0f} TFLOP/s.",
        "",
        "## The product alone, one rank",
        "",
        *_table(found.alone, ("fused", "cuBLAS"), peak),
        "",
        *(_verdict(one) for one in found.alone),
        "",
        "## With the collective",
        "",
    ]
    if found.together:
        ways = ("fused", "cuBLAS + NCCL", "torch symm_mem")
        lines += [f"{found.ranks} ranks, a GPU each.", "", *_table(found.together, ways, peak), ""]
    else:
        lines += [f"{found.ranks} ranks shared one GPU, for correctness only: no time of theirs means anything.", ""]
    lines += ["| operation | largest difference from float64, as a share of the largest number |", "|---|---|"]
    lines += [f"| {name} | {value:.1e} |" for name, value in found.differences.items()]
    return "\n".join(lines) + "\n"


def _table(rows: Sequence[Timed], ways: Sequence[str], peak: float) -> list[str]:
    head = [f"{way}, TFLOP/s (share of the peak)" for way in ways]
    lines = [f"| | M × N × K | dtype | {' | '.join(head)} |", "|---" * (3 + len(ways)) + "|"]
    for one in rows:
        cells = []
        for way in ways:
            seconds = one.seconds.get(way)
            rate = one.flops / seconds if seconds else None
            cells.append("–" if rate is None else f"{rate / 1e12:.0f} ({rate / peak:.2f})")
        lines.append(f"| {one.what} | {' × '.join(map(str, one.shape))} | {one.dtype} | {' | '.join(cells)} |")
    return lines


def _verdict(one: Timed) -> str:
    share = one.seconds["cuBLAS"] / one.seconds["fused"]
    said = "reached" if share >= TARGET else "missed"
    return f"- {' × '.join(map(str, one.shape))}, {one.dtype}: {share:.2f} of cuBLAS (target {TARGET}): {said}"


def timed(call: Way, repeats: int) -> float:
    """Median seconds on the device, three calls to warm up apart."""
    series = []
    for number in range(repeats + 3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        if number >= 3:
            series.append(begin.elapsed_time(end) / 1e3)
    return float(statistics.median(series))


def alone(repeats: int) -> list[Timed]:
    """A rank without others: the kernel has nobody to wait for."""
    rows = []
    for dtype in _DTYPES:
        for m, n, k in _ALONE:
            left, weight = (torch.randn(shape, dtype=dtype, device="cuda") for shape in ((m, k), (k, n)))
            ways: dict[str, Way] = {
                "fused": partial(fused.all_gather_matmul, left, weight),
                "cuBLAS": partial(torch.mm, left, weight),
            }
            rows.append(_row("the product", (m, n, k), dtype, 2.0 * m * n * k, ways, repeats))
    fused.check()
    return rows


def together(repeats: int) -> list[Timed]:
    """Each kernel beside what it replaces. Columns of a gather, and the depth of the others, are cut over the ranks."""
    rows, world = [], dist.get_world_size()
    for operation in OPERATIONS:
        for m, n, k in _TOGETHER:
            gathers = operation == "all_gather_matmul"
            n, k = (n // world, k) if gathers else (n, k // world)
            left = torch.randn(m // world if gathers else m, k, dtype=torch.bfloat16, device="cuda")
            weight = torch.randn(k, n, dtype=torch.bfloat16, device="cuda")
            ways: dict[str, Way] = {
                "fused": partial(getattr(fused, operation), left, weight),
                "cuBLAS + NCCL": partial(in_turn, operation, left, weight),
            }
            theirs = _torchs_own(operation, left, weight)
            if theirs is not None:
                ways["torch symm_mem"] = theirs
            rows.append(_row(operation, (m, n, k), torch.bfloat16, 2.0 * m * n * k, ways, repeats))
    fused.check()
    return rows


def _torchs_own(operation: Operation, left: Tensor, weight: Tensor) -> Way | None:
    """Its fused operator, where it has one."""
    group = dist.group.WORLD
    assert group is not None
    name, operators = group.group_name, torch.ops.symm_mem
    if operation == "all_gather_matmul":
        return lambda: operators.fused_all_gather_matmul(left, [weight], gather_dim=0, group_name=name)
    if operation == "matmul_reduce_scatter":
        return lambda: operators.fused_matmul_reduce_scatter(left, weight, "sum", scatter_dim=0, group_name=name)
    return None


def _row(
    what: str, shape: tuple[int, int, int], dtype: torch.dtype, flops: float, ways: dict[str, Way], repeats: int
) -> Timed:
    """Of all ranks the slowest counts. Nobody begins a way before all are there."""
    found = []
    for call in ways.values():
        if dist.get_world_size() > 1:
            torch.cuda.synchronize()
            dist.barrier()
        found.append(timed(call, repeats))
    slowest = torch.tensor(found, dtype=torch.float64, device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return Timed(
        what=what, shape=shape, dtype=str(dtype).removeprefix("torch."), flops=flops,
        seconds=dict(zip(ways, slowest.tolist(), strict=True)),
    )  # fmt: skip


def differences() -> dict[str, float]:
    """Of each operation, with numbers that are new in every run and ragged shapes, from the product in float64."""
    rank, world, found = dist.get_rank(), dist.get_world_size(), dict[str, float]()
    seeds: list[Any] = [int.from_bytes(os.urandom(4), "little")]
    dist.broadcast_object_list(seeds)
    for operation in OPERATIONS:
        gathers = operation == "all_gather_matmul"
        generator = torch.Generator().manual_seed(seeds[0])
        rows, n, k = 333, 520, 264
        lefts = torch.randn(world, rows if gathers else rows * world, k, generator=generator).bfloat16().cuda()
        weights = torch.randn(world, k, n, generator=generator).bfloat16().cuda()
        product = getattr(fused, operation)(lefts[rank], weights[rank])
        fused.check()
        if gathers:
            right = lefts.flatten(0, 1).double() @ weights[rank].double()
        else:
            total = (lefts.double() @ weights.double()).sum(0)
            right = total if operation == "matmul_all_reduce" else total.chunk(world)[rank]
        found[operation] = float((product.double() - right).abs().max() / right.abs().max())
    return found


def _rank(rank: int, world: int, folder: str, work: str, repeats: int) -> None:
    torch.cuda.set_device(rank % torch.cuda.device_count())
    shared = world > torch.cuda.device_count()
    if shared:
        os.environ["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = "1"
    backend = "gloo" if shared or world == 1 else "nccl"  # NCCL refuses two ranks on one GPU
    dist.init_process_group(backend, init_method=f"file://{folder}/{work}", rank=rank, world_size=world)
    bodies: dict[str, Callable[[], object]] = {
        "alone": lambda: [asdict(one) for one in alone(repeats)],
        "together": lambda: [asdict(one) for one in together(repeats)],
        "differences": differences,
    }
    result = bodies[work]()
    if rank == 0:
        Path(folder, f"{work}.json").write_text(json.dumps(result))
    torch.cuda.synchronize()
    dist.barrier()
    dist.destroy_process_group()


def _run(work: str, world: int, folder: str, repeats: int) -> Any:
    torch.multiprocessing.start_processes(
        _rank, args=(world, folder, work, repeats), nprocs=world, start_method="spawn"
    )
    return json.loads(Path(folder, f"{work}.json").read_text())


def _rows(found: list[dict[str, Any]]) -> list[Timed]:
    return [Timed(**{**one, "shape": tuple(one["shape"])}) for one in found]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("out", type=Path, help="the page to write")
    parser.add_argument("--quick", action="store_true", help="few calls of each")
    chosen = parser.parse_args()
    if not torch.cuda.is_available():
        print("there is no CUDA device: nothing was measured", file=sys.stderr)
        return 1
    import triton

    count, repeats = torch.cuda.device_count(), 5 if chosen.quick else 30
    with tempfile.TemporaryDirectory(prefix="rs-") as folder:
        found = Found(
            device=f"{count} × {torch.cuda.get_device_name()}",
            versions=f"torch {torch.__version__}, Triton {triton.__version__}",
            ranks=max(2, count),
            alone=_rows(_run("alone", 1, folder, repeats)),
            together=_rows(_run("together", count, folder, repeats)) if count > 1 else [],
            differences=_run("differences", max(2, count), folder, repeats),
        )
    chosen.out.write_text(page(found))
    print(chosen.out.read_text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
