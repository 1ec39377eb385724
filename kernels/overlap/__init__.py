"""Matmuls that overlap with their collectives over any process group, portable, without autograd and decisions.

call      what is asked for, checked: pure
chunks    where rows are cut: pure
exchange  rows on their way between ranks
chunked   the operations
agree     ranks compare what they are about to do, once

Use `resilient.kernels.dispatch`, which chooses between these and others, and differentiates them.
"""

from resilient.kernels.overlap.agree import agree
from resilient.kernels.overlap.call import ACTIVATIONS, OPERATIONS, Call, Operation, problem
from resilient.kernels.overlap.chunked import all_gather_matmul, matmul_all_reduce, matmul_reduce_scatter

__all__ = [
    "ACTIVATIONS",
    "OPERATIONS",
    "Call",
    "Operation",
    "agree",
    "all_gather_matmul",
    "matmul_all_reduce",
    "matmul_reduce_scatter",
    "problem",
]
