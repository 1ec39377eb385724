"""The catalog of a job of thousands of ranks that nobody has here: what each would have written, as numbers.

A model of Llama's shapes, cut by the ways that the library knows. Every rank's file has its pieces one behind the
other, so that offsets are as irregular as they really are.
"""

import json
import math
from collections.abc import Callable

import numpy as np

from resilient.checkpoint.catalog.catalog import Catalog
from resilient.checkpoint.catalog.index import Entry, Header, Index, Member
from resilient.checkpoint.catalog.native import native_catalog
from resilient.checkpoint.catalog.table import FILE, PieceTable, Rows
from resilient.checkpoint.digest import digest
from resilient.checkpoint.pieces import Replicated, share

HIDDEN, FUSED, KEYS, VOCABULARY = 8192, 28672, 1024, 128256
TP = 8
BEGINS = 1 << 20  # of the data, behind the header, in each file
OBJECTS = 1 << 16  # behind the data
ITEMSIZE = 4
LAYER = {
    "input_layernorm": (HIDDEN,),
    "q_proj": (HIDDEN, HIDDEN),
    "k_proj": (KEYS, HIDDEN),
    "v_proj": (KEYS, HIDDEN),
    "o_proj": (HIDDEN, HIDDEN),
    "post_attention_layernorm": (HIDDEN,),
    "gate_proj": (FUSED, HIDDEN),
    "up_proj": (FUSED, HIDDEN),
    "down_proj": (HIDDEN, FUSED),
}
Shapes = dict[str, tuple[int, ...]]


def shapes(tensors: int) -> Shapes:
    """As many parameters: embedding, head, a norm, and layers."""
    found: Shapes = {"embed_tokens": (VOCABULARY, HIDDEN), "norm": (HIDDEN,), "lm_head": (VOCABULARY, HIDDEN)}
    for layer in range(tensors):
        for name, shape in LAYER.items():
            if len(found) < tensors:
                found[f"layers.{layer}.{name}"] = shape
    return found


class Writer:
    """Rank by rank, where in its file the next piece goes."""

    def __init__(self, ranks: int) -> None:
        self.ranks = np.arange(ranks, dtype=np.int64)
        self.ends = np.zeros(ranks, dtype=np.int64)

    def put(self, starts: Rows, stops: Rows, offsets: Rows, sizes: Rows) -> PieceTable:
        """Each rank's piece of one tensor: ranges [ranks], boxes [ranks, dims]; empty ones are left out."""
        strides = np.ones_like(sizes)
        for dim in reversed(range(sizes.shape[1] - 1)):
            strides[:, dim] = strides[:, dim + 1] * sizes[:, dim + 1]
        columns = self.ranks[:, None], self.ends[:, None], starts[:, None], stops[:, None], offsets, sizes, strides
        rows = np.concatenate(columns, axis=1)[stops > starts]
        self.ends = self.ends + (stops - starts) * ITEMSIZE
        return PieceTable(sizes.shape[1], rows)

    def put_boxes(self, offsets: Rows, sizes: Rows) -> PieceTable:
        stops = sizes.prod(axis=1)
        return self.put(np.zeros_like(stops), stops, offsets, sizes)

    def put_ranges(self, starts: Rows, stops: Rows, shape: tuple[int, ...]) -> PieceTable:
        whole = np.tile(np.array(shape, dtype=np.int64), (len(starts), 1))
        return self.put(starts, stops, np.zeros_like(whole), whole)


