"""Memory that every rank of a group can read and write: buffers, signals, barriers.

`memory.py` is the interface; `host.py` is shared memory among the processes of a host, `cuda.py` is thin over torch's
symmetric memory. `open_symmetric` chooses by device. The kernels of `resilient.kernels.fused` work on the addresses.
"""

from resilient.kernels.symmetric.memory import (
    CHANNELS,
    FAILURE_WORD,
    FREE_WORD,
    SymmetricMemory,
    raise_failure,
)
from resilient.kernels.symmetric.opening import open_symmetric

__all__ = ["CHANNELS", "FAILURE_WORD", "FREE_WORD", "SymmetricMemory", "open_symmetric", "raise_failure"]
