"""How slices of DeepSpeed's tensor-parallel ranks make up parameters: by specification, or as the job left it.

`universal_checkpoint_info`, which Megatron-DeepSpeed and AutoTP write, has lists of patterns; they are used in the
order and with the meaning that DeepSpeed's `ds_to_universal.py` (merge_tp_slices) gives them.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from resilient.checkpoint.catalog.assemble import Held, Region, assemble, regions_of
from resilient.checkpoint.catalog.spec import Cut, Padded, Shard, Spec, SubParameters
from resilient.checkpoint.catalog.table import BOX, FILE, OFFSET, START, STOP, PieceTable, row_major
from resilient.checkpoint.formats.stored import Opaque
from resilient.errors import DamagedImage, LayoutMismatch, UsageError

TP = "tp"


class Cuts:
    """The cut of each parameter, by name."""

    def __init__(self, spec: Spec | None, info: Mapping[str, Any] | None, ways: int, where: str) -> None:
        """`ways`: the number of tensor-parallel ranks. Raises UsageError where nothing says how they cut."""
        self._spec, self._ways, self._where = spec, ways, where
        self._info = info or {}
        if ways > 1 and spec is None and info is None:
            raise UsageError(
                f"{where} has slices of {ways} tensor-parallel ranks, and nothing in it says how they make up the "
                "parameters: name a specification (--spec), for instance one of the presets"
            )
        if ways > 1 and spec is not None and TP not in spec.axes:
            raise UsageError(f"{spec.where}: the mesh has no axis {TP!r}, over which {where} is cut in {ways} slices")

    def of(self, name: str, shape: Sequence[int]) -> Cut:
        """`shape`: of a slice. Raises LayoutMismatch, UsageError."""
        if self._ways == 1:
            return Cut(text=name)
        if self._spec is not None:
            return self._spec.cut_of(name)
        cut = self.told(name, len(shape))
        self._check_map(name, cut, tuple(shape))
        return cut

    def told(self, name: str, dims: int) -> Cut:
        """What the job's own patterns say. Raises LayoutMismatch where they say that they cannot."""
        if self._matches("autotp_unsupported_parameter_patterns", name):
            raise LayoutMismatch(f"{self._where}: the job itself could not say how {name} is cut; name a specification")
        if self._matches("tp_replicated_parameter_patterns", name):
            return Cut(text=name)
        if self._matches("parameter_to_average_patterns", name):
            return Cut(how="averaged", averaged=(TP,), text=name)
        for one in self._info.get("parameter_with_sub_params") or ():
            cut = self._with_sub_parameters(one, name)
            if cut is not None:
                return cut
        if self._matches("parameter_with_2_sub_params_cat_dim_0", name):
            return self._sharded(name, 0, SubParameters(0, (1, 1)))
        if self._matches("vocabulary_parameter_patterns", name):
            size = self._info.get("original_vocab_size")
            padded = Padded(0, size) if type(size) is int and size > 0 else None
            return Cut(how="sharded", shards=(Shard(0, TP),), padded=padded, text=name)
        row = self._matches("parameter_with_row_parallelism_patterns", name)
        if row and dims < 2:
            return Cut(text=name)
        return self._sharded(name, 1 if row else 0, None)

    def _check_map(self, name: str, cut: Cut, shape: tuple[int, ...]) -> None:
        """Where the job has also left the pieces of every rank (`affine_map`), the cut has to say the same."""
        told = self._info.get("affine_map")
        params = told.get("params") if isinstance(told, Mapping) else None
        for pattern, one in params.items() if isinstance(params, Mapping) else ():
            if not self._match(pattern, name):
                continue
            try:
                ranks = {int(rank): _regions(of["pieces"], tuple(one["logical_shape"]), tuple(of["shard_shape"]))
                         for rank, of in one["ranks"].items()}  # fmt: skip
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise DamagedImage(f"{self._where}: the affine_map of {name} cannot be read ({error!r})") from error
            for rank, found in ranks.items():
                whole, regions = regions_of(name, cut, shape, {TP: rank}, {TP: self._ways})
                if found is None or set(regions) != found or whole != tuple(one["logical_shape"]):
                    raise LayoutMismatch(
                        f"{self._where}: {name} is cut in a way that is not read yet; name a specification, or convert "
                        "the checkpoint with DeepSpeed's ds_to_universal and open that"
                    )

    def _sharded(self, name: str, dim: int, fused: SubParameters | None) -> Cut:
        return Cut(how="sharded", shards=(Shard(dim, TP),), sub_parameters=fused, text=name)

    def _matches(self, key: str, name: str) -> bool:
        patterns = self._info.get(key) or ()
        return any(self._match(pattern, name) for pattern in patterns)

    def _match(self, pattern: Any, name: str) -> bool:
        if not isinstance(pattern, str) or len(pattern) > 500:
            raise DamagedImage(f"{self._where}: universal_checkpoint_info has the pattern {pattern!r:.80}")
        try:
            return re.match(pattern, name) is not None
        except re.error as error:
            raise DamagedImage(f"{self._where}: universal_checkpoint_info: {pattern!r}: {error}") from error

    def _with_sub_parameters(self, raw: Any, name: str) -> Cut | None:
        told = raw.state if isinstance(raw, Opaque) else raw
        if not isinstance(told, Mapping):
            raise DamagedImage(f"{self._where}: parameter_with_sub_params has {told!r:.80}")
        if not any(self._match(pattern, name) for pattern in told.get("patterns") or ()):
            return None
        shape, dim = told.get("shape"), told.get("partition_dim")
        if type(dim) is not int or not isinstance(shape, list | tuple) or not 0 <= dim < len(shape):
            raise DamagedImage(f"{self._where}: the sub-parameters of {name} are {shape!r}, cut along {dim!r}")
        parts = shape[dim]
        if type(parts) is int and 1 < parts <= 1 << 16:
            widths: tuple[int, ...] = (1,) * parts
        elif isinstance(parts, list | tuple) and len(parts) > 1 and all(type(one) is int and one > 0 for one in parts):
            widths = tuple(parts)
        else:
            return self._sharded(name, dim, None)
        for width in widths:
            if max(widths) > 1 and width % self._ways:
                raise LayoutMismatch(
                    f"{self._where}: sub-parameters of {name} of widths {list(widths)} are cut unevenly over "
                    f"{self._ways} ranks, which is not read yet"
                )
        return self._sharded(name, dim, SubParameters(dim, widths))


