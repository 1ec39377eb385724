"""Carries a call out as the dispatcher chose it, forward and backward. Tensors only: no autograd, no decisions.

The weight's gradient is one more matmul, which hides communication as well: it is computed while the last rows are on
their way, or part by part as rows come.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from resilient.kernels import overlap
from resilient.kernels.dispatch import optional
from resilient.kernels.dispatch.decide import Choice
from resilient.kernels.overlap.call import Call
from resilient.kernels.overlap.exchange import Group

Beside = Callable[[Tensor, int, int], None]


def gather(
    choice: Choice,
    call: Call,
    shard: Tensor,
    weight: Tensor,
    group: Group,
    *,
    keep: bool,
    beside: Beside | None = None,
) -> tuple[Tensor, Tensor]:
    """all_gather_matmul: the product and, with `keep` or `beside`, the gathered shards; else an empty tensor."""
    wanted = keep or beside is not None
    if choice.method != "fused":
        product, gathered = overlap.all_gather_matmul(shard, weight, group, choice.chunks, beside=beside)
        return product, gathered if wanted else shard.new_empty(0)
    product = optional.fused(call, shard, weight, group)
    if not wanted:
        return product, shard.new_empty(0)
    gathered = optional.gathered(call, shard, weight, group)
    if beside is not None:
        beside(gathered, 0, call.rows)
    return product, gathered


def scatter(
    choice: Choice, call: Call, input: Tensor, weight: Tensor, group: Group, meanwhile: Callable[[], None] | None = None
) -> Tensor:
    """matmul_reduce_scatter."""
    if choice.method == "fused":
        product = optional.fused(call, input, weight, group)
        if meanwhile is not None:
            meanwhile()
        return product
    return overlap.matmul_reduce_scatter(input, weight, group, choice.chunks, meanwhile=meanwhile)


def reduce(
    choice: Choice, call: Call, input: Tensor, weight: Tensor, group: Group, meanwhile: Callable[[], None] | None = None
) -> Tensor:
    """matmul_all_reduce."""
    if choice.method == "fused":
        product = optional.fused(call, input, weight, group)
        if meanwhile is not None:
            meanwhile()
        return product
    return overlap.matmul_all_reduce(input, weight, group, choice.chunks, meanwhile=meanwhile)


def turned(weight: Tensor) -> bool:
    """Whether a weight's gradient lies in memory as [N, K], as the weight of nn.Linear does; otherwise as [K, N].

    What the shape and the strides say alone, so that a compiler is told the layout that there will be.
    """
    return not weight.is_contiguous() and weight.t().is_contiguous()


class WeightGradient:
    """The sum of rows^T times their gradients, laid out as `turned` says: `value` [K, N]."""

    def __init__(self, weight: Tensor) -> None:
        self._turned = turned(weight)
        self._weight = weight
        self._sum: Tensor | None = None

    def add(self, rows: Tensor, gradient: Tensor) -> None:
        """[m, K] and [m, N]."""
        left, right = (gradient, rows) if self._turned else (rows, gradient)
        if self._sum is None:
            self._sum = torch.mm(left.t(), right)
        else:
            self._sum.addmm_(left.t(), right)

    @property
    def value(self) -> Tensor:
        if self._sum is None:
            return self._weight.new_empty(0)
        return self._sum.t() if self._turned else self._sum
