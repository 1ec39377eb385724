"""Any checkpoint into a live DeepSpeed engine: ZeRO-0 to 3, any number of ranks, each reading what it holds.

DeepSpeed's own universal loader forgets frozen parameters and buffers, gives all groups of ZeRO-3 the hyperparameters
of the first, knows no optimizer but Adam there, and has every rank read every parameter. Here everything is read into
memory of its own first; when all ranks have theirs it takes the place of what was there.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from resilient.checkpoint.catalog.catalog import Tensor
from resilient.checkpoint.catalog.meet import boxes_of_range
from resilient.checkpoint.dtypes import torch_dtype
from resilient.checkpoint.formats.deepspeed_engine import (
    Flat,
    flats,
    group_names,
    inner,
    partitioned,
    renew,
    set_whole,
    shape_of,
)
from resilient.checkpoint.formats.deepspeed_zero import MASTER, Fragment
from resilient.checkpoint.formats.fetch import fetch
from resilient.checkpoint.formats.fetched import fetched
from resilient.checkpoint.formats.registry import open_source
from resilient.checkpoint.formats.source import Reference, Source
from resilient.checkpoint.world import join_world
from resilient.errors import LayoutMismatch, RankFailed

_COUNTERS = ("global_steps", "global_samples", "skipped_steps")


def restore(engine: Any, url: str, *, weights_only: bool = False, **how: Any) -> dict[str, Any]:
    """Load a checkpoint of any format into an engine that `deepspeed.initialize` has made. All ranks call it; blocks.

    `how`: further arguments of `Reference` (format, step, spec, trust_pickle). Parameters are found by their names in
    the module. `weights_only`: load these and the buffers alone. Returned is what the job had given to save_checkpoint
    (client_state), and further objects by item, nothing with `weights_only`.

    Raises LayoutMismatch where a parameter is missing or has another shape, groups do not fit, or there are slices of
    tensor-parallel ranks to be loaded; RankFailed on the ranks whose fellow failed; what opening and reading raise.
    Up to then nothing of the engine has been changed.
    """
    found = _together(lambda: _Loaded.read(engine, Reference(url=url, **how), weights_only))
    return found.install(engine)


@dataclass(slots=True)
class _Loaded:
    """All that is to be set on this rank. `values`: of each flat master ("fp32") and its states."""

    flats: list[Flat]
    values: list[dict[str, Any]]
    whole: dict[str, torch.Tensor]
    groups: list[dict[str, Any]]
    objects: dict[str, Any]
    step: int | None
    weights_only: bool = False

    @classmethod
    def read(cls, engine: Any, reference: Reference, weights_only: bool = False) -> "_Loaded":
        held = flats(engine)
        with open_source(reference) as source:
            reader = _Reader(source)
            reader.check(engine)
            return cls(
                flats=held,
                values=[reader.flat(one, weights_only) for one in held],
                whole=reader.whole(engine),
                groups=reader.groups(group_names(engine)),
                objects=source.objects(),
                step=source.catalog.step,
                weights_only=weights_only,
            )

    def install(self, engine: Any) -> dict[str, Any]:
        with torch.no_grad(), partitioned(engine):
            for flat, values in zip(self.flats, self.values, strict=True):
                flat.master.data.copy_(values.pop(MASTER).view(flat.master.shape))
                if not self.weights_only:
                    flat.state.clear()
                    flat.state.update(values)
            renew(engine, self.flats)
            for name, parameter in engine.module.named_parameters():
                if name in self.whole:
                    set_whole(parameter, partial(self.whole.__getitem__, name))
            for name, buffer in engine.module.named_buffers():
                if name in self.whole:
                    buffer.copy_(self.whole[name])
        if self.weights_only:
            return {}
        for live, saved in zip(inner(engine).param_groups, self.groups, strict=True):
            live.update({key: value for key, value in saved.items() if key != "params"})
        return self._install_objects(engine)

    def _install_objects(self, engine: Any) -> dict[str, Any]:
        counters = self.objects.get("engine")
        counters = counters if isinstance(counters, Mapping) else {"global_steps": self.step}
        for key in _COUNTERS:
            if counters.get(key) is not None:
                setattr(engine, key, counters[key])
        schedule = self.objects.get("lr_scheduler")
        if schedule is not None and engine.lr_scheduler is not None:
            engine.lr_scheduler.load_state_dict(schedule)
        _set_scaler(engine.optimizer, self.objects.get("loss_scaler"))
        known = {"engine", "lr_scheduler", "loss_scaler", "ds_config", "optimizer", "model", "client_state"}
        client = self.objects.get("client_state")
        found = dict(client) if isinstance(client, Mapping) else {}
        return {**{key: value for key, value in self.objects.items() if key not in known}, **found}


class _Reader:
    """Parameters of the engine by name, from a source."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._where = source.reference.url
        self._states = source.catalog.all_states()
        items = {tensor.item for tensor in source.catalog.of_kind("parameter", "buffer")}
        if len(items) != 1:
            raise LayoutMismatch(f"{self._where} has parameters of {sorted(items)}; an engine has one model")
        self._item = next(iter(items))
        self._numbers = _numbers(source)

    def check(self, engine: Any) -> None:
        """Raises LayoutMismatch: all that the engine holds has to be there, in the same shape."""
        for name, parameter in engine.module.named_parameters():
            self._check(name, shape_of(parameter))
        persistent = engine.module.state_dict().keys() if not _is_zero_3(engine) else None
        for name, buffer in engine.module.named_buffers():
            if (persistent is None and self._has(name)) or (persistent is not None and name in persistent):
                self._check(name, tuple(buffer.shape))

    def flat(self, flat: Flat, weights_only: bool = False) -> dict[str, Any]:
        """The new master and states of a flat tensor, in memory of their own."""
        keys = {key: None for one in flat.fragments for key in self._states.get(self._full(one.name), {})}
        found: dict[str, Any] = {MASTER: self._filled(flat, MASTER)}
        if weights_only:
            return found
        for key in keys:
            if key != MASTER:
                single = self._single(flat, key)
                found[key] = self._filled(flat, key) if single is None else single
        for one in flat.fragments:
            for key, number in self._numbers.get(self._full(one.name), {}).items():
                found.setdefault(key, number)
        return found

    def whole(self, engine: Any) -> dict[str, torch.Tensor]:
        """Buffers, and the parameters that no optimizer holds (of ZeRO-3 on rank 0 alone)."""
        trained = {name for names in group_names(engine) for name in names}
        frozen = [name for name, _ in engine.module.named_parameters() if name not in trained]
        buffers = [name for name, _ in engine.module.named_buffers() if self._has(name)]
        wanted = buffers if _is_zero_3(engine) and dist.get_rank() else [*frozen, *buffers]
        found = {name: self._all_of(self._tensor(name)) for name in wanted}
        # A parameter's name has to be known on all ranks, which gather it together.
        return {**{name: torch.empty(0) for name in frozen}, **found}

    def groups(self, names: list[list[str]]) -> list[dict[str, Any]]:
        """The saved group of each of the engine's, found by the names in it."""
        saved = next(iter(self._source.catalog.groups.values()), [])
        of = {self._first(name): number for number, group in enumerate(saved) for name in group["params"]}
        found = []
        for own in names:
            numbers = {of.get(self._full(name)) for name in own} - {None} if saved else set()
            values = [_hyperparameters(saved[number]) for number in sorted(n for n in numbers if n is not None)]
            if any(one != values[0] for one in values):
                raise LayoutMismatch(
                    f"{self._where}: the parameters of a group of the engine ({own[0]} and {len(own) - 1} more) "
                    "were in groups with different hyperparameters: group them as they were"
                )
            found.append(values[0] if values else {})
        return found

    def _check(self, name: str, shape: tuple[int, ...]) -> None:
        if not self._has(name):
            raise LayoutMismatch(f"{self._where} has no {name}")
        have = self._tensor(name).shape
        if have != shape:
            raise LayoutMismatch(f"{self._where}: {name} has the shape {have}, in the engine {shape}")

    def _filled(self, flat: Flat, key: str) -> torch.Tensor:
        made = torch.zeros(flat.master.numel(), dtype=flat.master.dtype)
        for one in flat.fragments:
            own = self._states.get(self._full(one.name), {})
            tensor = own.get(key) if key in own else self._tensor(one.name) if key == MASTER else None
            if tensor is not None and one.numel:
                self._range(tensor, one, made[one.start : one.start + one.numel])
        return made.view(flat.master.shape).to(flat.master.device)

    def _single(self, flat: Flat, key: str) -> Any:
        """A state that is one number for the whole flat tensor, such as the step; None for others."""
        found: list[torch.Tensor] = []
        for one in flat.fragments:
            full = self._full(one.name)
            tensor = self._states.get(full, {}).get(key)
            if tensor is None:
                continue
            if tensor.shape:
                return None
            found.append(self._all_of(tensor))
        if any(not torch.equal(one, found[0]) for one in found):
            raise LayoutMismatch(
                f"{self._where}: {key} differs between parameters that the engine keeps together, "
                f"{flat.fragments[0].name} and others"
            )
        return found[0] if found else None

    def _range(self, tensor: Tensor, one: Fragment, into: torch.Tensor) -> None:
        flat = torch.empty(one.numel, dtype=torch_dtype(tensor.dtype))
        bytes_of: Any = flat.view(torch.uint8).numpy()
        view = memoryview(bytes_of)
        at = 0
        for offsets, sizes in boxes_of_range(one.begin, one.begin + one.numel, tensor.shape):
            nbytes = torch.Size(sizes).numel() * tensor.itemsize
            fetch(self._source, tensor, view[at : at + nbytes], offsets, sizes)
            at += nbytes
        into.copy_(flat)

    def _all_of(self, tensor: Tensor) -> torch.Tensor:
        return fetched(self._source, tensor)

    def _full(self, name: str) -> str:
        return self._first(f"{self._item}.{name}")

    def _first(self, full: str) -> str:
        return self._source.catalog.aliases.get(full, full)

    def _has(self, name: str) -> bool:
        return self._full(name) in self._source.catalog.tensors

    def _tensor(self, name: str) -> Tensor:
        return self._source.catalog.tensors[self._full(name)]


