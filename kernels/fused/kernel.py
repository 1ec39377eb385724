"""The Triton kernels: matrix products that move their operands or results between ranks while they compute.

One source for GPUs and for Triton's interpreter, which runs the programs of a grid one after another: no program waits
for a later one of its own grid. `protocol` in the docs says why that is free of deadlock, and why no buffer is
overwritten early. Signals are compared with the call's epoch and never reset. Memory of ranks is given as addresses
only: the interpreter copies tensor arguments back onto themselves after a launch, over what peers have written.
"""

# What a kernel's code means is Triton's to say: to pyright it is Python, and Triton's annotations do not fit that.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false

from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl

from resilient.kernels.fused.signals import ENTERED, admit, buffer, enter, failed, pad, signal, wait

_jit: Callable[..., Any] = triton.jit
# Not another binary for each epoch, rank or number of tries.
_entry: Callable[..., Any] = triton.jit(do_not_specialize=["rank", "epoch", "call", "tries"])


@_jit
def _product(
    left: tl.tensor,
    weight: tl.tensor,
    first_row: tl.tensor,
    row_limit: tl.tensor,
    first_column: tl.tensor,
    columns: tl.tensor,
    depth: tl.tensor,
    depth_stride: tl.tensor,
    column_stride: tl.tensor,
    bm: tl.constexpr,
    bn: tl.constexpr,
    bk: tl.constexpr,
    even: tl.constexpr,
    interpreted: tl.constexpr,
) -> tl.tensor:
    """A tile of left [.., depth] @ weight [depth, columns], in float32. `even`: no column or depth is beyond."""
    # Rows beyond the limit read the last one again: their results are not stored.
    rows = tl.minimum(first_row + tl.arange(0, bm), row_limit - 1).to(tl.int64)
    at = first_column + tl.arange(0, bn)
    deep = tl.arange(0, bk)
    a = left + rows[:, None] * depth + deep[None, :]
    b = weight + deep[:, None].to(tl.int64) * depth_stride + at[None, :].to(tl.int64) * column_stride
    total = tl.zeros((bm, bn), dtype=tl.float32)
    for done in range(0, depth, bk):
        if even:
            x = tl.load(a)
            w = tl.load(b)
        else:
            x = tl.load(a, mask=deep[None, :] < depth - done, other=0.0)
            w = tl.load(b, mask=(deep[:, None] < depth - done) & (at[None, :] < columns), other=0.0)
        if interpreted:  # it multiplies the bits of bfloat16 as if they were integers
            x = x.to(tl.float32)
            w = w.to(tl.float32)
        total = tl.dot(x, w, total, input_precision="ieee")
        a += bk
        b += bk * depth_stride
    return total


@_jit
def _narrow(value: tl.tensor, dtype: tl.constexpr, interpreted: tl.constexpr) -> tl.tensor:
    """Rounded to the nearest, ties to even."""
    if interpreted and dtype == tl.bfloat16:  # it cuts bits off instead, and loses the carry when told to round
        bits = value.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = tl.where(value != value, 0x7FC0, rounded)
        return rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return value.to(dtype)


@_jit
def _finish(
    total: tl.tensor,
    bias: tl.tensor,
    first_column: tl.tensor,
    columns: tl.tensor,
    bn: tl.constexpr,
    biased: tl.constexpr,
    activation: tl.constexpr,
) -> tl.tensor:
    """Bias, then activation: 0 none, 1 relu, 2 gelu, 3 silu."""
    if biased:
        at = first_column + tl.arange(0, bn)
        total += tl.load(bias + at, mask=at < columns, other=0.0).to(tl.float32)[None, :]
    if activation == 1:
        total = tl.where(total > 0, total, total * 0.0)
    if activation == 2:
        total = total * 0.5 * (1.0 + tl.erf(total * 0.7071067811865476))
    if activation == 3:
        total = total / (1.0 + tl.exp(-total))
    return total


