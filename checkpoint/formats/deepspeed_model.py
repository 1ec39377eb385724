"""DeepSpeed's model states: parameters, frozen parameters and buffers of one model-parallel rank, and what is tied.

ZeRO-0 to 2 store the module's state dict once; a pipeline stores it in a file a layer; ZeRO-3 stores no parameters but
those that are frozen, and of these each rank its part. Source: DeepSpeed 0.19 `engine.py` (_common_checkpoint_state).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from resilient.checkpoint.catalog.assemble import Held
from resilient.checkpoint.catalog.catalog import Kind
from resilient.checkpoint.formats.deepspeed_names import Files
from resilient.checkpoint.formats.deepspeed_zero import Ranges, RankFile, Shapes, frozen_parts
from resilient.checkpoint.formats.stored import StoredTensor
from resilient.errors import DamagedImage

Read = Callable[[str], RankFile]
"""The tree of a file, by its name."""


@dataclass(slots=True, kw_only=True)
class ModelStates:
    """Of one model-parallel rank, which is `at` in the mesh. `tree`: of its (first) file.

    `groups`: the shapes of what the optimizer holds, in its order; None where nothing is said of it. `others`: what
    modules keep that is no tensor, with the number of its file.
    """

    at: Mapping[str, int]
    where: str
    tree: Mapping[str, Any]
    groups: list[Shapes] | None = None
    tensors: dict[str, Ranges] = field(default_factory=dict)
    kinds: dict[str, Kind] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    others: dict[str, tuple[int, Any]] = field(default_factory=dict)

    def put(self, name: str, kind: Kind, dtype: str, held: Held) -> None:
        self.kinds[name] = kind
        self.tensors.setdefault(name, Ranges(dtype)).held.append(held)


def read_model(read: Read, files: Files, mp: int, at: Mapping[str, int]) -> ModelStates:
    """Raises DamagedImage."""
    if files.model_3:
        return _partitioned([read(name) for (_, of), name in sorted(files.model_3.items()) if of == mp], at)
    rank = read(files.model[mp])
    states = ModelStates(at=at, where=rank.where, tree=rank.tree, groups=_shapes(rank))
    module = rank.tree.get("module")
    if isinstance(module, dict) and module:
        _take(states, rank, dict(module), _buffers(rank))
    _alias_of(states, rank.tree.get("shared_params"))
    return states


def read_layer(read: Read, states: ModelStates, name: str, layer: int) -> None:
    """Add what the file of a pipeline's layer has to the states of its stage."""
    rank = read(name)
    known = {full for shapes in states.groups or [] for full in shapes}
    named: dict[str, Any] = {}
    for short, value in rank.tree.items():
        full = f"{layer}.{short}"
        if known and full not in known:  # frozen, a buffer, or of a layer that several places share
            tied = [one for one in known if one.startswith("tied_modules.") and one.split(".", 2)[-1] == short]
            full = tied[0] if len(tied) == 1 else full
        if full not in states.tensors:
            named[full] = value
    _take(states, rank, named, _buffers_of_tree(states.tree))


def check_steps(trees: list[RankFile]) -> None:
    """Raises DamagedImage where model states are of different steps."""
    steps = {rank.where: rank.tree.get("global_steps") for rank in trees}
    if len(set(steps.values())) > 1:
        (first, one), (second, other) = _two_that_differ(steps)
        raise DamagedImage(f"{first} is of step {one}, {second} of step {other}: two checkpoints are mixed")


def _two_that_differ(values: Mapping[str, Any]) -> tuple[tuple[str, Any], tuple[str, Any]]:
    (where, value), *others = values.items()
    return (where, value), next((place, other) for place, other in others if other != value)


def _partitioned(ranks: list[RankFile], at: Mapping[str, int]) -> ModelStates:
    """ZeRO-3; the parameters themselves come from the optimizer's partitions."""
    check_steps(ranks)
    first = ranks[0]
    states = ModelStates(at=at, where=first.where, tree=first.tree, groups=_shapes(first))
    frozen = _as_shapes(first.tree.get("frozen_param_shapes") or {}, first.where)
    for index, rank in enumerate(ranks):
        fragments = rank.tree.get("frozen_param_fragments")
        if frozen and isinstance(fragments, dict) and fragments:
            for name, dtype, held in frozen_parts(fragments, frozen, rank, index, len(ranks), at):
                states.put(name, "parameter", dtype, held)
    module = first.tree.get("module")
    buffers = _buffers(first)
    if isinstance(module, dict):
        _take(states, first, {name: value for name, value in module.items() if name in buffers}, buffers)
    _alias_of(states, first.tree.get("shared_params"))
    return states


def _take(states: ModelStates, rank: RankFile, named: Mapping[str, Any], buffers: set[str]) -> None:
    seen: dict[Any, str] = {}
    for name, value in named.items():
        if not isinstance(value, StoredTensor):
            states.others[name] = (rank.file, value)
            continue
        key = (value.offset, value.shape, value.strides, value.dtype) if value.numel else name
        if key in seen:
            states.aliases[name] = seen[key]
            continue
        seen[key] = name
        strides = None if value.is_contiguous else value.strides
        held = Held(at=states.at, shape=value.shape, file=rank.file, offset=value.offset, strides=strides)
        states.put(name, "buffer" if name in buffers else "parameter", value.dtype, held)


def _alias_of(states: ModelStates, shared: Any) -> None:
    """`shared_params`: the second name of a tied parameter → the first."""
    for second, first in shared.items() if isinstance(shared, dict) else ():
        if isinstance(second, str) and isinstance(first, str):
            states.aliases[second] = first
            states.tensors.pop(second, None)
            states.kinds.pop(second, None)


def _buffers(rank: RankFile) -> set[str]:
    return _buffers_of_tree(rank.tree)


def _buffers_of_tree(tree: Mapping[str, Any]) -> set[str]:
    return {name for name in tree.get("buffer_names") or () if isinstance(name, str)}


def _shapes(rank: RankFile) -> list[Shapes] | None:
    groups = rank.tree.get("param_shapes")
    if groups is None:
        return None
    if isinstance(groups, dict):  # before there were groups
        groups = [groups]
    if not isinstance(groups, list):
        raise DamagedImage(f"{rank.where}: its 'param_shapes' are {type(groups).__name__}")
    return [_as_shapes(one, rank.where) for one in groups]


def _as_shapes(raw: Any, where: str) -> dict[str, tuple[int, ...]]:
    if not isinstance(raw, dict):
        raise DamagedImage(f"{where}: shapes of parameters are {type(raw).__name__}")
    found = {name: tuple(shape) for name, shape in raw.items()}
    for name, shape in found.items():
        if not isinstance(name, str) or not all(type(size) is int and 0 <= size < 1 << 48 for size in shape):
            raise DamagedImage(f"{where}: {name!r} has the shape {shape}")
    return found
