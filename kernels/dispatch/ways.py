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
from resilient.kernels.overlap.exchange import Group, gather_all

Beside = Callable[[Tensor, int, int], None]


def gather(
    choice: Choice, call: Call, shard: Tensor, weight: Tensor, group: Group, beside: Beside | None = None
) -> tuple[Tensor, Tensor]:
    """all_gather_matmul: the product, and the gathered shards, or an empty tensor where a kernel keeps them to itself.

    With `beside` they are always there.
    """
    if choice.method != "fused":
        return overlap.all_gather_matmul(shard, weight, group, choice.chunks, beside=beside)
    product = optional.fused(call, shard, weight, group)
    if beside is None:
        return product, shard.new_empty(0)
    gathered = shard.new_empty(call.rows, call.inner)
    gather_all(gathered, shard, group)
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


class WeightGradient:
    """The sum of rows^T times their gradients, laid out as the weight is: `value` [K, N]."""

    def __init__(self, weight: Tensor) -> None:
        self._turned = not weight.is_contiguous()  # a weight that is kept as [N, K], as that of nn.Linear
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
