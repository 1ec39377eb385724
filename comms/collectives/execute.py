"""Carries out a script over lanes: each step is planned for the rates of the moment, posted, waited for, folded.

Runs on the group's own worker thread. Any failure has to be told to all ranks (`Lanes.abort`), which then fail alike:
half a collective cannot be repeated by one of them.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Protocol

import torch

from resilient.comms.collectives.schedule import Region, Script, Turn
from resilient.comms.fabric import Fabric, Link
from resilient.comms.flows import Flow, Step
from resilient.comms.lanes.messages import Operation, Piece, Receive, Send, Transfer
from resilient.comms.plan import plan_step

Fold = Callable[[torch.Tensor, Sequence[torch.Tensor], bool], None]
_LEAST_CUT = 1 << 16  # bytes: flows below are not cut, a piece costs more than it wins


class Lanes(Protocol):
    """What is asked of `resilient.comms.lanes`."""

    @property
    def fabric(self) -> Fabric: ...

    def post(self, operation: Operation, sends: Sequence[Send], receives: Sequence[Receive]) -> Transfer: ...

    def abort(self, reason: str) -> None: ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One collective of one rank. `buffers`: flat, contiguous tensors in the main memory, by the script's names.

    `fold` is given None where nothing is reduced.
    """

    operation: Operation
    rank: int
    script: Script
    buffers: Mapping[str, torch.Tensor]
    item: int
    fold: Fold | None = None


def run(lanes: Lanes, job: Job) -> None:
    """Blocks until this rank's part is done; each step for no longer than the lanes' timeout.

    Raises CollectiveFailed or CollectiveMismatch, on all ranks alike, as the lanes do.
    """
    buffers = {name: flat_bytes(tensor) for name, tensor in job.buffers.items()}
    buffers["spare"] = torch.empty(job.script.spare, dtype=torch.uint8)
    views = {name: _view(tensor) for name, tensor in buffers.items()}
    for tag, turn in enumerate(job.script.turns):
        transfer = _post(lanes, job, turn, tag, views)
        if transfer is not None:
            transfer.wait()
        _fold(job, turn, buffers)


def flat_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a contiguous tensor, not copied."""
    return tensor.detach().reshape(-1).view(torch.uint8)


def _view(data: torch.Tensor) -> memoryview:
    array: Any = data.numpy()  # an ndarray has the buffer protocol, which type checkers learn from Python 3.12 on
    return memoryview(array)


def _post(lanes: Lanes, job: Job, turn: Turn, tag: int, views: Mapping[str, memoryview]) -> Transfer | None:
    sends, receives = [], []
    planned = _planned(lanes.fabric, turn.flows, job.item, job.rank)
    for number, pieces in planned.pieces.items():
        view = _part(views, turn.sends[number])
        if len(view):
            sends.append(Send(turn.flows[number].target, tag, view, pieces))
    for number, region in turn.receives.items():
        view = _part(views, region)
        if len(view):
            receives.append(Receive(turn.flows[number].source, tag, view))
    operation = replace(job.operation, expected_s=planned.busy_s)
    return lanes.post(operation, sends, receives) if sends or receives else None


def send(lanes: Lanes, operation: Operation, flow: Flow, tag: int, data: torch.Tensor) -> Transfer:
    """One message, cut and placed as if it were alone. Does not block."""
    planned = _planned(lanes.fabric, (flow,), data.itemsize, flow.source)
    out = Send(flow.target, tag, _view(flat_bytes(data)), planned.pieces[0])
    return lanes.post(replace(operation, expected_s=planned.busy_s), [out], [])


def receive(lanes: Lanes, operation: Operation, source: int, tag: int, data: torch.Tensor) -> Transfer:
    """The same at its other end."""
    return lanes.post(operation, [], [Receive(source, tag, _view(flat_bytes(data)))])


@dataclass(frozen=True, slots=True)
class _Planned:
    """Of a step, for one rank: the pieces of each flow that it sends, and how long each path should be busy with them.

    A path is as slow as the fullest link of it that this rank's pieces cross, other ranks' pieces counted.
    """

    pieces: Mapping[int, tuple[Piece, ...]]
    busy_s: Mapping[int, float]


@lru_cache(maxsize=512)
def _planned(fabric: Fabric, flows: Step, item: int, rank: int) -> _Planned:
    found: dict[int, list[Piece]] = {number: [] for number, flow in enumerate(flows) if flow.source == rank}
    if not found:
        return _Planned({}, {})
    plan = plan_step(fabric, flows, least_bytes=_LEAST_CUT, item=item)
    loads: Counter[Link] = Counter()
    for piece in plan.pieces:
        for link in fabric.links(flows[piece.flow], piece.path):
            loads[link] += piece.end - piece.begin
    busy_s: dict[int, float] = {}
    for piece in plan.pieces:
        if piece.flow not in found:
            continue
        found[piece.flow].append((piece.path or 0, piece.begin, piece.end))  # within a leaf any will do
        if piece.path is not None and piece.end > piece.begin:
            seconds = (loads[link] / fabric.rate(link) for link in fabric.links(flows[piece.flow], piece.path))
            busy_s[piece.path] = max(busy_s.get(piece.path, 0.0), *seconds)
    return _Planned({number: tuple(pieces) for number, pieces in found.items()}, busy_s)


def _part(views: Mapping[str, memoryview], region: Region) -> memoryview:
    return views[region.buffer][region.begin : region.end]


def _fold(job: Job, turn: Turn, buffers: Mapping[str, torch.Tensor]) -> None:
    if job.fold is None:
        return
    dtype = job.buffers["output"].dtype
    for fold in turn.folds:
        into, *parts = (
            buffers[region.buffer][region.begin : region.end].view(dtype) for region in (fold.into, *fold.parts)
        )
        job.fold(into, parts, fold.last)
