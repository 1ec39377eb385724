"""Carries out scripts over lanes: each step is planned for the rates of the moment, posted, waited for, folded.

Several scripts, each of a part of the tensor, are under way at once, in the order of `order.py`. Runs on the group's
own worker thread. What fails is told to all ranks, which then fail alike: half a collective cannot be repeated by one
of them.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from typing import Any, Protocol

import torch

from resilient.comms.collectives.order import merged
from resilient.comms.collectives.schedule import Region, Script, Turn
from resilient.comms.fabric import Fabric, Link
from resilient.comms.flows import Flow, Step
from resilient.comms.lanes.messages import Operation, Piece, Receive, Send, Transfer
from resilient.comms.lanes.spans import Spans
from resilient.comms.plan import plan_step

Fold = Callable[[torch.Tensor, Sequence[torch.Tensor], bool], None]
_Buffers = Mapping[str, Spans]  # by name
_LEAST_CUT = 1 << 16  # bytes: flows below are not cut, a piece costs more than it wins


class Lanes(Protocol):
    """What is asked of `resilient.comms.lanes`."""

    @property
    def fabric(self) -> Fabric: ...

    def post(self, operation: Operation, sends: Sequence[Send], receives: Sequence[Receive]) -> Transfer: ...

    def abort(self, reason: str) -> None: ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A part of a collective. `buffers`, by the script's names: flat, contiguous tensors in the main memory, which make
    one buffer end to end."""

    script: Script
    buffers: Mapping[str, Sequence[torch.Tensor]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One collective of one rank. `fold` is None where nothing is reduced."""

    operation: Operation
    rank: int
    parts: Sequence[Part]
    dtype: torch.dtype
    fold: Fold | None = None


def run(lanes: Lanes, job: Job) -> None:
    """Blocks until this rank's part is done; each step for no longer than the lanes' timeout.

    Raises CollectiveFailed or CollectiveMismatch, on all ranks alike, as the lanes do. Buffers are free then, too.
    """
    going: list[_Going] = []
    try:
        going += [_Going(lanes, job, part) for part in job.parts]
        for tag, number in enumerate(merged(lanes.fabric, [part.script for part in job.parts])):
            going[number].go_on(tag)
        for part in going:
            part.settle()
    except BaseException as error:
        lanes.abort(f"{job.operation.fingerprint}: {error}")  # nothing where the lanes have failed before
        for part in going:
            part.leave()
        raise


class _Going:
    """A part that is under way: which turn is next, and what is still to be done for the one before it."""

    def __init__(self, lanes: Lanes, job: Job, part: Part) -> None:
        self._lanes, self._job = lanes, job
        self._turns = iter(part.script.turns)
        spare = torch.empty(part.script.spare, dtype=torch.uint8)
        self._buffers = {name: _spans(tensors) for name, tensors in {**part.buffers, "spare": [spare]}.items()}
        self._pending: tuple[Turn, Transfer | None] | None = None

    def go_on(self, tag: int) -> None:
        """Begin the next turn, as soon as the one before it is done. `tag`: how many turns were begun before."""
        self.settle()
        turn = next(self._turns)
        self._pending = turn, _post(self._lanes, self._job, turn, tag, self._buffers)

    def settle(self) -> None:
        """Wait for the turn that is under way, and add up."""
        if self._pending is None:
            return
        turn, transfer = self._pending
        if transfer is not None:
            transfer.wait()
        _fold(self._job, turn, self._buffers)
        self._pending = None

    def leave(self) -> None:
        """After a failure: wait until the lanes have let go of the buffers."""
        if self._pending is not None and self._pending[1] is not None:
            self._pending[1].settle()


def flat_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a contiguous tensor, not copied."""
    return tensor.detach().reshape(-1).view(torch.uint8)


def _spans(tensors: Sequence[torch.Tensor]) -> Spans:
    # An ndarray has the buffer protocol, which type checkers learn from Python 3.12 on.
    arrays: list[Any] = [flat_bytes(tensor).numpy() for tensor in tensors]
    return Spans(*[memoryview(array) for array in arrays])


def _part(buffers: _Buffers, region: Region) -> Spans:
    return buffers[region.buffer].part(region.begin, region.end)


def _post(lanes: Lanes, job: Job, turn: Turn, tag: int, buffers: _Buffers) -> Transfer | None:
    planned = _planned(lanes.fabric, turn.flows, job.dtype.itemsize, job.rank)
    sends = [
        Send(turn.flows[number].target, tag, _part(buffers, turn.sends[number]), pieces)
        for number, pieces in planned.pieces.items()
        if turn.sends[number].nbytes
    ]
    receives = [
        Receive(turn.flows[number].source, tag, _part(buffers, region))
        for number, region in turn.receives.items()
        if region.nbytes
    ]
    operation = replace(job.operation, expected_s=planned.busy_s)
    return lanes.post(operation, sends, receives) if sends or receives else None


def send(lanes: Lanes, operation: Operation, flow: Flow, tag: int, data: torch.Tensor) -> Transfer:
    """One message, cut and placed as if it were alone. Does not block."""
    planned = _planned(lanes.fabric, (flow,), data.itemsize, flow.source)
    out = Send(flow.target, tag, _spans([data]), planned.pieces[0])
    return lanes.post(replace(operation, expected_s=planned.busy_s), [out], [])


def receive(lanes: Lanes, operation: Operation, source: int, tag: int, data: torch.Tensor) -> Transfer:
    """The same at its other end."""
    return lanes.post(operation, [], [Receive(source, tag, _spans([data]))])


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


def _fold(job: Job, turn: Turn, buffers: _Buffers) -> None:
    if job.fold is None:
        return
    for fold in turn.folds:
        rows = [_part(buffers, region) for region in (fold.into, *fold.parts)]
        cuts = sorted({0, *(end for row in rows for end in row.ends)})
        for begin, end in pairwise(cuts):  # each row lies together from one to the next
            into, *parts = [torch.frombuffer(next(row.within(begin, end)), dtype=job.dtype) for row in rows]
            job.fold(into, parts, fold.last)
