"""What the ranks of these tests do: bodies for `tests.multiprocess.ranks.run`, in processes of their own."""

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import resilient.comms.backend  # noqa: F401  the backend "resilient"
from resilient.kernels import dispatch, overlap
from resilient.kernels.overlap.exchange import point_to_point

TOLERANCE = {torch.float32: 2e-4, torch.float64: 1e-10, torch.bfloat16: 0.15, torch.float16: 3e-2}


def numbers(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """The same on every rank, on the default device."""
    generator = torch.Generator("cpu").manual_seed(seed)
    drawn = torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu")
    return drawn.to(torch.get_default_device(), dtype)


def close(one: Tensor, other: Tensor) -> None:
    tolerance = TOLERANCE[one.dtype]
    torch.testing.assert_close(one, other.to(one.dtype), rtol=tolerance, atol=tolerance)


class Case:
    """Whole operands, this rank's parts of them, and what the operations have to give."""

    def __init__(self, rows: int, inner: int, columns: int, dtype: torch.dtype = torch.float64) -> None:
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.input = numbers(rows, inner, seed=1, dtype=dtype)
        self.weight = numbers(inner, columns, seed=2, dtype=dtype) / inner**0.5
        self.bias = numbers(columns, seed=3, dtype=dtype)

    def rows(self, whole: Tensor) -> Tensor:
        return whole.chunk(self.world, 0)[self.rank].contiguous()

    def inner(self, whole: Tensor, dim: int) -> Tensor:
        return whole.tensor_split(self.world, dim)[self.rank].contiguous()


def same_values(
    shapes: Sequence[tuple[int, int, int]],
    dtypes: Sequence[torch.dtype],
    chunks: Sequence[int],
    backend: str | None = None,
) -> str:
    """The raw operations against a product of the whole, in float64. Returns the kind of group."""
    group: Any = dist.group.WORLD if backend is None else dist.new_group(backend=backend)
    for rows, inner, columns in shapes:
        for dtype in dtypes:
            case = Case(rows, inner, columns, dtype)
            wanted = case.input.double() @ case.weight.double()
            left, right = case.inner(case.input, 1), case.inner(case.weight, 0)
            for count in chunks:
                product, gathered = overlap.all_gather_matmul(case.rows(case.input), case.weight, group, count)
                close(product, wanted)
                assert torch.equal(gathered, case.input)
                close(overlap.matmul_reduce_scatter(left, right, group, count), case.rows(wanted))
                close(overlap.matmul_all_reduce(left, right, group, count), wanted)
    dist.barrier()
    return f"{type(group).__name__}, {'messages' if point_to_point(group, case.input) else 'collectives'}"


def same_bits(times: int) -> list[str]:
    """Each operation many times over: how many different results there are, and the all-reduce's numbers."""
    group = dist.group.WORLD
    assert group is not None
    case = Case(1020, 96, 64, torch.float32)
    left, right = case.inner(case.input, 1), case.inner(case.weight, 0)
    runs: list[Callable[[], Tensor]] = [
        lambda: overlap.all_gather_matmul(case.rows(case.input), case.weight, group, 4)[0],
        lambda: overlap.matmul_reduce_scatter(left, right, group, 4),
        lambda: overlap.matmul_all_reduce(left, right, group, 4),
    ]
    counts = [len({bytes(run().view(torch.uint8).numpy()) for _ in range(times)}) for run in runs]
    return [str(counts), bytes(runs[2]().view(torch.uint8).numpy()).hex()[:200]]


def sums(chunks: int) -> list[float]:
    """A reduce-scatter of numbers whose sum depends on the order in which they are added."""
    group = dist.group.WORLD
    assert group is not None
    parts = [1e16, 1.0, -1e16, 1.0]
    weight = torch.tensor([[parts[group.rank()]]], dtype=torch.float64)
    summed: list[float] = overlap.matmul_reduce_scatter(
        torch.ones(2 * group.size(), 1, dtype=torch.float64), weight, group, chunks
    )[:, 0].tolist()
    return summed


def gradients(method: Any, chunks: int, activation: str | None = None, dtype: torch.dtype = torch.float64) -> None:
    """Of all functions, against autograd of the whole product."""
    if torch.get_default_device().type == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # for fused kernels, which are there for GPUs
    case = Case(64, 12, 20, dtype)
    whole_input, whole_weight = case.input.clone().requires_grad_(), case.weight.clone().requires_grad_()
    whole_bias = case.bias.clone().requires_grad_()
    act = {None: lambda x: x, "gelu": torch.nn.functional.gelu, "relu": torch.relu}[activation]
    up = numbers(64, 20, seed=9, dtype=dtype)
    wanted = act(whole_input @ whole_weight + whole_bias)
    (wanted * up).sum().backward()
    assert whole_input.grad is not None
    assert whole_weight.grad is not None
    assert whole_bias.grad is not None
    more: Any = {"method": method, "chunks": chunks, "activation": activation}

    # The columns are cut: rank r has those of its weight.
    shard = case.rows(case.input).requires_grad_()
    weight = case.inner(case.weight, 1).requires_grad_()
    bias = case.inner(case.bias, 0).requires_grad_()
    product = dispatch.all_gather_matmul(shard, weight, bias=bias, **more)
    close(product.detach(), case.inner(wanted.detach(), 1))
    (product * case.inner(up, 1)).sum().backward()
    _close_gradients((shard, case.rows(whole_input.grad)), (weight, case.inner(whole_weight.grad, 1)))
    _close_gradients((bias, case.inner(whole_bias.grad, 0)))

    # The same weight, kept the other way round as nn.Linear does, and an input that all ranks have.
    input = case.input.clone().requires_grad_()
    kept = case.inner(case.weight, 1).t().contiguous().requires_grad_()
    product = dispatch.replicated_matmul(input, kept.t(), bias=case.inner(case.bias, 0), **more)
    close(product.detach(), case.inner(wanted.detach(), 1))
    (product * case.inner(up, 1)).sum().backward()
    _close_gradients((input, whole_input.grad), (kept, case.inner(whole_weight.grad, 1).t()))
    assert kept.grad is not None
    assert kept.grad.is_contiguous()

    # The inner dimension is cut.
    left, right = case.inner(case.input, 1).requires_grad_(), case.inner(case.weight, 0).requires_grad_()
    bias = case.bias.clone().requires_grad_()
    product = dispatch.matmul_reduce_scatter(left, right, bias=bias, **more)
    close(product.detach(), case.rows(wanted.detach()))
    (product * case.rows(up)).sum().backward()
    _close_gradients((left, case.inner(whole_input.grad, 1)), (right, case.inner(whole_weight.grad, 0)))
    _close_gradients((bias, whole_bias.grad))

    left, right = case.inner(case.input, 1).requires_grad_(), case.inner(case.weight, 0).requires_grad_()
    bias = case.bias.clone().requires_grad_()
    product = dispatch.matmul_all_reduce(left, right, bias=bias, **more)
    close(product.detach(), wanted.detach())
    (product * up).sum().backward()
    _close_gradients((left, case.inner(whole_input.grad, 1)), (right, case.inner(whole_weight.grad, 0)))
    _close_gradients((bias, whole_bias.grad))


def _close_gradients(*pairs: tuple[Tensor, Tensor]) -> None:
    for tensor, wanted in pairs:
        assert tensor.grad is not None
        close(tensor.grad, wanted)