@_jit
def _tile_of(
    number: tl.tensor, rows: tl.tensor, columns: tl.tensor, bm: tl.constexpr, bn: tl.constexpr, group: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Row and column of a tile within a block of rows: `group` rows of tiles at a time, down their columns."""
    down = tl.cdiv(rows, bm)
    across = tl.cdiv(columns, bn)
    band = number // (group * across)
    height = tl.minimum(group, down - band * group)
    inside = number - band * group * across
    return band * group + inside % height, inside // height


@_entry
def all_gather_matmul(
    shard: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    buffers: tl.tensor,
    signals: tl.tensor,
    rank: tl.tensor,
    epoch: tl.tensor,
    call: tl.tensor,
    tries: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    depth: tl.tensor,
    depth_stride: tl.tensor,
    column_stride: tl.tensor,
    world: tl.constexpr,
    chunks: tl.constexpr,
    bm: tl.constexpr,
    bn: tl.constexpr,
    bk: tl.constexpr,
    group: tl.constexpr,
    copied: tl.constexpr,
    aligned: tl.constexpr,
    even: tl.constexpr,
    biased: tl.constexpr,
    activation: tl.constexpr,
    interpreted: tl.constexpr,
) -> None:
    """out = epilogue(all shards [rows, depth] @ weight [depth, columns]). A chunk is `group` rows of tiles.

    The first (world - 1) * chunks programs write the shard into the others' buffers, a chunk each; the rest compute a
    tile each, the own rows first.
    """
    pid = tl.program_id(0)
    own = pad(signals, rank)
    element = shard.dtype.element_ty
    pushes = (world - 1) * chunks
    if pid == 0:
        enter(signals, rank, epoch, call, world)
    if pid < pushes:
        others: tl.constexpr = world - 1 if world > 1 else 1
        chunk = pid // others
        peer = (rank + 1 + pid % others) % world
        if admit(signals, own, peer, epoch, call, tries, world, interpreted):
            begin = (chunk * group * bm).to(tl.int64) * depth
            count = tl.minimum(group * bm, rows - chunk * group * bm).to(tl.int64) * depth
            target = buffer(buffers, peer, element) + rank.to(tl.int64) * rows * depth
            for at in range(0, count, copied):
                offset = at + tl.arange(0, copied)
                part = tl.load(shard + begin + offset, mask=offset < count)
                tl.store(target + begin + offset, part, mask=offset < count)
            signal(signals, peer, ENTERED + 2 * world + rank * chunks + chunk, epoch)
    else:
        tiles = tl.cdiv(rows, bm) * tl.cdiv(columns, bn)
        number = pid - pushes
        source = (rank + number // tiles) % world
        down, across = _tile_of(number % tiles, rows, columns, bm, bn, group)
        left = shard
        if source != rank:
            arrived = ENTERED + 2 * world + source * chunks + down // group
            wait(signals, own, arrived, source, epoch, tries, world, interpreted)
            left = buffer(buffers, rank, element) + source.to(tl.int64) * rows * depth
        total = _product(
            left,
            weight,
            down * bm,
            rows,
            across * bn,
            columns,
            depth,
            depth_stride,
            column_stride,
            bm,
            bn,
            bk,
            even,
            interpreted,
        )
        total = _finish(total, bias, across * bn, columns, bn, biased, activation)
        into = down * bm + tl.arange(0, bm)
        at = across * bn + tl.arange(0, bn)
        place = out + (source * rows + into)[:, None].to(tl.int64) * columns + at[None, :]
        tl.store(place, _narrow(total, element, interpreted), mask=(into < rows)[:, None] & (at < columns)[None, :])


@_entry
def matmul_reduce(
    left: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    buffers: tl.tensor,
    signals: tl.tensor,
    rank: tl.tensor,
    epoch: tl.tensor,
    call: tl.tensor,
    tries: tl.tensor,
    whole: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    depth: tl.tensor,
    depth_stride: tl.tensor,
    column_stride: tl.tensor,
    everywhere: tl.constexpr,
    world: tl.constexpr,
    bm: tl.constexpr,
    bn: tl.constexpr,
    bk: tl.constexpr,
    group: tl.constexpr,
    even: tl.constexpr,
    biased: tl.constexpr,
    activation: tl.constexpr,
    interpreted: tl.constexpr,
) -> None:
    """The sum over ranks of left [whole, depth] @ weight; rank r reduces rows r * rows and following, in rank order.

    `out` has those rows, or with `everywhere` all of them. Programs, in this order: the tiles of other ranks' rows,
    next rank first, each written to its owner; the own tiles, which take what the others wrote; with `everywhere`, the
    tiles that others have reduced.
    """
    pid = tl.program_id(0)
    own = pad(signals, rank)
    element = left.dtype.element_ty
    tiles = tl.cdiv(rows, bm) * tl.cdiv(columns, bn)
    if pid == 0:
        enter(signals, rank, epoch, call, world)
    owner = (rank + 1 + pid // tiles) % world
    number = pid % tiles
    down, across = _tile_of(number, rows, columns, bm, bn, group)
    first = owner * rows
    limit = tl.minimum(whole - first, rows)  # the last rank may have fewer rows, or none
    into = down * bm + tl.arange(0, bm)
    at = across * bn + tl.arange(0, bn)
    inside = (into < limit)[:, None] & (at < columns)[None, :]
    place = into[:, None].to(tl.int64) * columns + at[None, :]
    part_size = tl.cast(rows, tl.int64) * columns  # numbers in a rank's rows: the unit of the buffer
    partial = ENTERED + 2 * world
    reduced = partial + world * tiles
    if pid < (world - 1) * tiles:
        if admit(signals, own, owner, epoch, call, tries, world, interpreted):
            if limit > 0:
                total = _product(
                    left + first.to(tl.int64) * depth,
                    weight,
                    down * bm,
                    limit,
                    across * bn,
                    columns,
                    depth,
                    depth_stride,
                    column_stride,
                    bm,
                    bn,
                    bk,
                    even,
                    interpreted,
                )
                target = buffer(buffers, owner, element) + rank * part_size
                tl.store(target + place, _narrow(total, element, interpreted), mask=inside)
            signal(signals, owner, partial + rank * tiles + number, epoch)
    elif pid < world * tiles:
        mine = tl.zeros((bm, bn), dtype=tl.float32)
        if limit > 0:
            mine = _product(
                left + first.to(tl.int64) * depth,
                weight,
                down * bm,
                limit,
                across * bn,
                columns,
                depth,
                depth_stride,
                column_stride,
                bm,
                bn,
                bk,
                even,
                interpreted,
            )
        total = tl.zeros((bm, bn), dtype=tl.float32)
        base = buffer(buffers, rank, element)
        for source in range(world):
            if source == rank:
                total += mine
            else:
                wait(signals, own, partial + source * tiles + number, source, epoch, tries, world, interpreted)
                total += tl.load(base + source * part_size + place, mask=inside, other=0.0).to(tl.float32)
        total = _finish(total, bias, across * bn, columns, bn, biased, activation)
        result = _narrow(total, element, interpreted)
        if everywhere:
            tl.store(out + first.to(tl.int64) * columns + place, result, mask=inside)
            if failed(own) == 0:  # or the sum may lack what was waited for in vain: others are to give up as well
                for step in range(1, world):
                    peer = (rank + step) % world
                    target = buffer(buffers, peer, element) + (world + rank) * part_size
                    tl.store(target + place, result, mask=inside)
                    signal(signals, peer, reduced + rank * tiles + number, epoch)
        else:
            tl.store(out + place, result, mask=inside)
    else:
        wait(signals, own, reduced + owner * tiles + number, owner, epoch, tries, world, interpreted)
        base = buffer(buffers, rank, element) + (world + owner) * part_size
        result = tl.load(base + place, mask=inside)
        tl.store(out + first.to(tl.int64) * columns + place, result, mask=inside)
