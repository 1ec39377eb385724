"""Layers for tensor and sequence parallelism over any process group, whose communication hides behind their matmuls.

linear      ColumnParallelLinear, RowParallelLinear
blocks      a feed-forward layer, and the projections around attention
sequence    tokens dealt out to the ranks, and norms of them
styles      the same for a model's own modules, by `parallelize_module`
parameters  DTensors, which checkpoints go by
"""

from resilient.kernels.layers.blocks import AttentionProjections, ParallelMLP
from resilient.kernels.layers.linear import ColumnParallelLinear, RowParallelLinear, multiply_together
from resilient.kernels.layers.sequence import (
    SequenceParallelLayerNorm,
    SequenceParallelRMSNorm,
    gather_sequence,
    parallel_norm,
    scatter_sequence,
)
from resilient.kernels.layers.styles import OverlappedColwise, OverlappedNorm, OverlappedRowwise

__all__ = [
    "AttentionProjections",
    "ColumnParallelLinear",
    "OverlappedColwise",
    "OverlappedNorm",
    "OverlappedRowwise",
    "ParallelMLP",
    "RowParallelLinear",
    "SequenceParallelLayerNorm",
    "SequenceParallelRMSNorm",
    "gather_sequence",
    "multiply_together",
    "parallel_norm",
    "scatter_sequence",
]
