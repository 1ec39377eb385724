"""The operations, forward and backward, as they are carried out: checked, dispatched, computed. No autograd.

`way` is a `Choice` in words: "auto", "plain", "chunked:4", "fused". The backward of a gather is a scatter and the other
way round, each dispatched as an operation of its own. `ops.py` makes torch operators of these.
"""

import functools
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from resilient.errors import UsageError
from resilient.kernels.dispatch import ways
from resilient.kernels.dispatch.decide import Choice
from resilient.kernels.dispatch.dispatcher import dispatcher_of
from resilient.kernels.dispatch.machine import capturing
from resilient.kernels.overlap.agree import agree
from resilient.kernels.overlap.call import Call, Operation, problem
from resilient.kernels.overlap.exchange import Group

Result = TypeVar("Result")


def all_gather_matmul(
    shard: Tensor, weight: Tensor, bias: Tensor | None, group: Group, way: str, keep: bool
) -> tuple[Tensor, Tensor]:
    """(the product, the gathered shards if `keep`, else an empty tensor)."""
    call = _call("all_gather_matmul", shard, weight, bias, group)

    def run(choice: Choice) -> tuple[Tensor, Tensor]:
        return ways.gather(choice, call, shard, weight, group, keep=keep)

    product, gathered = _dispatch(call, group, way, run)
    return product if bias is None else product.add_(bias), gathered


def all_gather_matmul_backward(
    grad: Tensor, gathered: Tensor, weight: Tensor, group: Group, way: str, weight_too: bool
) -> tuple[Tensor, Tensor]:
    """The shard's gradient, and the weight's or an empty tensor."""
    turned = weight.t()
    call = _call("matmul_reduce_scatter", grad, turned, None, group, backward=weight_too)

    def run(choice: Choice) -> tuple[Tensor, Tensor]:
        sums = ways.WeightGradient(weight)
        meanwhile = (lambda: sums.add(gathered, grad)) if weight_too else None
        return ways.scatter(choice, call, grad, turned, group, meanwhile), sums.value

    return _dispatch(call, group, way, run)


def matmul_reduce_scatter(input: Tensor, weight: Tensor, bias: Tensor | None, group: Group, way: str) -> Tensor:
    call = _call("matmul_reduce_scatter", input, weight, bias, group)
    product = _dispatch(call, group, way, lambda choice: ways.scatter(choice, call, input, weight, group))
    return product if bias is None else product.add_(bias)


def matmul_reduce_scatter_backward(
    grad: Tensor, input: Tensor, weight: Tensor, group: Group, way: str, weight_too: bool, bias_too: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of all three; the bias's is that of all rows, so it is the same on all ranks."""
    turned = weight.t()
    call = _call("all_gather_matmul", grad, turned, None, group, backward=weight_too)

    def run(choice: Choice) -> tuple[Tensor, Tensor, Tensor]:
        sums = ways.WeightGradient(weight)

        def beside(rows: Tensor, begin: int, end: int) -> None:
            if weight_too:
                sums.add(input[begin:end], rows)

        needed = beside if weight_too or bias_too else None
        product, gathered = ways.gather(choice, call, grad, turned, group, keep=False, beside=needed)
        return product, sums.value, gathered.sum(0) if bias_too else grad.new_empty(0)

    return _dispatch(call, group, way, run)


def matmul_all_reduce(input: Tensor, weight: Tensor, bias: Tensor | None, group: Group, way: str) -> Tensor:
    call = _call("matmul_all_reduce", input, weight, bias, group)
    product = _dispatch(call, group, way, lambda choice: ways.reduce(choice, call, input, weight, group))
    return product if bias is None else product.add_(bias)


def replicated_matmul(input: Tensor, weight: Tensor, bias: Tensor | None, group: Group, way: str) -> Tensor:
    """Nothing is communicated but in the backward, where the input's gradient is summed over the ranks.

    All the same, ranks compare a shape when it is new: one that fails alone would leave the others waiting for it.
    """
    dispatcher_of(group).check_replicated(_call("matmul_all_reduce", input, weight, bias, group), group)
    product = torch.mm(input, weight)
    return product if bias is None else product.add_(bias)


def replicated_matmul_backward(
    grad: Tensor, input: Tensor, weight: Tensor, group: Group, way: str, weight_too: bool
) -> tuple[Tensor, Tensor]:
    """The input's gradient, and the weight's or an empty tensor."""
    turned = weight.t()
    call = _call("matmul_all_reduce", grad, turned, None, group, backward=weight_too)

    def run(choice: Choice) -> tuple[Tensor, Tensor]:
        sums = ways.WeightGradient(weight)
        meanwhile = (lambda: sums.add(input, grad)) if weight_too else None
        return ways.reduce(choice, call, grad, turned, group, meanwhile), sums.value

    return _dispatch(call, group, way, run)


def described(
    operation: Operation, input: Tensor, weight: Tensor, bias: Tensor | None, group: Group, *, backward: bool = False
) -> Call | str:
    """What a call is, or in words why it cannot be done."""
    dtypes: tuple[torch.dtype, ...] = (input.dtype, weight.dtype)
    devices: tuple[torch.device, ...] = (input.device, weight.device)
    if bias is not None:
        dtypes, devices = (*dtypes, bias.dtype), (*devices, bias.device)
    return _described(
        operation,
        input.shape,
        weight.shape,
        None if bias is None else bias.shape,
        dtypes,
        devices,
        group.size(),
        input.is_contiguous(),
        backward,
    )


@functools.lru_cache(maxsize=4096)  # a model calls with the same few shapes over and over
def _described(
    operation: Operation,
    input: torch.Size,
    weight: torch.Size,
    bias: torch.Size | None,
    dtypes: tuple[torch.dtype, ...],
    devices: tuple[torch.device, ...],
    world: int,
    contiguous: bool,
    backward: bool,
) -> Call | str:
    words = [str(dtype).removeprefix("torch.") for dtype in dtypes]
    wrong = problem(
        operation, input, weight, dtypes=words, devices=list(map(str, devices)), world=world, bias=bias,
        contiguous=contiguous,
    )  # fmt: skip
    if wrong is not None:
        return f"{operation}: {wrong}"
    return Call(
        operation=operation,
        rows=input[0] * (world if operation == "all_gather_matmul" else 1),
        inner=weight[0],
        columns=weight[1],
        dtype=words[0],
        device=devices[0].type,
        world=world,
        backward=backward,
    )


def _call(
    operation: Operation, input: Tensor, weight: Tensor, bias: Tensor | None, group: Group, *, backward: bool = False
) -> Call:
    """Raises UsageError on all ranks alike for what cannot be done."""
    call = described(operation, input, weight, bias, group, backward=backward)
    if isinstance(call, str):
        if not capturing(input.device.type):  # else nobody can be asked
            agree(group, operation, problem=call, device=input.device.type)
        raise UsageError(call)
    return call


def _dispatch(call: Call, group: Group, way: str, run: Callable[[Choice], Result]) -> Result:
    if way == "auto":
        return dispatcher_of(group).run(call, group, run)
    method, _, chunks = way.partition(":")
    choice = Choice(method=method, chunks=int(chunks or "1"))  # type: ignore[arg-type]
    dispatcher_of(group).check(call, choice, group)
    return run(choice)
