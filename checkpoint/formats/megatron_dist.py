"""An iteration of Megatron-LM's `torch_dist`: a checkpoint of torch DCP, and `common.pt` with all that is no tensor.

Its tensors are whole ones with the names of megatron-core. Layers of one kind are stacked there, along a first
dimension that is cut layer by layer: here each is a tensor of its own again, so that names are the same whatever the
layout (`decoder.layers.3.mlp.linear_fc1.weight`). The metadata also has the plans of all ranks, which are ignored.
"""

import re
from collections.abc import Iterator
from typing import Any

from resilient.checkpoint.catalog.catalog import Catalog, File, Kind, Tensor
from resilient.checkpoint.catalog.table import BOX, PieceTable, Rows
from resilient.checkpoint.formats.dcp_blobs import Blobs
from resilient.checkpoint.formats.dcp_metadata import Metadata, StoredBytes, TensorEntry, read_metadata
from resilient.checkpoint.formats.dcp_source import check_files
from resilient.checkpoint.formats.folder import Folder
from resilient.checkpoint.formats.source import Finding, Progress, Reference, Source
from resilient.checkpoint.formats.state_catalog import loaded
from resilient.checkpoint.formats.torch_values import (
    OneFile,
    is_stored,
    pieces_of,
    read_tree,
    read_value,
    stored_leaves,
)
from resilient.checkpoint.formats.torch_zip import open_archive
from resilient.checkpoint.formats.values import is_floating
from resilient.errors import DamagedImage

__all__ = ["MegatronDist"]

_COMMON = "common.pt"
_STATE = re.compile(r"(?:chained_(\d+)\.)?optimizer\.state\.(\w+)\.(.+)")
_OPTIMIZER = re.compile(r"(?:chained_\d+\.)?optimizer\.")
_LAYERS = re.compile(r"(?:.*\.)?layers(?=\.\D)")
_PLANS = ("planner.SavePlan", "planner.WriteItem", "planner.TensorWriteData", "planner.WriteItemType")
_MASTER = "fp32_param"
_STEP = "common_step"


class MegatronDist(Source):
    """See the module."""

    def __init__(self, reference: Reference, folder: Folder) -> None:
        super().__init__(reference, folder, Catalog(format="megatron"))
        self.metadata: Metadata = read_metadata(folder, extra=_ignored())
        check_files(folder, self.metadata)
        self.blobs = Blobs(folder)
        self.common: dict[str, Any] = {}
        self._keys: dict[str, str] = {}
        if folder.has(_COMMON):
            self.common = read_tree(open_archive(folder, _COMMON), trust=reference.trust_pickle)
            if not isinstance(self.common, dict):
                raise DamagedImage(f"{folder.where(_COMMON)} has no items")
        step = self.common.get("iteration")
        self.catalog.step = step if type(step) is int else None
        self._optimizers = _optimizers(self.common.get("optimizer"))
        for entry in self.metadata.entries.values():
            if isinstance(entry, TensorEntry):
                for tensor in _tensors(entry, self.blobs.pieces(entry)):
                    self.catalog.add(tensor)
                    self._keys[tensor.name] = entry.key
        self.catalog.files = [File(file.name, folder.size(file.name)) for file in self.blobs.files]
        self._groups()
        self._steps()
        if any(tensor.kind == "tensor" for tensor in self.catalog.tensors.values()):
            self.catalog.notes.append(
                "state of the optimizer that is not kept by parameter (--dist-ckpt-optim-fully-reshardable does) is "
                "there as it is, without its parameters"
            )

    def read(self, file: int, offset: int, into: memoryview) -> None:
        if file < len(self.blobs.files):
            self.blobs.read(file, offset, into)
        else:
            self.folder.read(_COMMON, offset, into)

    def objects(self, rank: int = 0) -> dict[str, Any]:
        """What `common.pt` has, and objects of the ranks by their keys: random generators, states of modules."""
        common = {key: value for key, value in self.common.items() if key != "optimizer"}
        made: dict[str, Any] = loaded(common, stored_leaves(OneFile(self.folder, _COMMON))) if common else {}
        for key, entry in self.metadata.entries.items():
            if isinstance(entry, StoredBytes):
                blob = entry.blob
                value = read_value(
                    self.folder, blob.name, begin=blob.offset, nbytes=blob.nbytes, trust=self.reference.trust_pickle
                )
                if not _is_nothing(value):
                    made[key] = value
        return made

    def verify(self, progress: Progress) -> Iterator[Finding]:
        """Compares each blob with the checksum in it."""
        yield from self.blobs.verify(self.catalog, progress)

    def _groups(self) -> None:
        """Hyperparameters; which parameters are in which group is not in the checkpoint, but follows from a rule."""
        groups = [group for one in self._optimizers for group in one.get("param_groups", [])]
        if groups and all(isinstance(group, dict) for group in groups):
            values = loaded(groups, stored_leaves(OneFile(self.folder, _COMMON)))
            parameters = [tensor for tensor in self.catalog.tensors.values() if tensor.kind == "parameter"]
            self.catalog.groups["optimizer"] = [
                {**group, "params": [one.name for one in parameters if _belongs(one, group, len(groups))]}
                for group in values
            ]

    def _steps(self) -> None:
        """All parameters of an optimizer share one step, in `common.pt`: each gets it as its own."""
        number = len(self.catalog.files)
        steps = [one.get("state", {}).get(_STEP) for one in self._optimizers]
        for tensor in list(self.catalog.tensors.values()):
            match = _STATE.fullmatch(self._keys.get(tensor.name, ""))
            chain = int(match[1] or 0) if match else len(steps)
            step = steps[chain] if chain < len(steps) else None
            name = f"optimizer.state.{tensor.parameter}.step"
            if step is None or not is_stored(step) or name in self.catalog.tensors:
                continue
            self.catalog.add(
                Tensor(
                    name=name,
                    kind="optimizer",
                    dtype=step.dtype,
                    shape=step.shape,
                    pieces=pieces_of(step, number),
                    item="optimizer",
                    parameter=tensor.parameter,
                    state="step",
                )
            )
        if any(step is not None for step in steps):
            self.catalog.files.append(File(_COMMON, self.folder.size(_COMMON)))