def _numbers(source: Source) -> dict[str, dict[str, Any]]:
    for item in source.catalog.groups:
        found = source.objects().get(item)
        states = found.get("state") if isinstance(found, Mapping) else None
        if isinstance(states, Mapping):
            return {name: dict(own) for name, own in states.items() if isinstance(own, Mapping)}
    return {}


def _hyperparameters(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params"}


def _is_zero_3(engine: Any) -> bool:
    return hasattr(engine.optimizer, "fp32_partitioned_groups_flat")


def _set_scaler(optimizer: Any, saved: Any) -> None:
    """The attributes of a dynamic loss scaler that both have; optimizers of stage 0 keep theirs under another name."""
    scaler = getattr(optimizer, "loss_scaler", None) or getattr(optimizer, "loss_scale_config", None)
    if not isinstance(saved, Mapping) or scaler is None:
        return
    for key, value in saved.items():
        if key in getattr(scaler, "__dict__", {}) and isinstance(value, int | float | bool):
            setattr(scaler, key, value)


def _together(read: Callable[[], _Loaded]) -> _Loaded:
    """What was read, when all ranks have read; an error on one of them is one on all."""
    error: BaseException | None = None
    found: _Loaded | None = None
    try:
        found = read()
    except Exception as caught:
        error = caught
    world = join_world()  # a group for JSON: torch's own exchange of objects unpickles what others send
    told = world.gather(None if error is None else f"{type(error).__name__}: {error}")
    if world.group is not None:
        dist.destroy_process_group(world.group)
    if error is not None:
        raise error
    failed = [(rank, text) for rank, text in enumerate(told) if text is not None]
    if failed:
        raise RankFailed(f"nothing was restored: rank {failed[0][0]} could not read its part ({failed[0][1]})")
    assert found is not None
    return found
