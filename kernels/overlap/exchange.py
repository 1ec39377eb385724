"""Rows on their way between ranks, in chunks, while something else is computed. Needs no backend in particular.

`Gather`: each rank's rows to all. `Swap`: to each rank its own rows from all. `Mirror`: all rows, of two ranks. gloo
gets point-to-point messages, which go straight into place and whose receives can wait from the start; its
reduce-scatter would move twice the bytes. Other backends ("nccl", "resilient") get their own collectives, one a chunk.
An error is the group's own, raised by `wait`. Works keep the tensors that they use, so whoever leaves early by an error
leaves no memory that is still written to.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from resilient.kernels.overlap.chunks import peers_of

Group = dist.ProcessGroup
_TAG = 0x5E51  # so that messages of the user's own, which have 0 unless said otherwise, are not mistaken for ours


def point_to_point(group: Group, tensor: Tensor) -> bool:
    """Whether messages do better than collectives: gloo, by whatever name the group goes.

    A group written in Python may have gloo beside its own collectives, and is not taken for one.
    """
    if tensor.device.type != "cpu" or type(group) not in (dist.ProcessGroup, dist.ProcessGroupGloo):
        return False
    held: Any = group._get_backend(tensor.device) if type(group) is dist.ProcessGroup else group
    return isinstance(held, dist.ProcessGroupGloo)


def gather_all(whole: Tensor, part: Tensor, group: Group, *, async_op: bool = False) -> Any:
    """torch's all-gather of equal parts, which changed its name in 2.13."""
    call: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    return call(whole, part, group=group, async_op=async_op)


class Gather:
    """All ranks' [rows, K] shards into `whole` [world * rows, K], whose own rows are filled at once."""

    def __init__(self, shard: Tensor, whole: Tensor, cuts: Sequence[tuple[int, int]], group: Group) -> None:
        """Starts everything. `cuts`: of a shard's rows, the same on all ranks."""
        self._whole, self._cuts = whole, cuts
        self._rank, self._world = group.rank(), group.size()
        self._rows = len(shard)
        self._own(0, self._rows).copy_(shard)
        self._sends: list[Any] = []
        self._works: list[list[Any]] = []
        self._boxes: list[Tensor | None] = []
        if point_to_point(group, shard):
            self._start_messages(shard, group)
        else:
            self._start_collectives(shard, group)

    def wait(self, chunk: int) -> list[tuple[int, int]]:
        """Blocks until a chunk has come from all; the [begin, end) of `whole` that came. Raises what the group does."""
        for work in self._works[chunk]:
            work.wait()
        begin, end = self._cuts[chunk]
        places = [(peer * self._rows + begin, peer * self._rows + end) for peer in peers_of(self._rank, self._world)]
        box = self._boxes[chunk]
        if box is not None:
            for peer, place in zip(peers_of(self._rank, self._world), places, strict=True):
                self._whole[place[0] : place[1]].copy_(box[peer])
            self._boxes[chunk] = None
        return places

    def finish(self) -> None:
        """Blocks until this rank's rows have left."""
        for work in self._sends:
            work.wait()

    def _own(self, begin: int, end: int) -> Tensor:
        first = self._rank * self._rows
        return self._whole[first + begin : first + end]

    def _start_messages(self, shard: Tensor, group: Group) -> None:
        order = peers_of(self._rank, self._world)
        for begin, end in self._cuts:
            into = [self._whole[peer * self._rows + begin : peer * self._rows + end] for peer in reversed(order)]
            self._works.append([_receive(rows, peer, group) for rows, peer in zip(into, reversed(order), strict=True)])
            self._boxes.append(None)
        for begin, end in self._cuts:
            self._sends += [_send(shard[begin:end], peer, group) for peer in order]

    def _start_collectives(self, shard: Tensor, group: Group) -> None:
        for begin, end in self._cuts:
            box = shard.new_empty(self._world, end - begin, shard.shape[1])
            self._works.append([gather_all(box.view(-1, shard.shape[1]), shard[begin:end], group, async_op=True)])
            self._boxes.append(box)


