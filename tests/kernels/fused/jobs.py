"""What the ranks of the fused kernels' tests do, in Triton's interpreter: bodies for `tests.multiprocess.ranks.run`.

Operands are drawn from seeds that all ranks know, so each rank computes in float64 what the result has to be.
"""

import importlib
import importlib.util
import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as nnf
from torch import Tensor

from resilient.errors import CollectiveTimeout, PeerGone, ResilientError
from resilient.kernels import fused
from resilient.kernels.fused.shapes import OPERATIONS, Activation, Operation, Tile
from resilient.kernels.fused.workspace import workspace

TINY = Tile(rows=16, columns=16, depth=16, group=2, copied=64, warps=4)
FUNCTIONS: dict[Operation, Callable[..., Tensor]] = {
    "all_gather_matmul": fused.all_gather_matmul,
    "matmul_reduce_scatter": fused.matmul_reduce_scatter,
    "matmul_all_reduce": fused.matmul_all_reduce,
}
EPILOGUES: tuple[Activation | None, ...] = (None, "relu", "gelu", "silu")
ACTIVATE: dict[str | None, Callable[[Tensor], Tensor]] = {
    None: lambda one: one,
    "relu": nnf.relu,
    "gelu": nnf.gelu,
    "silu": nnf.silu,
}
# Rows of a rank, columns, depth: whole tiles, ragged ones, less than one, several chunks.
SHAPES = ((16, 32, 32), (21, 20, 19), (1, 3, 5), (40, 16, 7))


def interpret(body: Callable[..., Any], *arguments: Any) -> Any:
    """Runs a body with kernels that are interpreted: Triton asks for it when they are imported, which is later."""
    os.environ["TRITON_INTERPRET"] = "1"
    dist.barrier()  # or a rank that is done at once leaves while gloo still connects the others
    return body(*arguments)


