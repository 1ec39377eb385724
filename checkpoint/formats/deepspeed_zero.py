"""What ZeRO's flat partitions hold of each parameter: ranges of it, in files, for its master and its optimizer state.

ZeRO-1 and 2 lay the parameters of a group end to end and cut that into equal partitions, one a rank, padded at the end;
`param_slice_mappings` say where in a rank's partition a parameter's fragment lies. ZeRO-3 cuts each parameter by itself
into parts of ceil(numel / ranks), the last ones padded, and lays a rank's parts of a sub-group end to end. Sources:
DeepSpeed 0.19 `runtime/zero/stage_1_and_2.py` (state_dict), `stage3.py` (_rigid_state_dict), `ds_to_universal.py`
(extract_zero_shards). Pure: trees in, ranges out.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from resilient.checkpoint.catalog.assemble import Held
from resilient.checkpoint.catalog.catalog import ITEMSIZES
from resilient.checkpoint.formats.stored import Opaque, StoredTensor
from resilient.errors import DamagedImage, NotACheckpoint

MASTER = "fp32"
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class RankFile:
    """A file's tree. `file`: its number in the catalog; `where`: its place, for messages."""

    file: int
    where: str
    tree: Mapping[str, Any]


@dataclass(slots=True)
class Ranges:
    """Ranges of one tensor on the ranks that have some of it; of a single number, every rank's."""

    dtype: str
    held: list[Held] = field(default_factory=list)


@dataclass(slots=True)
class Partitions:
    """Of one model-parallel rank. `states`: by parameter and key ("fp32": the master). `numbers`: state that is a plain
    number, by parameter. `groups`: hyperparameters, with the names of the parameters."""

    at: Mapping[str, int]
    states: dict[tuple[str, str], Ranges] = field(default_factory=dict)
    numbers: dict[str, dict[str, Any]] = field(default_factory=dict)
    groups: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, name: str, state: str, dtype: str, held: Held, where: str) -> None:
        known = self.states.setdefault((name, state), Ranges(dtype))
        if known.dtype != dtype:
            raise DamagedImage(f"{where}: {state} of {name} is {dtype}, on another rank {known.dtype}")
        known.held.append(held)


@dataclass(frozen=True, slots=True)
class Fragment:
    """`numel` elements of a parameter from its element `begin` on lie at element `start` of a flat partition."""

    name: str
    begin: int
    start: int
    numel: int


def zero_1_or_2(ranks: Sequence[RankFile], groups: Sequence[Shapes], at: Mapping[str, int]) -> Partitions:
    """`ranks`: the optimizer states, by data-parallel rank. `groups`: the shapes of each group's parameters.

    Raises DamagedImage where they contradict one another.
    """
    found = Partitions(at)
    first = _of(ranks[0], "base_optimizer_state", dict)
    saved_groups = _of_dict(first, "param_groups", list, ranks[0].where)
    _check_number(ranks[0].where, "groups of parameters", len(saved_groups), len(groups))
    found.groups = [_group(values, shapes) for values, shapes in zip(saved_groups, groups, strict=True)]
    for number, shapes in enumerate(groups):
        done = dict.fromkeys(shapes, 0)
        for rank in ranks:
            master, state = _partition(rank, number, len(groups))
            for fragment in _fragments(ranks, rank, number, shapes, done):
                _add(found, fragment, {MASTER: master, **state}, rank, shapes)
        _check_whole(ranks[0].where, shapes, done)
    return found