def _is_nothing(value: Any) -> bool:
    """What most modules have as their extra state."""
    return value is None or (isinstance(value, list) and all(one is None for one in value))


def _optimizers(raw: Any) -> list[dict[str, Any]]:
    """The optimizers' own parts of `common.pt`: one, or of a chain each."""
    if not isinstance(raw, dict):
        return []
    if raw and all(type(key) is int for key in raw):
        return [one for _, value in sorted(raw.items()) for one in _optimizers(value)[:1]]
    inner = raw.get("optimizer", raw)
    return [inner] if isinstance(inner, dict) and isinstance(inner.get("state", {}), dict) else []


def _belongs(parameter: Tensor, group: dict[str, Any], groups: int) -> bool:
    """By the rule of megatron-core: without weight decay are biases and what has one dimension."""
    bare = parameter.name.endswith(".bias") or len(parameter.shape) == 1
    expert = ".experts." in parameter.name and ".shared_experts." not in parameter.name
    told = bool(group.get("is_expert_parallel", group.get("is_expert", False)))
    return groups == 1 or (bare == (group.get("wd_mult") == 0.0) and expert == told)


def _tensors(entry: TensorEntry, pieces: PieceTable) -> Iterator[Tensor]:
    """The tensor of an entry, or, of a stack of layers, each layer's."""
    match = _STATE.fullmatch(entry.key)
    parameter, state = (match[3], match[2]) if match else (entry.key, "")
    stack = _LAYERS.match(parameter)
    rows = pieces.rows
    if stack is None or not entry.shape or not _is_cut_by_layer(rows, pieces.dims):
        yield _tensor(entry, parameter, state, entry.shape, pieces)
        return
    for layer in range(entry.shape[0]):
        name = f"{stack[0]}.{layer}{parameter[stack.end() :]}"
        mine = rows[rows[:, BOX] == layer]
        yield _tensor(
            entry, name, state, entry.shape[1:], PieceTable(pieces.dims - 1, _without_first(mine, pieces.dims))
        )


def _is_cut_by_layer(rows: Rows, dims: int) -> bool:
    return bool((rows[:, BOX + dims] == 1).all())


def _without_first(rows: Rows, dims: int) -> Rows:
    """The same pieces without their first dimension, along which they have one element."""
    kept = [column for column in range(rows.shape[1]) if column not in (BOX, BOX + dims, BOX + 2 * dims)]
    return rows[:, kept]


def _tensor(entry: TensorEntry, name: str, state: str, shape: tuple[int, ...], pieces: PieceTable) -> Tensor:
    own = _OPTIMIZER.match(entry.key) is not None
    kind: Kind = "optimizer" if state else "tensor" if own else "parameter" if is_floating(entry.dtype) else "buffer"
    state = "fp32" if state == _MASTER else state
    full = f"optimizer.state.model.{name}.{state}" if state else name if own else f"model.{name}"
    return Tensor(
        name=full,
        kind=kind,
        dtype=entry.dtype,
        shape=shape,
        pieces=pieces,
        item="optimizer" if own else "model",
        parameter=f"model.{name}" if state else "",
        state=state,
    )


class _Ignored:
    """Stands for a class whose objects nobody looks at."""

    def __init__(self, *args: Any) -> None:
        pass


def _ignored() -> dict[str, Any]:
    """The plans of Megatron's ranks, which it keeps in the metadata for its next save."""
    return {f"torch.distributed.checkpoint.{name}": type("Ignored", (_Ignored,), {}) for name in _PLANS}
