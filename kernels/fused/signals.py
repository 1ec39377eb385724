"""What programs of a kernel do with ranks' pads: wait for signals, set them, and give up when they do not come.

A signal is a word of a pad; it is compared with the call's epoch and never reset. A wait that is given up does not stop
its program: who would store for others or signal them after it looks at `failed` first. `kernel.py` has the kernels.
"""

# What a kernel's code means is Triton's to say: to pyright it is Python, and Triton's annotations do not fit that.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false

import time
from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl

_jit: Callable[..., Any] = triton.jit

# Words of a pad; resilient.kernels.symmetric.memory has them for Python.
FAILURE: tl.constexpr = tl.constexpr(0)
STATUS: tl.constexpr = tl.constexpr(1)
ENTERED: tl.constexpr = tl.constexpr(16)
LATE: tl.constexpr = tl.constexpr(1 << 16)
OTHER_CALL: tl.constexpr = tl.constexpr(2 << 16)


def _nap() -> None:
    """Let another rank have the core. Never compiled: the interpreter alone gets here."""
    time.sleep(NAP_S)


NAP_S = 1e-4
setattr(_nap, "__triton_builtin__", True)  # noqa: B010 -- or Triton refuses a name that it does not know


@_jit
def pad(signals: tl.tensor, rank: tl.tensor) -> tl.tensor:
    return tl.load(signals + rank).to(tl.pointer_type(tl.int32))


@_jit
def buffer(buffers: tl.tensor, rank: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    return tl.multiple_of(tl.load(buffers + rank).to(tl.pointer_type(dtype)), 16)


@_jit
def _give_up(signals: tl.tensor, own: tl.tensor, cause: tl.tensor, world: tl.constexpr) -> None:
    """Write down why, for the caller, and tell all ranks."""
    first = tl.atomic_cas(own + FAILURE, 0, cause, sem="relaxed", scope="sys")
    tl.atomic_cas(own + STATUS, 0, tl.where(first == 0, cause, first), sem="relaxed", scope="sys")
    for other in range(world):
        tl.atomic_cas(pad(signals, other) + FAILURE, 0, tl.where(first == 0, cause, first), sem="relaxed", scope="sys")


@_jit
def wait(
    signals: tl.tensor,
    own: tl.tensor,
    word: tl.tensor,
    source: tl.tensor,
    epoch: tl.tensor,
    tries: tl.tensor,
    world: tl.constexpr,
    interpreted: tl.constexpr,
) -> None:
    """Until a word of the own pad, which `source` writes, is the epoch. What was written before it is then visible.

    After `tries`, or once the group has failed, it gives up: the caller of the launch sees the status word.
    """
    left = tries
    seen = tl.atomic_add(own + word, 0, sem="acquire", scope="sys")
    while (seen != epoch) & (left > 0):
        left -= 1
        if interpreted:
            _nap()
        if tl.load(own + FAILURE, volatile=True) != 0:
            left = 0
        seen = tl.atomic_add(own + word, 0, sem="acquire", scope="sys")
    if seen != epoch:
        _give_up(signals, own, source + LATE, world)
    tl.debug_barrier()


@_jit
def signal(signals: tl.tensor, target: tl.tensor, word: tl.tensor, epoch: tl.tensor) -> None:
    """Set a word of a rank's pad to the epoch, after all that this program has written."""
    tl.debug_barrier()
    tl.atomic_xchg(pad(signals, target) + word, epoch, sem="release", scope="sys")


@_jit
def failed(own: tl.tensor) -> tl.tensor:
    """Whether a wait of this rank was given up: what it has is not to be told to others."""
    return tl.load(own + STATUS, volatile=True) != 0


@_jit
def enter(signals: tl.tensor, rank: tl.tensor, epoch: tl.tensor, call: tl.tensor, world: tl.constexpr) -> None:
    """Tell all ranks which call this rank has come to: from now on they may write into its buffer."""
    for step in range(1, world):
        other = (rank + step) % world
        tl.store(pad(signals, other) + ENTERED + world + rank, call)
        signal(signals, other, ENTERED + rank, epoch)


@_jit
def admit(
    signals: tl.tensor,
    own: tl.tensor,
    peer: tl.tensor,
    epoch: tl.tensor,
    call: tl.tensor,
    tries: tl.tensor,
    world: tl.constexpr,
    interpreted: tl.constexpr,
) -> tl.tensor:
    """Wait until a peer has come to the same call. False when it has not: its buffer is not to be touched."""
    wait(signals, own, ENTERED + peer, peer, epoch, tries, world, interpreted)
    same = tl.load(own + ENTERED + world + peer, volatile=True) == call
    lost = failed(own)
    if (same == 0) & (lost == 0):
        _give_up(signals, own, peer + OTHER_CALL, world)
    return same & (lost == 0)
