"""What a job needs of a snapshot that another job has made, of other ranks or another mesh: catalog ∩ layout.

The layout is the live state itself: of each tensor the box that this rank holds. Pure; `reshape.py` does the reading.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import prod

import numpy as np
from torch import Tensor

from resilient.checkpoint.catalog.catalog import Catalog as Described
from resilient.checkpoint.catalog.catalog import Kind
from resilient.checkpoint.catalog.catalog import Tensor as DescribedTensor
from resilient.checkpoint.catalog.index import Index
from resilient.checkpoint.catalog.meet import boxes_of_range
from resilient.checkpoint.catalog.native import native_catalog
from resilient.checkpoint.catalog.table import Rows
from resilient.checkpoint.dtypes import torch_dtype
from resilient.checkpoint.leaves import Leaf, Leaves
from resilient.checkpoint.pieces import Piece
from resilient.checkpoint.restore.boxes import Filling, filling_of
from resilient.checkpoint.restore.images import Stored
from resilient.checkpoint.restore.load import Catalog
from resilient.errors import LayoutMismatch

_MODEL: tuple[Kind, ...] = ("parameter", "buffer", "tensor")


class Reshaped(Catalog):
    """The pieces of all images of a job of `world_size` ranks, for one rank of a job that is cut otherwise.

    What every rank has for itself (buffers under DDP, single tensors) goes to rank r from rank r modulo that size.
    """

    def __init__(self, index: Index, rank: int) -> None:
        """`index`: of all images. Raises DamagedImage."""
        super().__init__([], rank)
        self.world_size = index.world_size
        self.described: Described = native_catalog(index)
        self._mine = rank % self.world_size
        self._replicated: set[str] = set()
        self._begins = np.array([file.begins for file in self.described.files], dtype=np.int64)
        self._hosts: dict[str, bool] = {}
        for header, entry in index.entries.items():
            self._hosts[header.name] = self._hosts.get(header.name, False) or entry.host

    def missing(self, found: Leaves) -> list[str]:
        """What was saved of models and has no place in this rank's state; another rank may have it."""
        known = found.by_key()
        names = [tensor.name for tensor in self.described.of_kind(*_MODEL)]
        return [name for name in names if name not in known and name not in found.aliases]

    def doubtful(self) -> dict[str, Mapping[int, DescribedTensor]]:
        """Parameters and their state of which each rank has one of its own: by name, and rank."""
        if self.world_size == 1:
            return {}
        own = self.described.own
        return {name: ranks for name, ranks in own.items() if ranks[min(ranks)].kind in ("parameter", "optimizer")}

    def replicated(self, names: Iterable[str]) -> None:
        """Of these all ranks have the same. Each takes them from where it takes its own: not all from the first."""
        self._replicated.update(names)

    def needed_keys(self) -> list[str]:
        """None of a rank alone: see `missing`."""
        return []

    def of_optimizer(self, item: str) -> dict[str, dict[str, list[Stored]]]:
        found: dict[str, dict[str, list[Stored]]] = {}
        for tensor in self.described.of_kind("optimizer"):
            if tensor.item == item:
                found.setdefault(tensor.parameter, {})[tensor.state] = [self._stored(tensor)]
        return found

    def find(self, leaf: Leaf) -> list[Stored]:
        name = self.described.aliases.get(leaf.key, leaf.key)
        tensor = self.described.tensors.get(name)
        return [] if tensor is None else [self._stored(tensor)]

    def shared_with(self, group: tuple[int, ...], pieces: list[Stored]) -> list[Stored]:
        return pieces

    def ranges(self, key: str, local: Tensor, box: Piece, pieces: list[Stored]) -> Sequence[Filling]:
        if not pieces:
            raise LayoutMismatch(f"the snapshot has no tensor {key!r}: was it made by another model?")
        tensor = self._variant(self.described.tensors[pieces[0].key])
        if torch_dtype(tensor.dtype) != local.dtype or tensor.shape != box.shape:
            raise LayoutMismatch(
                f"tensor {key!r} is {tensor.dtype} {tensor.shape} in the snapshot and "
                f"{local.dtype} {box.shape} in this job"
            )
        if box.is_box:
            return [filling_of(tensor, local, (box.offsets, box.sizes), self._begins)]
        return list(_flat_ranges(tensor, local, box, self._begins))

    def _variant(self, tensor: DescribedTensor) -> DescribedTensor:
        """Of a tensor that ranks have for themselves the one that this rank is to have."""
        own = self.described.own.get(tensor.name)
        if own is None or self.world_size == 1:
            return tensor
        if tensor.kind in ("parameter", "optimizer") and tensor.name not in self._replicated:
            raise LayoutMismatch(
                f"tensor {tensor.name!r}: {len(own)} ranks of the job that made the snapshot have different ones "
                "under that name, and nothing says how they belong together: restore with as many ranks"
            )
        return own.get(self._mine, tensor)

    def _stored(self, tensor: DescribedTensor) -> Stored:
        """The tensor as if it were one piece: `ranges` finds the real ones."""
        parameter = self.described.tensors.get(tensor.parameter)
        return Stored(
            key=tensor.name,
            kind=tensor.kind,
            dtype=torch_dtype(tensor.dtype),
            piece=Piece.whole(tensor.shape),
            image_rank=0,
            offset=0,
            nbytes=tensor.nbytes,
            own=False,
            host=self._hosts[tensor.name],
            parameter=tensor.parameter,
            name=tensor.state,
            # What has the parameter's shape is cut as the parameter is; a counter is not cut.
            mesh=parameter is not None and bool(tensor.shape) and parameter.shape == tensor.shape,
        )


def _flat_ranges(tensor: DescribedTensor, local: Tensor, piece: Piece, begins: Rows) -> Iterator[Filling]:
    """What fills a range of a box, which `local` holds in row-major order."""
    at = 0
    for offsets, sizes in boxes_of_range(piece.start, piece.stop, piece.sizes):
        numel = prod(sizes)
        place = tuple(a + b for a, b in zip(piece.offsets, offsets, strict=True))
        yield filling_of(tensor, local[at : at + numel].view(sizes), (place, sizes), begins)
        at += numel


def objects_rank(index: Index, found: Leaves, rank: int) -> int:
    """Whose objects a rank takes: of the job's rank whose optimizers had most of its parameters, so that their groups
    fit; where several had as many, rank modulo their number is preferred, for what each rank has for itself."""
    mine = {name for groups in found.groups.values() for names in groups for name in names}
    preferred = rank % index.world_size

    def fit(text: str) -> tuple[int, bool, int]:
        theirs = {name for raw in json.loads(text) if "groups" in raw for names in raw["groups"] for name in names}
        ranks = index.others[text]
        return len(mine & theirs), preferred in ranks, -ranks[0]

    best = index.others[max(index.others, key=fit)]
    return preferred if preferred in best else best[0]
