"""Matmuls with collectives for tensor parallelism, each in the way that takes least time.

functions   what users call
ops         the same as torch operators, with derivatives
dispatcher  tries the ways that are worth it, and keeps the quickest; all ranks alike
decide      what to try and what to keep: pure
costs       what ways would take: pure
measure     what matmuls and collectives take here
cache       the same, from an earlier job
ways        carries out what was chosen (`resilient.kernels.overlap`, or fused kernels where they are: `optional`)
"""

from resilient.kernels.dispatch.decide import Choice, Method
from resilient.kernels.dispatch.dispatcher import Explanation
from resilient.kernels.dispatch.functions import (
    all_gather_matmul,
    explain,
    explanations,
    matmul_all_reduce,
    matmul_reduce_scatter,
    replicated_matmul,
)

__all__ = [
    "Choice",
    "Explanation",
    "Method",
    "all_gather_matmul",
    "explain",
    "explanations",
    "matmul_all_reduce",
    "matmul_reduce_scatter",
    "replicated_matmul",
]
