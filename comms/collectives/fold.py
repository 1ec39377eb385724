"""Reductions of tensors in a given order, so that results are equal to the bit over runs.

Half-precision numbers are added up in float32 and rounded once for each `fold`: direct schedules round once in all, a
ring once a step (gloo rounds at every addition). An average is a sum that the owner of the part divides at the end.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import torch

Reduction = Literal["sum", "avg", "product", "min", "max"]

WIDE = (torch.float16, torch.bfloat16)
FLOATS = (*WIDE, torch.float32, torch.float64)
INTEGERS = (torch.int8, torch.uint8, torch.int32, torch.int64)

_OPERATIONS: dict[Reduction, Callable[..., torch.Tensor]] = {
    "sum": torch.add,
    "avg": torch.add,
    "product": torch.mul,
    "min": torch.minimum,
    "max": torch.maximum,
}


def supported(reduction: str, dtype: torch.dtype) -> bool:
    """Whether `fold` can; averages are for floating-point numbers alone."""
    return dtype in FLOATS or (dtype in INTEGERS and reduction in ("sum", "product", "min", "max"))


def fold(reduction: Reduction, into: torch.Tensor, parts: Sequence[torch.Tensor], *, ranks: int, last: bool) -> None:
    """`into` becomes the reduction of `parts`, from the left; all flat, of one length and dtype.

    `into` may be one of the parts. `last`: an average is divided by `ranks`.
    """
    operation = _OPERATIONS[reduction]
    wide = into.dtype in WIDE and reduction not in ("min", "max")
    if len(parts) == 2 and not wide:
        operation(parts[0], parts[1], out=into)
    else:
        total = parts[0].float() if wide else parts[0].clone()
        for part in parts[1:]:
            operation(total, part.float() if wide else part, out=total)
        if last and reduction == "avg":
            total /= ranks
        into.copy_(total)
        return
    if last and reduction == "avg":
        into /= ranks
