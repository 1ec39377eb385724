"""The signals of the kernels, as they are, by thousands of epochs: too many for whole kernels in the interpreter.

Each epoch is one call of the least kernel: enter, and for each peer wait for its entry, store a number there that no
other epoch has, signal it; then wait for each peer's and look at its number. Imported by ranks that are to interpret.
"""

# As in resilient.kernels.fused.signals, which says why.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false

import os
import random
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import triton
import triton.language as tl

from resilient.kernels.fused.signals import ENTERED, admit, buffer, enter, pad, signal, wait
from resilient.kernels.symmetric import FREE_WORD, open_symmetric
from resilient.kernels.symmetric.memory import STATUS_WORD

_entry: Callable[..., Any] = triton.jit(do_not_specialize=["rank", "first", "count", "call", "tries"])
_TRIES = 60_000
_CALL = 7


@_entry
def _exchange(
    buffers: tl.tensor,
    signals: tl.tensor,
    found: tl.tensor,
    rank: tl.tensor,
    first: tl.tensor,
    count: tl.tensor,
    call: tl.tensor,
    tries: tl.tensor,
    world: tl.constexpr,
    interpreted: tl.constexpr,
) -> None:
    own = pad(signals, rank)
    base = buffer(buffers, rank, tl.int32)
    wrong = 0
    for step in range(count):
        epoch = first + step
        enter(signals, rank, epoch, call, world)
        for turn in range(1, world):
            peer = (rank + turn) % world
            if admit(signals, own, peer, epoch, call, tries, world, interpreted):
                tl.store(buffer(buffers, peer, tl.int32) + rank, epoch * world + rank)
                signal(signals, peer, ENTERED + 2 * world + rank, epoch)
        for turn in range(1, world):
            peer = (rank + turn) % world
            wait(signals, own, ENTERED + 2 * world + peer, peer, epoch, tries, world, interpreted)
            wrong += tl.load(base + peer) != epoch * world + peer
    tl.store(found, wrong)


def exchange(epochs: int, seed: int) -> tuple[int, int]:
    """How many numbers of all epochs were wrong, and this rank's status. Ranks stop where they like, for as long."""
    group = dist.group.WORLD
    assert group is not None
    rank, world, chance = group.rank(), group.size(), random.Random(f"{seed} {group.rank()}")
    memory = open_symmetric(
        group, torch.device("cpu"), name="epochs", buffer_bytes=4 * world, signal_words=FREE_WORD + 3 * world
    )
    assert os.environ["TRITON_INTERPRET"] == "1"
    done, wrong, found = 0, 0, torch.zeros(1, dtype=torch.int32)
    while done < epochs:
        count = min(chance.randint(1, 60), epochs - done)
        _exchange[(1,)](
            memory.buffer_addresses, memory.signal_addresses, found, rank, 1 + done, count, _CALL, _TRIES,
            world=world, interpreted=True,
        )  # fmt: skip
        done, wrong = done + count, wrong + int(found)
        time.sleep(chance.random() * 0.01)
    dist.barrier()  # nobody lets go of memory that others still write to
    return wrong, int(memory.get_signals(rank)[STATUS_WORD])