def _regions(pieces: Any, whole: tuple[int, ...], shard: tuple[int, ...]) -> set[Region] | None:
    """The pieces of an `affine_map` as regions; None for those that are scaled or turned."""
    found = set()
    for piece in pieces:
        sizes = tuple(piece["shape"])
        (source, source_strides), (dest, dest_strides) = piece["source"], piece["dest"]
        straight = tuple(source_strides) == row_major(whole) and tuple(dest_strides) == row_major(shard)
        if not straight or piece.get("scale", 1) != 1:
            return None
        found.add(Region(_place(dest, shard), _place(source, whole), sizes))
    return found


def _place(offset: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Element number `offset`, row-major, by dimension."""
    found = []
    for stride in row_major(shape):
        found.append(offset // stride)
        offset %= stride
    return tuple(found)


def joined(name: str, cut: Cut, held: Sequence[Held], itemsize: int) -> tuple[tuple[int, ...], PieceTable]:
    """The global shape and the pieces. What is not cut, as with ZeRO alone, has as many ranges as ranks, in a row.

    Raises LayoutMismatch.
    """
    table = None if cut.shards or cut.how != "replicated" or cut.padded is not None else _in_a_row(held)
    if table is not None:
        return held[0].shape, table
    shape, pieces = assemble(name, cut, held, itemsize)
    return shape, PieceTable.of(pieces) if pieces else PieceTable.from_json(len(shape), [])


def _in_a_row(held: Sequence[Held]) -> PieceTable | None:
    """Ranges that follow upon one another from the first element to the last; None where they do not."""
    shape, numel = held[0].shape, math.prod(held[0].shape)
    ranges = sorted({(one.start, one.end, one.file, one.offset) for one in held if one.start < one.end})
    if ranges and ranges[0][:2] == (0, numel):
        ranges = ranges[:1]  # of several that have all of it, one
    ends = [0, *(stop for _, stop, _, _ in ranges)]
    if any(one.strides is not None or one.shape != shape for one in held) or ends[-1] != numel:
        return None
    if any(start != end for (start, *_), end in zip(ranges, ends, strict=False)):
        return None
    box = (*(0,) * len(shape), *shape, *row_major(shape))
    rows = np.empty((len(ranges), BOX + len(box)), dtype=np.int64)
    rows[:, [START, STOP, FILE, OFFSET]] = np.array(ranges, dtype=np.int64).reshape(-1, 4)
    rows[:, BOX:] = box
    return PieceTable(len(shape), rows)


def universal_info(trees: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """What the job has left of how it cuts, in the model or the optimizer states."""
    for tree in trees:
        found = tree.get("universal_checkpoint_info")
        if isinstance(found, Mapping):
            return found
    return None
