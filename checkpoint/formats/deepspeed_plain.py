"""The optimizer of DeepSpeed without ZeRO: state by number, to be given names.

Such a checkpoint does not say which parameter a number is. Parameters keep their order within a group, so what fits by
shape, and with 16-bit training by the masters' values, is looked for; where more than one way fits, none is taken.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from resilient.checkpoint.catalog.assemble import Held
from resilient.checkpoint.formats.deepspeed_model import ModelStates
from resilient.checkpoint.formats.deepspeed_zero import MASTER, Partitions, RankFile
from resilient.checkpoint.formats.stored import StoredTensor

_MOST_WAYS = 200_000

Fits = Callable[[str, Any], bool]
"""Whether a parameter may be the one that a master (a stored tensor) is of."""


@dataclass(frozen=True, slots=True)
class Numbered:
    """One parameter of a group, as the optimizer has it."""

    state: Mapping[str, Any]
    shape: tuple[int, ...] | None
    master: StoredTensor | None


def plain_optimizer(rank: RankFile, model: ModelStates, fits: Fits) -> Partitions | str:
    """What the optimizer holds, or why it cannot be told."""
    saved = rank.tree.get("optimizer")
    if not isinstance(saved, dict):
        return "it holds no optimizer"
    masters = saved.get("fp32_groups")
    state_dict = saved.get("optimizer_state_dict", saved)
    if "fp32_groups_flat" in saved:
        return "its fused 16-bit optimizer flattens parameters without saying which"
    if not isinstance(state_dict, dict) or not {"state", "param_groups"} <= set(state_dict):
        return "its optimizer is of an unknown kind"
    saved_groups = state_dict["param_groups"]
    groups = [list(_numbered(one, number, state_dict["state"], masters)) for number, one in enumerate(saved_groups)]
    names = [name for name, kind in model.kinds.items() if kind == "parameter"]
    shapes = {name: model.tensors[name].held[0].shape for name in names}
    found = _only_way(names, shapes, groups, fits)
    if found is None:
        return (
            "the parameters of its optimizer are numbered, and the numbers fit the names in more than one way, or none"
        )
    return _partitions(rank, model, saved_groups, groups, found)


def _numbered(group: Mapping[str, Any], number: int, state: Mapping[Any, Any], masters: Any) -> Iterator[Numbered]:
    for place, key in enumerate(group["params"]):
        own = state.get(key, {})
        master = masters[number][place] if masters is not None else None
        shapes = [one.shape for one in own.values() if isinstance(one, StoredTensor) and one.shape]
        shape = master.shape if isinstance(master, StoredTensor) else shapes[0] if shapes else None
        yield Numbered(own, shape, master)


def _only_way(
    names: Sequence[str], shapes: Mapping[str, tuple[int, ...]], groups: Sequence[Sequence[Numbered]], fits: Fits
) -> list[list[str]] | None:
    """The names of each group's parameters, if there is exactly one way to give them in order."""
    start = (0,) * len(groups)
    end = tuple(len(group) for group in groups)
    reached = {start}
    fitting: dict[tuple[str, int, int], bool] = {}

    def fit(name: str, group: int, place: int) -> bool:
        key = (name, group, place)
        if key not in fitting:
            one = groups[group][place]
            fitting[key] = one.shape in (None, shapes[name]) and (one.master is None or fits(name, one.master))
        return fitting[key]

    layers: list[dict[tuple[int, ...], list[tuple[tuple[int, ...], int | None]]]] = []
    for left, name in zip(range(len(names), 0, -1), names, strict=True):
        steps: dict[tuple[int, ...], list[tuple[tuple[int, ...], int | None]]] = {}
        for at in reached:
            steps[at] = [(_plus(at, g), g) for g in range(len(groups)) if at[g] < end[g] and fit(name, g, at[g])]
            if sum(end) - sum(at) < left:
                steps[at].append((at, None))  # frozen
        layers.append(steps)
        reached = {to for found in steps.values() for to, _ in found}
        if len(reached) * len(names) > _MOST_WAYS:
            return None
    counts = {end: 1}
    for steps in reversed(layers):
        counts = {at: sum(counts.get(to, 0) for to, _ in found) for at, found in steps.items()}
    if counts.get(start) != 1:
        return None
    return _walk(names, layers, end, len(groups))


def _walk(
    names: Sequence[str],
    layers: Sequence[Mapping[tuple[int, ...], Sequence[tuple[tuple[int, ...], int | None]]]],
    end: tuple[int, ...],
    groups: int,
) -> list[list[str]]:
    """Backwards along the one way."""
    found: list[list[str]] = [[] for _ in range(groups)]
    at = end
    alive = [{(0,) * groups}]
    for steps in layers:
        alive.append({to for here in alive[-1] for to, _ in steps.get(here, ())})
    for name, steps, before in zip(reversed(names), reversed(layers), reversed(alive[:-1]), strict=True):
        here, group = next((here, g) for here in before for to, g in steps.get(here, ()) if to == at)
        if group is not None:
            found[group].insert(0, name)
        at = here
    return found


def _plus(at: tuple[int, ...], group: int) -> tuple[int, ...]:
    return (*at[:group], at[group] + 1, *at[group + 1 :])


def _partitions(
    rank: RankFile,
    model: ModelStates,
    saved: Sequence[Mapping[str, Any]],
    groups: Sequence[Sequence[Numbered]],
    names: Sequence[Sequence[str]],
) -> Partitions:
    found = Partitions(model.at)
    for values, numbered, own in zip(saved, groups, names, strict=True):
        found.groups.append({**{key: value for key, value in values.items() if key != "params"}, "params": list(own)})
        for one, name in zip(numbered, own, strict=True):
            tensors = {**({MASTER: one.master} if one.master is not None else {}), **one.state}
            for key, value in tensors.items():
                if isinstance(value, StoredTensor):
                    strides = None if value.is_contiguous else value.strides
                    held = Held(at=model.at, shape=value.shape, file=rank.file, offset=value.offset, strides=strides)
                    found.add(name, key, value.dtype, held, rank.where)
                elif isinstance(value, int | float):
                    found.numbers.setdefault(name, {})[key] = value
    return found