class Swap:
    """Chunk by chunk, rows for each peer go out, and as many come in from each. Slot s is peer `order[s]`."""

    def __init__(self, like: Tensor, width: int, cuts: Sequence[tuple[int, int]], group: Group) -> None:
        """`cuts`: of the rows that go to one peer. Receives start here where they can."""
        self._group = group
        self.order = peers_of(group.rank(), group.size())
        self._messages = point_to_point(group, like)
        # A collective takes its parts in the order of ranks, whatever the order in which they were multiplied.
        self.slots = sorted(self.order) if not self._messages else self.order
        self._in = [like.new_empty(len(self.order), end - begin, width) for begin, end in cuts]
        self._works: list[list[Any]] = [[] for _ in cuts]
        self._sends: list[Any] = []
        self._left: dict[int, tuple[Tensor, int]] = {}
        if self._messages:
            for number, box in enumerate(self._in):
                self._works[number] = [_receive(box[slot], peer, group) for slot, peer in enumerate(self.slots)]

    def outgoing(self, chunk: int) -> Tensor:
        """An empty [peers, rows, width] to be filled, slot by slot; `sent` says when one is."""
        box = torch.empty_like(self._in[chunk])
        self._left[chunk] = (box, len(self.slots))
        return box

    def sent(self, chunk: int, slot: int) -> None:
        """A slot is filled, and may leave."""
        box, left = self._left[chunk]
        self._left[chunk] = (box, left - 1)
        if self._messages:
            self._sends.append(_send(box[slot], self.slots[slot], self._group))
        elif left == 1:
            self._works[chunk] = [self._exchange(box, self._in[chunk])]

    def wait(self, chunk: int) -> dict[int, Tensor]:
        """Blocks until a chunk has come from all: rows by rank. Raises what the group does."""
        for work in self._works[chunk]:
            work.wait()
        return {peer: self._in[chunk][slot] for slot, peer in enumerate(self.slots)}

    def finish(self) -> None:
        """Blocks until this rank's rows have left."""
        for work in self._sends:
            work.wait()

    def _exchange(self, box: Tensor, into: Tensor) -> Any:
        rows = into.shape[1]
        splits = [0 if rank == self._group.rank() else rows for rank in range(self._group.size())]
        width = into.shape[2]
        return dist.all_to_all_single(
            into.view(-1, width), box.view(-1, width), splits, splits, group=self._group, async_op=True
        )


class Mirror:
    """Two ranks, by messages: chunk by chunk, each gets all that the other has."""

    def __init__(self, whole: Tensor, cuts: Sequence[tuple[int, int]], group: Group) -> None:
        """`whole`: [rows, width], to be filled chunk by chunk. Receives start here."""
        self._whole, self._cuts, self._group = whole, cuts, group
        self._peer = 1 - group.rank()
        self._in = torch.empty_like(whole)
        self._receives = [_receive(self._in[begin:end], self._peer, group) for begin, end in cuts]
        self._sends: list[Any] = []

    def sent(self, chunk: int) -> None:
        """A chunk is filled, and may leave. Chunks come in order."""
        begin, end = self._cuts[chunk]
        self._sends.append(_send(self._whole[begin:end], self._peer, self._group))

    def wait(self, chunk: int) -> dict[int, Tensor]:
        """Blocks until a chunk has come, and the own one has left; the peer's rows by its rank."""
        self._receives[chunk].wait()
        self._sends[chunk].wait()
        begin, end = self._cuts[chunk]
        return {self._peer: self._in[begin:end]}


def _send(rows: Tensor, peer: int, group: Group) -> Any:
    return dist.isend(rows, group=group, group_dst=peer, tag=_TAG)


def _receive(rows: Tensor, peer: int, group: Group) -> Any:
    return dist.irecv(rows, group=group, group_src=peer, tag=_TAG)
