"""A matmul and its collective at the same time: rows in chunks, one is under way while the next is multiplied.

Over any group of torch.distributed, on any device. No autograd and no decisions: `resilient.kernels.dispatch` has
both. One chunk is the plain way: a matmul, and a collective that nothing hides. Sums are taken in the order of ranks:
results are the same bits at every run, and differ from plain ones by the rounding of sums only.

Each is to be called by all ranks of the group with the same shapes and chunks (`agree` compares them). They block until
the result is there (on a GPU: until it is queued) and raise the group's own error when a peer is gone.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from resilient.kernels.overlap.chunks import cut, tapered
from resilient.kernels.overlap.exchange import Gather, Group, Mirror, Swap, gather_all, point_to_point

_WIDE = (torch.float16, torch.bfloat16)  # summed in float32


def all_gather_matmul(
    shard: Tensor,
    weight: Tensor,
    group: Group,
    chunks: int,
    *,
    beside: Callable[[Tensor, int, int], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """[M/W, K] of each rank, gathered, times [K, N]: (the product [M, N], the gathered [M, K]).

    Own rows are multiplied first. `beside(rows, begin, end)` is called for each part [begin, end) of the gathered rows
    as it is there, in the same order at every run.
    """
    rows, world, rank = len(shard), group.size(), group.rank()
    gathered = shard.new_empty(world * rows, shard.shape[1])
    if chunks == 1:
        gather_all(gathered, shard, group)
        output = torch.mm(gathered, weight)
        if beside is not None:
            beside(gathered, 0, world * rows)
        return output, gathered
    output = shard.new_empty(world * rows, weight.shape[1])

    def multiply(begin: int, end: int) -> None:
        torch.mm(gathered[begin:end], weight, out=output[begin:end])
        if beside is not None:
            beside(gathered[begin:end], begin, end)

    cuts = cut(rows, chunks)
    gather = Gather(shard, gathered, cuts, group)
    multiply(rank * rows, (rank + 1) * rows)
    for chunk in range(len(cuts)):
        for begin, end in gather.wait(chunk):
            multiply(begin, end)
    gather.finish()
    return output, gathered


def matmul_reduce_scatter(
    input: Tensor, weight: Tensor, group: Group, chunks: int, *, meanwhile: Callable[[], None] | None = None
) -> Tensor:
    """[M, K] times [K, N], summed over the ranks, of which rank r gets rows r*M/W to (r+1)*M/W: [M/W, N].

    Peers' rows are multiplied first, own ones last. `meanwhile()` is called while the last are on their way.
    """
    world, rank = group.size(), group.rank()
    rows = len(input) // world
    cuts = cut(rows, chunks)
    swap = Swap(input, weight.shape[1], cuts, group)
    whole = torch.mm(input, weight) if chunks == 1 else None
    for number, (begin, end) in enumerate(cuts):
        box = swap.outgoing(number)
        for peer in swap.order:
            slot = swap.slots.index(peer)
            part = slice(peer * rows + begin, peer * rows + end)
            if whole is not None:
                box[slot].copy_(whole[part])
            else:
                torch.mm(input[part], weight, out=box[slot])
            swap.sent(number, slot)
    own = slice(rank * rows, (rank + 1) * rows)
    output = torch.mm(input[own], weight) if whole is None else whole[own].clone()
    if meanwhile is not None:
        meanwhile()
    for number, (begin, end) in enumerate(cuts):
        _sum_into(output[begin:end], rank, swap.wait(number))
    swap.finish()
    return output


def matmul_all_reduce(
    input: Tensor, weight: Tensor, group: Group, chunks: int, *, meanwhile: Callable[[], None] | None = None
) -> Tensor:
    """[M, K] times [K, N], summed over the ranks: [M, N] on each of them, the same bits on all.

    Two ranks exchange what they have, where messages do better: as many bytes as an all-reduce, in one phase, not two.
    `meanwhile()` is called while the last rows are on their way.
    """
    if chunks == 1 and meanwhile is None:
        output = torch.mm(input, weight)
        dist.all_reduce(output, group=group)
        return output
    output = input.new_empty(len(input), weight.shape[1])
    cuts = tapered(len(input), chunks)
    pair = chunks > 1 and group.size() == 2 and point_to_point(group, input)
    swapped = Mirror(output, cuts, group) if pair else None
    works = []
    for number, (begin, end) in enumerate(cuts):
        part = output[begin:end]
        torch.mm(input[begin:end], weight, out=part)
        if swapped is not None:
            swapped.sent(number)
        else:
            works.append(dist.all_reduce(part, group=group, async_op=True))
    if meanwhile is not None:
        meanwhile()
    for work in works:
        assert work is not None  # only for ranks that are not in the group
        work.wait()
    if swapped is not None:
        for number, (begin, end) in enumerate(cuts):
            _sum_into(output[begin:end], group.rank(), swapped.wait(number))
    return output


def _sum_into(own: Tensor, rank: int, others: dict[int, Tensor]) -> None:
    """`own` becomes the sum of all ranks' parts, added in the order of ranks."""
    wide = torch.float32 if own.dtype in _WIDE else own.dtype
    parts = {**others, rank: own}
    first, second, *rest = (parts[number].to(wide) for number in sorted(parts))
    if not rest:
        torch.add(first, second, out=own) if wide == own.dtype else own.copy_(first + second)
        return
    total = first + second
    for part in rest:
        total += part
    own.copy_(total)