def on_gpu(body: Callable[..., Any], *arguments: Any) -> Any:
    """Runs a body with tensors on a GPU, which ranks share when there are more of them: slow, but right."""
    os.environ["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = "1"
    device = torch.device("cuda", dist.get_rank() % torch.cuda.device_count())
    torch.cuda.set_device(device)
    torch.set_default_device(device)
    result = body(*arguments)
    torch.cuda.synchronize(device)
    dist.barrier()  # nobody lets go of memory that others still write to
    return result


def drawn(*shape: int, seed: int, dtype: torch.dtype = torch.float32, whole: bool = False) -> Tensor:
    """Numbers that depend on the seeds alone, on the default device. `whole` ones add up exactly.

    RESILIENT_TEST_SEED makes all of them others.
    """
    generator = torch.Generator("cpu").manual_seed(seed + 1_000_003 * int(os.environ.get("RESILIENT_TEST_SEED", "0")))
    if whole:
        return torch.randint(-3, 4, shape, generator=generator, device="cpu").to(torch.get_default_device(), dtype)
    return torch.randn(shape, generator=generator, device="cpu").to(torch.get_default_device(), dtype)


def operands(
    operation: Operation, rows: int, n: int, k: int, *, seed: int, dtype: torch.dtype, whole: bool = False
) -> tuple[list[Tensor], list[Tensor]]:
    """The first operands and the weights of all ranks. `rows` is what one rank has of the result's rows."""
    size = dist.get_world_size()
    m = rows if operation == "all_gather_matmul" else rows * size
    lefts = [drawn(m, k, seed=100 * seed + rank, dtype=dtype, whole=whole) for rank in range(size)]
    weights = [drawn(k, n, seed=100 * seed + 50 + rank, dtype=dtype, whole=whole) for rank in range(size)]
    return lefts, weights


def expected(operation: Operation, lefts: list[Tensor], weights: list[Tensor]) -> Tensor:
    """The product in float64, without bias and activation, as rank `dist.get_rank()` gets it."""
    rank, size = dist.get_rank(), dist.get_world_size()
    if operation == "all_gather_matmul":
        return torch.cat(lefts).double() @ weights[rank].double()
    total = torch.stack([one.double() @ other.double() for one, other in zip(lefts, weights, strict=True)]).sum(0)
    return total.chunk(size)[rank] if operation == "matmul_reduce_scatter" else total


def finished(product: Tensor, bias: Tensor | None, activation: Activation | None) -> Tensor:
    total = product if bias is None else product + bias.double()
    return ACTIVATE[activation](total)


def close_to(result: Tensor, right: Tensor) -> None:
    """Parts of a sum are rounded to the dtype before they travel, the result once more."""
    tolerance = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[result.dtype]
    torch.testing.assert_close(result.double(), right, rtol=tolerance, atol=tolerance * float(right.abs().max()))


def every_shape(
    dtypes: tuple[torch.dtype, ...], shapes: tuple[tuple[int, int, int], ...] = SHAPES, tile: Tile | None = TINY
) -> None:
    """All operations over shapes and types, with and without bias and activation, and a weight in other strides."""
    rank = dist.get_rank()
    cases: list[tuple[Operation, tuple[int, int, int], torch.dtype]]
    cases = [(operation, shape, dtype) for operation in OPERATIONS for shape in shapes for dtype in dtypes]
    for number, (operation, (rows, n, k), dtype) in enumerate(cases):
        lefts, weights = operands(operation, rows, n, k, seed=number, dtype=dtype)
        bias = drawn(n, seed=7, dtype=dtype) if number % 2 else None
        activation = EPILOGUES[number % 4]
        weight = weights[rank].t().contiguous().t() if number % 3 else weights[rank]
        result = FUNCTIONS[operation](lefts[rank], weight, bias=bias, activation=activation, tile=tile)
        close_to(result, finished(expected(operation, lefts, weights), bias, activation))


def uneven_rows() -> None:
    """An all-reduce whose rows do not divide by the ranks, and one with fewer rows than ranks."""
    rank, size = dist.get_rank(), dist.get_world_size()
    for m in (1, 2, 35):
        lefts = [drawn(m, 9, seed=other) for other in range(size)]
        weights = [drawn(9, 20, seed=50 + other) for other in range(size)]
        result = fused.matmul_all_reduce(lefts[rank], weights[rank], tile=TINY)
        close_to(result, expected("matmul_all_reduce", lefts, weights))


def many_calls(count: int, mutated: str | None = None, seed: int = 0) -> int:
    """How many of many calls in the same memory gave a wrong number. Ranks dawdle here and there.

    `mutated` is another source for the kernels; that they get stuck then counts as well.
    """
    if mutated is not None:
        replace_kernel(mutated)
        workspace(fused.group_of(None), torch.get_default_device()).timeout_s = 3.0
    rank, chance = dist.get_rank(), random.Random(1000 * seed + dist.get_rank())
    wrong = 0
    for number in range(count):
        operation = OPERATIONS[(number // 3 + seed) % 3]
        lefts, weights = operands(operation, 2, 3, 4, seed=number, dtype=torch.float32, whole=True)
        if chance.random() < 0.05:
            time.sleep(chance.random() * 0.01)
        try:
            result = FUNCTIONS[operation](lefts[rank], weights[rank], tile=TINY)
        except (CollectiveTimeout, PeerGone):  # this rank is stuck, or the other was, and has left
            if mutated is None:
                raise
            return wrong + 1
        wrong += not torch.equal(result.double(), expected(operation, lefts, weights))
    return wrong


def thousands_of_epochs(count: int, seed: int) -> tuple[int, int]:
    """See `epochs`, which needs Triton told to interpret when it is imported."""
    found: tuple[int, int] = importlib.import_module("tests.kernels.fused.epochs").exchange(count, seed)
    return found


def last_epochs() -> int:
    """Calls before and after the largest epoch."""
    wrong = many_calls(3)
    workspace(fused.group_of(None), torch.get_default_device()).epoch = (1 << 31) - 4
    wrong += many_calls(9, seed=1)
    assert workspace(fused.group_of(None), torch.get_default_device()).epoch == 6
    return wrong


def replace_kernel(source: str) -> None:
    """Have the launcher use kernels of this source."""
    name = "resilient.kernels.fused.kernel"
    assert name not in sys.modules
    path = Path(os.environ["RESILIENT_RUNTIME_DIR"]) / f"kernel_{dist.get_rank()}.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])


def same_bits() -> list[bytes]:
    """Results of sums whose order shows, three times over: of a scatter and of an all-reduce."""
    rank, found = dist.get_rank(), []
    for _ in range(3):
        lefts, weights = operands("matmul_all_reduce", 21, 19, 8, seed=3, dtype=torch.float16)
        chance = random.Random(os.urandom(8))
        time.sleep(chance.random() * 0.01)
        one = fused.matmul_reduce_scatter(lefts[rank], weights[rank], tile=TINY)
        other = fused.matmul_all_reduce(lefts[rank], weights[rank], tile=TINY)
        assert torch.equal(other.chunk(dist.get_world_size())[rank], one)
        found.append(other.cpu().numpy().tobytes())
    return found


def gradients() -> None:
    """Gradients of operands, weights and bias beside those that torch finds for the whole computation in float64."""
    rank, size = dist.get_rank(), dist.get_world_size()
    for number, operation in enumerate(OPERATIONS):
        lefts, weights = operands(operation, 10, 18, 12, seed=number, dtype=torch.float32)
        bias = drawn(18, seed=8)
        upstream = [
            drawn(10 if operation == "matmul_reduce_scatter" else 10 * size, 18, seed=60 + r) for r in range(size)
        ]
        if operation == "matmul_all_reduce":  # its result is used alike on all ranks
            upstream = upstream[:1] * size
        left, weight, own_bias = (one.clone().requires_grad_() for one in (lefts[rank], weights[rank], bias))
        out = FUNCTIONS[operation](left, weight, bias=own_bias, activation="gelu", tile=TINY)
        out.backward(upstream[rank])
        right = whole_gradients(operation, lefts, weights, bias, upstream)
        for ours, theirs in zip((left.grad, weight.grad, own_bias.grad), right, strict=True):
            assert ours is not None
            close_to(ours, theirs)


def whole_gradients(
    operation: Operation, lefts: list[Tensor], weights: list[Tensor], bias: Tensor, upstream: list[Tensor]
) -> list[Tensor]:
    """This rank's gradients, from a computation of all ranks' parts in one process."""
    rank, size = dist.get_rank(), dist.get_world_size()
    all_lefts = [one.double().requires_grad_() for one in lefts]
    all_weights = [one.double().requires_grad_() for one in weights]
    biases = [bias.double().requires_grad_() for _ in range(size)]
    if operation == "all_gather_matmul":
        outs = [torch.cat(all_lefts) @ weight + one for weight, one in zip(all_weights, biases, strict=True)]
    else:
        total = torch.stack([one @ other for one, other in zip(all_lefts, all_weights, strict=True)]).sum(0)
        parts = total.chunk(size) if operation == "matmul_reduce_scatter" else [total] * size
        outs = [part + one for part, one in zip(parts, biases, strict=True)]
    used = outs[:1] if operation == "matmul_all_reduce" else outs
    sum((nnf.gelu(out) * one.double()).sum() for out, one in zip(used, upstream, strict=False)).backward()  # type: ignore[union-attr]
    own_bias = biases[0 if operation == "matmul_all_reduce" else rank]
    found = [all_lefts[rank].grad, all_weights[rank].grad, own_bias.grad]
    return [one for one in found if one is not None]


def only_what_is_needed() -> None:
    """No gradient is computed, and nothing waited for, that nobody asked for."""
    left, weight = drawn(4, 6, seed=1), drawn(6, 5, seed=2).requires_grad_()
    fused.all_gather_matmul(left, weight, tile=TINY).sum().backward()
    assert weight.grad is not None
    before = workspace(fused.group_of(None), left.device).epoch
    frozen = left.clone().requires_grad_()
    fused.all_gather_matmul(frozen, weight.detach(), tile=TINY).sum().backward()
    assert frozen.grad is not None
    assert workspace(fused.group_of(None), left.device).epoch == before + 2  # forward and one scatter


def refused(call: Callable[[], Any]) -> tuple[str, str, float]:
    """The kind of error, what it says, and after how long."""
    begin = time.monotonic()
    try:
        call()
    except ResilientError as error:
        return type(error).__name__, str(error), time.monotonic() - begin
    return "", "no error", time.monotonic() - begin


def unfit_operands() -> list[str]:
    """What is said of operands that do not fit, before anything is launched."""
    left, weight = drawn(8, 6, seed=1), drawn(6, 4, seed=2)
    calls: list[Callable[[], Any]] = [
        lambda: fused.all_gather_matmul(left, left),
        lambda: fused.all_gather_matmul(left.t(), weight),
        lambda: fused.all_gather_matmul(drawn(6, 8, seed=1).t(), weight),
        lambda: fused.all_gather_matmul(left, weight.half()),
        lambda: fused.all_gather_matmul(left.double(), weight.double()),
        lambda: fused.all_gather_matmul(left, weight, bias=drawn(5, seed=1)),
        lambda: fused.matmul_reduce_scatter(drawn(7, 6, seed=1), weight),
        lambda: fused.matmul_all_reduce(left[:0], weight),
        lambda: fused.matmul_all_reduce(left, weight, activation="tanh"),  # type: ignore[arg-type]
        lambda: fused.matmul_all_reduce(left.to("meta"), weight.to("meta")),
    ]
    said = [refused(call) for call in calls]
    assert all(kind == "UsageError" for kind, _, _ in said), said
    return [message for _, message, _ in said]


def reasons() -> list[str | None]:
    """What `supported` says, first of what is supported."""
    cpu, half = torch.device("cpu"), torch.float16
    operation: Operation = "matmul_reduce_scatter"
    found = [
        fused.supported(operation, (8, 4, 4), half, cpu),
        fused.supported("gather", (8, 4, 4), half, cpu),  # type: ignore[arg-type]
        fused.supported(operation, (7, 4, 4), half, cpu),
        fused.supported(operation, (8, 0, 4), half, cpu),
        fused.supported(operation, (8, 4, 1 << 31), half, cpu),
        fused.supported(operation, (8, 4, 4), torch.float64, cpu),
        fused.supported(operation, (8, 4, 4), half, torch.device("meta")),
    ]
    os.environ["TRITON_INTERPRET"] = "0"
    return [*found, fused.supported(operation, (8, 4, 4), half, cpu)]


def another_thread_of_calls() -> None:
    """Two groups of the same ranks, and memory that is given back and made anew."""
    group = dist.new_group()
    assert isinstance(group, dist.ProcessGroup)
    rank = dist.get_rank()
    for _ in range(2):
        for chosen in (None, group):
            lefts, weights = operands("all_gather_matmul", 5, 6, 7, seed=1, dtype=torch.float32)
            result = fused.all_gather_matmul(lefts[rank], weights[rank], chosen, tile=TINY)
            close_to(result, expected("all_gather_matmul", lefts, weights))
            fused.check(chosen)
            fused.close(chosen)
