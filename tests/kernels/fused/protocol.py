"""The kernels' protocol as programs for `interleavings`: who stores, signals and waits for what, in each call.

Written after `resilient/kernels/fused/kernel.py`, with one chunk or tile a rank. A mutation is a mistake that could be
made there; each must be found.
"""

from collections.abc import Sequence
from typing import Literal

from tests.kernels.fused.interleavings import Call, Cell, Program, Rank, Read, Release, Step, Stop, Store, Wait

Kernel = Literal["all_gather_matmul", "matmul_reduce_scatter", "matmul_all_reduce"]
Mutation = Literal[
    "signal before data",  # the order of two lines
    "signal without release",
    "no wait for data",
    "one epoch behind",  # waits for the value of the call before
    "signals without epoch",  # always 1, and never reset
    "no wait for entry",  # writes into a buffer that may still be in use
    "entry too early",  # announced with work of the call before still to be done
    "writes after giving up",  # into the buffer of a rank that has not come
    "signals after giving up",  # hands on a sum that lacks what did not come
]
MUTATIONS: tuple[Mutation, ...] = (
    "signal before data",
    "signal without release",
    "no wait for data",
    "one epoch behind",
    "signals without epoch",
    "no wait for entry",
    "entry too early",
)
# These show only where waits are given up.
AFTER_GIVING_UP: tuple[Mutation, ...] = ("writes after giving up", "signals after giving up")


def ranks(kernels: Sequence[Kernel], world: int, mutation: Mutation | None = None) -> list[Rank]:
    """What each rank does in its calls, one of each kernel in this order. The first is epoch 1."""
    return [
        tuple(_call(kernel, rank, world, epoch, mutation) for epoch, kernel in enumerate(kernels, 1))
        for rank in range(world)
    ]


def _call(kernel: Kernel, rank: int, world: int, epoch: int, mutation: Mutation | None) -> Call:
    others = [(rank + step) % world for step in range(1, world)]
    # Calls use one buffer: what is gathered in one call lies where partial sums and results lie in another.
    data = ("low", "high") if kernel == "all_gather_matmul" else ("low",)
    programs = [_push(rank, other, data, epoch, mutation) for other in others]
    takes: Program = tuple(step for other in others for step in _take(rank, other, data, "first", epoch, mutation))
    if kernel == "matmul_all_reduce":
        result = [step for other in others for step in _put(rank, other, ("high",), "second", epoch, mutation)]
        programs += [(*takes, *([] if mutation == "signals after giving up" else [Stop()]), *result)]
        programs += [_take(rank, other, ("high",), "second", epoch, mutation) for other in others]
    else:
        programs += [takes]
    entry: Program = tuple(Release(_cell(other, "entered", rank), _entry(epoch, mutation)) for other in others)
    programs[0] = (*entry, *programs[0])
    return tuple(programs)


def _entry(epoch: int, mutation: Mutation | None) -> int:
    return epoch + 1 if mutation == "entry too early" else epoch


def _cell(owner: int, name: str, writer: int) -> Cell:
    return (owner, f"{name} {writer}")


def _value(epoch: int, mutation: Mutation | None) -> int:
    return 1 if mutation == "signals without epoch" else epoch


def _push(rank: int, other: int, data: Sequence[str], epoch: int, mutation: Mutation | None) -> Program:
    wait: list[Step] = [Wait(_cell(rank, "entered", other), epoch)]
    if mutation == "no wait for entry" or (mutation == "entry too early" and epoch == 1):
        wait = []
    stop = [] if mutation == "writes after giving up" else [Stop()]
    return (*wait, *stop, *_put(rank, other, data, "first", epoch, mutation))


def _put(rank: int, other: int, data: Sequence[str], signal: str, epoch: int, mutation: Mutation | None) -> Program:
    stores = [Store(_cell(other, name, rank), epoch) for name in data]
    release = Release(_cell(other, signal, rank), _value(epoch, mutation))
    if mutation == "signal before data":
        return release, *stores
    if mutation == "signal without release":
        return *stores, Store(release.cell, release.value)
    return *stores, release


def _take(rank: int, other: int, data: Sequence[str], signal: str, epoch: int, mutation: Mutation | None) -> Program:
    awaited = epoch - 1 if mutation == "one epoch behind" else _value(epoch, mutation)
    wait = [] if mutation == "no wait for data" else [Wait(_cell(rank, signal, other), awaited)]
    return (*wait, *(Read(_cell(rank, name, other), epoch) for name in data))