def zero_3(ranks: Sequence[RankFile], sub_groups: Sequence[Shapes], at: Mapping[str, int]) -> Partitions:
    """As `zero_1_or_2`; `sub_groups`: the shapes of each sub-group's parameters."""
    found = Partitions(at)
    groups = _of_dict(_of(ranks[0], "optimizer_state_dict", dict), "param_groups", list, ranks[0].where)
    ids = [number for group in groups for number in group["params"]]
    if ids != list(range(len(sub_groups))):
        raise DamagedImage(f"{ranks[0].where}: its groups have the sub-groups {ids}, of {len(sub_groups)}")
    found.groups = [
        _group(group, [name for number in group["params"] for name in sub_groups[number]]) for group in groups
    ]
    for index, rank in enumerate(ranks):
        if rank.tree.get("ds_zero_partition_groups"):
            raise NotACheckpoint(f"{rank.where}: parameters that are partitioned over groups of ranks are not read yet")
        masters = _of(rank, "fp32_flat_groups", list)
        states = _of_dict(_of(rank, "optimizer_state_dict", dict), "state", dict, rank.where)
        _check_number(rank.where, "flat sub-groups", len(masters), len(sub_groups))
        for number, shapes in enumerate(sub_groups):
            tensors = {MASTER: _flat(masters[number], rank.where), **states.get(number, {})}
            for fragment in parts_of_rank(shapes, index, len(ranks)):
                _add(found, fragment, tensors, rank, shapes)
    return found


