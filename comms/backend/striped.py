"""Collectives of tensors over lanes: what is between torch's calls and scripts of bytes.

Usable without a process group of its own: `Striped` needs lanes and the fabric that all ranks agree on. Collectives run
one after the other in the order in which they were called, which must be the same on all ranks.
"""

import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from resilient.comms.backend.worker import Work, Worker
from resilient.comms.collectives import choice, execute, fold, schedule
from resilient.comms.collectives.fold import Reduction
from resilient.comms.collectives.schedule import Region
from resilient.comms.fabric import Fabric
from resilient.comms.flows import Flow
from resilient.comms.lanes.engine import Lanes
from resilient.comms.lanes.messages import POINT_TO_POINT, Operation, Transfer
from resilient.errors import CollectiveFailed, UsageError

_SEGMENT_BYTES = 1 << 22
_MOST_SEGMENTS = 4  # of a collective under way at once
_COUNTED_BITS = 34  # of an operation's number: messages between two ranks


class Striped:
    """`fabric`: as agreed upon at the start. Tensors are in main memory, and belong to it until the work is done.

    All methods return at once; errors of what a rank was given are raised at once, on this rank, before anything is
    sent: call them alike on all ranks.
    """

    def __init__(self, lanes: Lanes, fabric: Fabric) -> None:
        self.rank, self.size = lanes.rank, lanes.size
        self.lanes = lanes
        self._fabric = fabric
        self._worker = Worker(f"collectives-{lanes.rank}")
        self._finisher = Worker(f"messages-{lanes.rank}")
        self._count = 0
        self._messages: dict[tuple[int, int, int], int] = {}  # by source, target, tag
        self._lock = threading.Lock()

    def all_reduce(self, tensor: Tensor, reduction: Reduction = "sum") -> Work:
        """In place. Any shape, the same on all ranks. Raises UsageError for a dtype that cannot be reduced so."""
        _check(tensor, reduction)
        flat = _flat(tensor)
        what = f"all_reduce ({reduction}) of {_said(flat)}"
        parts = []
        for piece in flat.tensor_split(_segments(flat)):
            script, _ = choice.all_reduce(self._fabric, self.rank, self._at(piece))
            parts.append(execute.Part(script=script, buffers={"input": [piece], "output": [piece]}))
        return self._submit(self._job(what, parts, reduction), [tensor], after=_copy_back(tensor, flat))

    def reduce_scatter(self, output: Tensor, input: Tensor, reduction: Reduction = "sum") -> Work:
        """`input` is `size` times as long as `output`, which becomes this rank's part of the reduction."""
        _check(input, reduction)
        self._fits(output, input, "reduce_scatter")
        flat, into = _flat(input), _flat(output)
        parts = []
        for rows, piece in zip(self._columns(flat), into.tensor_split(_segments(flat)), strict=True):
            region = Region("output", 0, piece.nbytes)
            script, _ = choice.reduce_scatter(self._fabric, self.rank, self._at(*rows), region)
            parts.append(execute.Part(script=script, buffers={"input": rows, "output": [piece]}))
        what = f"reduce_scatter ({reduction}) of {_said(flat)}"
        return self._submit(self._job(what, parts, reduction), [output], after=_copy_back(output, into))

    def all_gather(self, output: Tensor, input: Tensor) -> Work:
        """`output`, `size` times as long as `input`, becomes all ranks' inputs end to end."""
        self._fits(input, output, "all_gather")
        flat = _flat(output)
        parts = []
        for rows in self._columns(flat):
            script, _ = choice.all_gather(self._fabric, self.rank, self._at(*rows))
            parts.append(execute.Part(script=script, buffers={"output": rows}))
        own = flat.tensor_split(self.size)[self.rank]
        before = partial(_copy, own, input)
        what = f"all_gather into {_said(flat)}"
        return self._submit(self._job(what, parts), [output], before=before, after=_copy_back(output, flat))

    def broadcast(self, tensor: Tensor, root: int) -> Work:
        """`tensor` of `root`, a rank of this group, to all."""
        if not 0 <= root < self.size:
            raise UsageError(f"broadcast from rank {root}: the group has ranks 0 to {self.size - 1}")
        flat = _flat(tensor)
        script, _ = choice.broadcast(self._fabric, self.rank, self._at(flat), root)
        what = f"broadcast from {root} of {_said(flat)}"
        parts = [execute.Part(script=script, buffers={"output": [flat]})]
        return self._submit(self._job(what, parts), [tensor], after=_copy_back(tensor, flat))

    def all_to_all(self, output: Tensor, input: Tensor, received: Sequence[int] = (), sent: Sequence[int] = ()) -> Work:
        """Row blocks of `input` to all ranks: `sent[r]` rows to rank r, `received[r]` from it; empty: equal ones."""
        rows_out, rows_in = self._rows(output, received, "output"), self._rows(input, sent, "input")
        if output.dtype != input.dtype:
            raise UsageError(f"all_to_all of {input.dtype} into {output.dtype}: they must be of one dtype")
        flat, into = _flat(input), _flat(output)
        width = _width(output if output.numel() else input)
        bytes_in = [rows * width for rows in rows_in]
        bytes_out = [rows * width for rows in rows_out]
        own_in, own_out = sum(rows_in[: self.rank]) * width, sum(rows_out[: self.rank]) * width
        if bytes_in[self.rank] != bytes_out[self.rank]:
            raise UsageError(
                f"all_to_all: rank {self.rank} sends {rows_in[self.rank]} rows to itself, and expects "
                f"{rows_out[self.rank]} from itself"
            )
        script = schedule.all_to_all(self.rank, bytes_in, bytes_out)
        source = execute.flat_bytes(flat)[own_in : own_in + bytes_in[self.rank]]
        target = execute.flat_bytes(into)[own_out : own_out + bytes_out[self.rank]]
        what = f"all_to_all of {output.dtype}"
        parts = [execute.Part(script=script, buffers={"input": [flat], "output": [into]})]
        before = partial(_copy, target, source)
        return self._submit(self._job(what, parts), [output], before=before, after=_copy_back(output, into))

    def send(self, tensor: Tensor, target: int, tag: int = 0) -> Work:
        """To one rank. In no order with collectives; messages of one tag between two ranks keep theirs."""
        flat = _flat(tensor)
        operation = self._message(self.rank, target, tag, flat)
        transfer = execute.send(self.lanes, operation, Flow(self.rank, target, flat.nbytes), tag, flat)
        return self._awaited(transfer, flat, [tensor], None)

    def receive(self, tensor: Tensor, source: int, tag: int = 0) -> Work:
        """From one rank; of the size and dtype that it sends."""
        flat = _flat(tensor)
        transfer = execute.receive(self.lanes, self._message(source, self.rank, tag, flat), source, tag, flat)
        return self._awaited(transfer, flat, [tensor], _copy_back(tensor, flat))

    def _message(self, source: int, target: int, tag: int, flat: Tensor) -> Operation:
        if not (0 <= source < self.size and 0 <= target < self.size) or source == target:
            raise UsageError(f"a message from rank {source} to rank {target}: the group has ranks 0 to {self.size - 1}")
        if not 0 <= tag < 1 << 32:
            raise UsageError(f"tag {tag}: tags are numbers from 0 to {(1 << 32) - 1}")
        with self._lock:
            count = self._messages[source, target, tag] = self._messages.get((source, target, tag), 0) + 1
        number = POINT_TO_POINT + ((source * self.size + target) << _COUNTED_BITS) + count % (1 << _COUNTED_BITS)
        return Operation(number, f"message {count} of tag {tag} from rank {source} to {target}: {_said(flat)}")

    def _awaited(
        self, transfer: Transfer, flat: Tensor, result: list[Tensor], after: Callable[[], None] | None
    ) -> Work:
        """Not finished in the lanes' thread: whoever waits may do what takes a while."""
        work = Work(result)

        def done() -> None:
            transfer.wait()
            _ = flat  # must live until here
            if after is not None:
                after()

        def call() -> None:
            try:
                self._finisher.put(partial(work.carry_out, done))
            except CollectiveFailed as error:  # it is closed
                work.finish(error)

        transfer.add_done_callback(call)
        return work

    def abort(self, reason: str) -> None:
        """Fail what is under way and all that comes later, on every rank."""
        self.lanes.abort(reason)

    def report(self) -> dict[str, Any]:
        """State, bytes and rates of each lane, as plain data."""
        return self.lanes.report()

    def close(self) -> None:
        self._worker.close()
        self.lanes.close()
        self._finisher.close()

    def _job(self, what: str, parts: Sequence[execute.Part], reduction: Reduction | None = None) -> execute.Job:
        self._count += 1
        return execute.Job(
            operation=Operation(self._count, f"{what}, {parts[0].script.name}"),
            rank=self.rank,
            parts=parts,
            dtype=parts[0].buffers["output"][0].dtype,
            fold=None if reduction is None else partial(_fold, reduction, self.size),
        )

    def _submit(
        self,
        job: execute.Job,
        result: list[Tensor],
        *,
        before: Callable[[], None] | None = None,
        after: Callable[[], None] | None = None,
    ) -> Work:
        def call() -> None:
            try:
                if before is not None:
                    before()
                execute.run(self.lanes, job)
                if after is not None:
                    after()
            except Exception as error:
                self.lanes.abort(f"{job.operation.fingerprint}: {error}")  # nothing where the lanes have failed before
                raise

        return self._worker.submit(call, result)

    def _at(self, *pieces: Tensor) -> tuple[int, ...]:
        """Where the parts of all ranks begin and end, of what pieces make end to end."""
        return tuple(schedule.parts(sum(one.nbytes for one in pieces), self.size, pieces[0].itemsize))

    def _columns(self, flat: Tensor) -> list[list[Tensor]]:
        """The segments of a tensor that has a part for each rank: each is a piece of every part."""
        if _segments(flat) == 1:
            return [[flat]]
        rows = [part.tensor_split(_segments(flat)) for part in flat.tensor_split(self.size)]
        return [list(column) for column in zip(*rows, strict=True)]

    def _fits(self, part: Tensor, whole: Tensor, what: str) -> None:
        if part.numel() * self.size != whole.numel() or part.dtype != whole.dtype:
            raise UsageError(
                f"{what}: {_said(whole)} is not {self.size} times {_said(part)}; the group has {self.size} ranks"
            )

    def _rows(self, tensor: Tensor, splits: Sequence[int], name: str) -> list[int]:
        rows = tensor.shape[0] if tensor.dim() else 1
        if splits:
            if len(splits) != self.size or sum(splits) != rows:
                raise UsageError(f"all_to_all: {name} has {rows} rows, and its splits are {list(splits)}")
            return list(splits)
        if rows % self.size:
            raise UsageError(f"all_to_all: {name} has {rows} rows, which {self.size} ranks cannot share equally")
        return [rows // self.size] * self.size


def _segments(flat: Tensor) -> int:
    return min(_MOST_SEGMENTS, max(1, flat.nbytes // _SEGMENT_BYTES))


def _check(tensor: Tensor, reduction: Reduction) -> None:
    if not fold.supported(reduction, tensor.dtype):
        raise UsageError(
            f"{reduction} of {tensor.dtype} is not possible; possible are {', '.join(map(str, fold.FLOATS))}, and "
            f"without an average {', '.join(map(str, fold.INTEGERS))}"
        )


def _fold(reduction: Reduction, ranks: int, into: Tensor, parts: Sequence[Tensor], last: bool) -> None:
    fold.fold(reduction, into, parts, ranks=ranks, last=last)


def _flat(tensor: Tensor) -> Tensor:
    """The numbers of a tensor in a row; a copy only where they do not lie so."""
    if tensor.device.type != "cpu":
        raise UsageError(f"lanes carry tensors in main memory, and this one is on {tensor.device}")
    return tensor.detach().contiguous().view(-1)


def _copy(into: Tensor, source: Tensor) -> None:
    source = source.detach().reshape(-1)
    if into.data_ptr() != source.data_ptr():
        into.copy_(source)


def _copy_back(tensor: Tensor, flat: Tensor) -> Callable[[], None] | None:
    """For a tensor that was not contiguous."""
    if tensor.numel() == 0 or tensor.data_ptr() == flat.data_ptr():
        return None
    return partial(_copy_whole, tensor, flat)


def _copy_whole(tensor: Tensor, flat: Tensor) -> None:
    tensor.detach().copy_(flat.view(tensor.shape))


def _width(tensor: Tensor) -> int:
    """Bytes of a row."""
    rows = tensor.shape[0] if tensor.dim() else 1
    return tensor.nbytes // rows if rows else 0


def _said(tensor: Tensor) -> str:
    return f"{tensor.numel()} {str(tensor.dtype).removeprefix('torch.')}"