def fsdp(writer: Writer, found: Shapes) -> dict[str, PieceTable]:
    """Rows in blocks of ceil(rows / ranks): the last ranks have fewer, or none."""
    tables = {}
    for name, shape in found.items():
        rows = -(-shape[0] // len(writer.ranks))
        begins, ends = (np.minimum((writer.ranks + more) * rows, shape[0]) for more in (0, 1))
        offsets, sizes = (np.zeros((len(writer.ranks), len(shape)), np.int64) for _ in range(2))
        sizes[:] = shape
        offsets[:, 0], sizes[:, 0] = begins, ends - begins
        tables[name] = writer.put_boxes(offsets, sizes)
    return tables


def tensor_parallel(writer: Writer, found: Shapes) -> dict[str, PieceTable]:
    """Eight ways of tensor parallelism, and FSDP2 of each slice over the others; norms by FSDP2 alone."""
    tp, dp = writer.ranks % TP, writer.ranks // TP
    replicas = len(writer.ranks) // TP
    tables = {}
    for name, shape in found.items():
        dim = None if len(shape) == 1 else 1 if "o_proj" in name or "down_proj" in name else 0
        local = [size // TP if dim == at else size for at, size in enumerate(shape)]
        rows = -(-local[0] // replicas)
        begins, ends = (np.minimum((dp + more) * rows, local[0]) for more in (0, 1))
        offsets, sizes = (np.zeros((len(writer.ranks), len(shape)), np.int64) for _ in range(2))
        sizes[:] = local
        offsets[:, 0], sizes[:, 0] = begins, ends - begins
        if dim is None:
            sizes[tp > 0] = 0  # a replica: the first has it
        else:
            offsets[:, dim] += tp * local[dim]
        tables[name] = writer.put_boxes(offsets, sizes)
    return tables


def replicated(writer: Writer, found: Shapes) -> dict[str, PieceTable]:
    """Every rank has everything, and saves its share of it."""
    shares = share(
        [Replicated(math.prod(shape), ITEMSIZE, divisible=True) for shape in found.values()], len(writer.ranks)
    )
    tables = {}
    for (name, shape), ranges in zip(found.items(), shares, strict=True):
        bounds = np.array(ranges, dtype=np.int64)
        tables[name] = writer.put_ranges(bounds[:, 0], bounds[:, 1], shape)
    return tables


def zero(writer: Writer, found: Shapes) -> dict[str, PieceTable]:
    """All parameters end to end, cut into equal parts, as ZeRO-1 and 2 have them."""
    total = sum(math.prod(shape) for shape in found.values())
    part = -(-total // len(writer.ranks))
    tables, begin = {}, 0
    for name, shape in found.items():
        numel = math.prod(shape)
        starts, stops = (np.clip((writer.ranks + more) * part - begin, 0, numel) for more in (0, 1))
        tables[name] = writer.put_ranges(starts, stops, shape)
        begin += numel
    return tables


def zero3(writer: Writer, found: Shapes) -> dict[str, PieceTable]:
    """Each parameter by itself, flat, cut into equal parts."""
    tables = {}
    for name, shape in found.items():
        numel = math.prod(shape)
        part = -(-numel // len(writer.ranks))
        starts, stops = (np.minimum((writer.ranks + more) * part, numel) for more in (0, 1))
        tables[name] = writer.put_ranges(starts, stops, shape)
    return tables


WAYS: dict[str, Callable[[Writer, Shapes], dict[str, PieceTable]]] = {
    "FSDP2": fsdp,
    f"TP {TP} x FSDP2": tensor_parallel,
    "DDP, shared": replicated,
    "ZeRO-1": zero,
    "ZeRO-3": zero3,
}


def index_of(way: str, ranks: int, tensors: int) -> Index:
    """The merged index of a snapshot of such a job; each rank also has a buffer of its own for every layer."""
    writer, found = Writer(ranks), shapes(tensors)
    index = Index(run_id="big", step=100, world_size=ranks)
    for number, (name, table) in enumerate(WAYS[way](writer, found).items()):
        header = Header(f"model.{name}", False, "parameter", "float32", found[name], "", "")
        index.entries[header] = Entry((0, number), False, table.folded())
    for layer in range(tensors // len(LAYER)):
        header = Header(f"model.layers.{layer}.seen", True, "buffer", "float32", (HIDDEN,), "", "")
        at = np.zeros((ranks, 1), np.int64)
        index.entries[header] = Entry((0, tensors + layer), False, writer.put_boxes(at, at + HIDDEN).folded())
    names = [header.name for header in index.entries if header.kind == "parameter"]
    others = [{"optimizer": "optimizer", "groups": [names]}]
    index.others = {json.dumps(others, separators=(",", ":")): tuple(range(ranks))}
    ends = (writer.ends + BEGINS).tolist()
    for rank, end in enumerate(ends):
        plan = digest(str(rank).encode())
        index.members[rank] = Member("a life of the job", plan, end + OBJECTS, BEGINS, end - BEGINS)
    return index


def part_of(index: Index, first: int, end: int) -> Index:
    """What ranks from `first` up to `end` would have made of their records."""
    part = Index(run_id=index.run_id, step=index.step, world_size=index.world_size)
    part.members = {rank: index.members[rank] for rank in range(first, end)}
    part.others = {text: tuple(range(first, end)) for text in index.others}
    for header, entry in index.entries.items():
        rows = entry.table.rows
        rows = rows[(rows[:, FILE] >= first) & (rows[:, FILE] < end)]
        if len(rows):
            part.entries[header] = Entry(entry.at, entry.host, PieceTable(entry.table.dims, rows).folded())
    return part


def record_bytes(index: Index, rank: int) -> int:
    """How long the record of a rank is, but for the digests of its blocks (35 bytes for 4 MiB)."""
    pieces = []
    for header, entry in index.entries.items():
        table = entry.table.of_file(rank)
        pieces += [
            {
                "key": header.name,
                "kind": header.kind,
                "dtype": header.dtype,
                "shape": header.shape,
                "offsets": one.piece.offsets,
                "sizes": one.piece.sizes,
                "start": one.piece.start,
                "stop": one.piece.stop,
                "offset": one.offset,
                "nbytes": one.piece.numel * ITEMSIZE,
                "own": header.own,
                "host": False,
            }
            for one in table.pieces(header.shape)
        ]
    return len(json.dumps(pieces, separators=(",", ":"))) + len(index.others_of(rank)) + 512


def catalog_of(way: str, ranks: int, tensors: int) -> Catalog:
    """The catalog of a snapshot of such a job."""
    return native_catalog(index_of(way, ranks, tensors))


def boxes_of_rank(found: Shapes, rank: int, tp: int, replicas: int) -> dict[str, tuple[list[int], list[int]]]:
    """What a rank of a target job needs: `tp` ways of tensor parallelism, FSDP2 of each slice over `replicas`."""
    boxes = {}
    for name, shape in found.items():
        dim = 1 if len(shape) > 1 and ("o_proj" in name or "down_proj" in name) else 0
        offsets, sizes = [0] * len(shape), list(shape)
        if len(shape) > 1:
            sizes[dim] //= tp
            offsets[dim] = rank % tp * sizes[dim]
        rows = -(-sizes[0] // replicas)
        begin = min(rank // tp * rows, sizes[0])
        offsets[0], sizes[0] = offsets[0] + begin, min(rows, sizes[0] - begin)
        boxes[name] = offsets, sizes
    return boxes