def parts_of_rank(shapes: Shapes, rank: int, world: int) -> Iterator[Fragment]:
    """What ZeRO-3 gives one rank of parameters that lie end to end; a padded part counts with its padding."""
    start = 0
    for name, shape in shapes.items():
        numel = math.prod(shape)
        part = -(-numel // world)
        begin = min(rank * part, numel)
        yield Fragment(name, begin, start, min(numel - begin, part))
        start += part


def frozen_parts(
    fragments: Mapping[str, Any], shapes: Shapes, rank: RankFile, index: int, world: int, at: Mapping[str, int]
) -> Iterator[tuple[str, str, Held]]:
    """Name, dtype and range of what a rank of ZeRO-3 has of the frozen parameters."""
    for name, shape in shapes.items():
        stored = _flat(fragments.get(name), rank.where)
        numel = math.prod(shape)
        part = -(-numel // world)
        begin = min(index * part, numel)
        count = min(numel - begin, part)
        _check_reach(stored, 0, count, name, rank.where)
        if count:
            yield name, stored.dtype, _held(Fragment(name, begin, 0, count), stored, rank.file, shape, at)


def plain(value: Any) -> Any:
    """A number of a pickled enumeration or dataclass: `Opaque` → what it stands for."""
    if isinstance(value, Opaque):
        return value.args[0] if value.args and value.state is None else value.state
    return value


def _partition(rank: RankFile, number: int, groups: int) -> tuple[StoredTensor, dict[str, Any]]:
    """The flat master and the optimizer state of a group."""
    masters = _of(rank, "single_partition_of_fp32_groups", list)
    _check_number(rank.where, "flat partitions", len(masters), groups)
    base = rank.tree.get("base_optimizer_state")
    if not isinstance(base, dict):
        raise NotACheckpoint(f"{rank.where}: it was written with `elastic_checkpoint`, which is not read")
    saved = _of_dict(base, "param_groups", list, rank.where)
    _check_number(rank.where, "groups of parameters", len(saved), groups)
    states = _of_dict(base, "state", dict, rank.where)
    ids = saved[number]["params"]
    return _flat(masters[number], rank.where), dict(states.get(ids[0], {})) if ids else {}


def _fragments(
    ranks: Sequence[RankFile], rank: RankFile, number: int, shapes: Shapes, done: dict[str, int]
) -> Iterator[Fragment]:
    """What a rank has of a group. Before it the other ranks have `done` elements of each parameter; it is updated."""
    mappings = rank.tree.get("param_slice_mappings")
    if mappings is None:
        found: Iterable[tuple[str, int, int]] = _without_mappings(ranks, rank, number, shapes)
    else:
        _check_number(
            rank.where, "slice mappings", len(mappings), len(_of(rank, "single_partition_of_fp32_groups", list))
        )
        found = ((name, *_address(one, name, rank.where)) for name, one in mappings[number].items())
    for name, start, numel in found:
        if name not in shapes:
            raise DamagedImage(f"{rank.where}: {name} is in no group of the model's parameters")
        yield Fragment(name, done[name], start, numel)
        done[name] += numel


def _without_mappings(
    ranks: Sequence[RankFile], rank: RankFile, number: int, shapes: Shapes
) -> Iterator[tuple[str, int, int]]:
    """Name, start and numel in this rank's partition, as DeepSpeed before 0.7 leaves to be found by counting."""
    lengths = [_flat(_of(one, "single_partition_of_fp32_groups", list)[number], one.where).numel for one in ranks]
    begin = sum(lengths[: next(index for index, one in enumerate(ranks) if one is rank)])
    end = begin + lengths[next(index for index, one in enumerate(ranks) if one is rank)]
    at = 0
    for name, shape in shapes.items():
        low, high = max(begin, at), min(end, at + math.prod(shape))
        if low < high:
            yield name, low - begin, high - low
        at += math.prod(shape)


def _add(found: Partitions, fragment: Fragment, tensors: Mapping[str, Any], rank: RankFile, shapes: Shapes) -> None:
    shape = shapes[fragment.name]
    for key, value in tensors.items():
        if not isinstance(value, StoredTensor):
            if isinstance(value, int | float):
                found.numbers.setdefault(fragment.name, {})[key] = value
            continue
        if not value.shape or (value.numel == 1 and tensors[MASTER].numel > 1):
            number = Held(at=found.at, shape=(), file=rank.file, offset=value.offset)
            found.add(fragment.name, key, value.dtype, number, rank.where)
            continue
        if not fragment.numel:
            continue
        stored = _flat(value, rank.where)
        _check_reach(stored, fragment.start, fragment.numel, f"{key} of {fragment.name}", rank.where)
        found.add(fragment.name, key, stored.dtype, _held(fragment, stored, rank.file, shape, found.at), rank.where)


def _held(fragment: Fragment, stored: StoredTensor, file: int, shape: tuple[int, ...], at: Mapping[str, int]) -> Held:
    return Held(
        at=at,
        shape=shape,
        file=file,
        offset=stored.offset + fragment.start * ITEMSIZES[stored.dtype],
        start=fragment.begin,
        stop=fragment.begin + fragment.numel,
    )


def _group(values: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    return {**{key: value for key, value in values.items() if key != "params"}, "params": list(names)}


def _address(one: Any, name: str, where: str) -> tuple[int, int]:
    """(start, numel) of a pickled `fragment_address`."""
    state = one.state if isinstance(one, Opaque) else None
    numbers = (state.get("start"), state.get("numel")) if isinstance(state, dict) else (None, None)
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise DamagedImage(f"{where}: the address of {name} in its partition is {state!r}")
    start, numel = numbers
    assert start is not None
    assert numel is not None
    return start, numel


def _flat(value: Any, where: str) -> StoredTensor:
    if not isinstance(value, StoredTensor) or len(value.shape) != 1 or not value.is_contiguous:
        raise DamagedImage(f"{where}: a flat partition was expected, and there is {value!r:.80}")
    return value


def _of(rank: RankFile, key: str, kind: type) -> Any:
    return _of_dict(rank.tree, key, kind, rank.where)


def _of_dict(tree: Mapping[str, Any], key: str, kind: type, where: str) -> Any:
    value = tree.get(key)
    if not isinstance(value, kind):
        raise DamagedImage(f"{where}: its {key!r} is no {kind.__name__} but {type(value).__name__}")
    return value


def _check_reach(stored: StoredTensor, start: int, numel: int, what: str, where: str) -> None:
    if start + numel > stored.numel:
        raise DamagedImage(
            f"{where}: {what} should have elements {start} to {start + numel} of a partition of {stored.numel}"
        )


def _check_number(where: str, what: str, have: int, expected: int) -> None:
    if have != expected:
        raise DamagedImage(f"{where} has {have} {what}; the model states speak of {expected}")


def _check_whole(where: str, shapes: Shapes, done: Mapping[str, int]) -> None:
    for name, shape in shapes.items():
        if done[name] != math.prod(shape):
            raise DamagedImage(
                f"{where} and its fellows have {done[name]} of the {math.prod(shape)} elements of {name}: "
                "a rank is missing, or two checkpoints are mixed"
            )
