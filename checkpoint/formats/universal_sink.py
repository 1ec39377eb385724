"""DeepSpeed universal checkpoints, written: one folder that ZeRO-1, 2 and 3 load at any number of ranks.

DeepSpeed's two loaders look for different things (`base_optimizer.py`, `stage3.py`: load_hp_checkpoint_state_from_...);
here both find theirs: the states of a parameter in the form that both take, the step beside each and in the optimizer
state, groups in both places, model states under both names. No class is pickled, so `weights_only` opens all of it.
What DeepSpeed does not load is there for us (`deepspeed_restore.py`): frozen parameters, buffers, and groups by name.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from resilient.checkpoint.catalog.catalog import Tensor
from resilient.checkpoint.catalog.spec import Cut, parse_spec
from resilient.checkpoint.formats.deepspeed_parallel import Cuts
from resilient.checkpoint.formats.deepspeed_zero import MASTER
from resilient.checkpoint.formats.output import Output, SinkOptions, TensorBytes
from resilient.checkpoint.formats.source import Source
from resilient.checkpoint.formats.torch_write import torch_parts
from resilient.errors import UsageError

OTHER_STATES = "resilient_states.pt"
NUMBERS = "numbers"
_VERSION = "0.19.8"  # whose loaders the files are for; they want to know one
_INFO = {"universal_checkpoint_version": 0.4}
_COUNTERS = ("skipped_steps", "global_samples", "sparse_tensor_module_names", "data_sampler", "random_ltd")
_OF_LOADERS = frozenset(
    (
        "module buffer_names optimizer param_shapes frozen_param_shapes shared_params frozen_param_fragments"
        " lr_scheduler skipped_steps global_steps global_samples dp_world_size mp_world_size ds_version"
        " universal_checkpoint_info ds_config data_sampler random_ltd sparse_tensor_module_names"
        " num_experts checkpoint_parallel_dimensions"
    ).split()
)
_SCALER = ("dynamic_loss_scale", "overflow", "clip_grad")


def plan(source: Source, options: SinkOptions) -> list[Output]:
    """See the module. `options.dtype`: of frozen parameters and buffers; masters and states of optimizers are float32.

    Raises UsageError for what the format cannot say: several models or optimizers, names that are no file names.
    """
    model = _Model.of(source)
    tag = f"global_step{model.step}_universal"
    outputs = [Output(name=f"{tag}/{name}", parts=torch_parts(tree)) for name, tree in _files(source, model, options)]
    return [*outputs, Output(name="latest_universal", parts=(tag.encode(),), last=True)]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Model:
    """What of a catalog goes where. Names are those in the module, as DeepSpeed has them."""

    item: str
    trained: dict[str, Tensor]
    frozen: dict[str, Tensor]
    buffers: dict[str, Tensor]
    states: dict[str, dict[str, Tensor]]
    groups: list[dict[str, Any]]
    aliases: dict[str, str]
    step: int
    numbers: dict[str, dict[str, Any]]

    @classmethod
    def of(cls, source: Source) -> "_Model":
        catalog = source.catalog
        parameters = {tensor.name: tensor for tensor in catalog.of_kind("parameter", "tensor")}
        item = _only("model", {tensor.item for tensor in parameters.values()}, source)
        optimizer = _optimizer(source)
        groups = catalog.groups.get(optimizer, []) if optimizer else []
        states = {name: found for name, found in catalog.all_states().items() if name in parameters}
        held = set(states) | {catalog.aliases.get(name, name) for group in groups for name in group["params"]}
        trained = {name: one for name, one in parameters.items() if not held or name in held}
        short = {name: _short(name, item) for name in (*parameters, *catalog.aliases)}
        numbers = source.objects().get(optimizer, {}).get("state", {}) if optimizer else {}
        return cls(
            item=item,
            trained={short[name]: one for name, one in trained.items()},
            frozen={short[name]: one for name, one in parameters.items() if name not in trained},
            buffers={_short(one.name, item): one for one in catalog.of_kind("buffer") if one.item == item},
            states={short[name]: found for name, found in states.items()},
            groups=_named_groups(groups, trained, item),
            aliases={short[name]: short[first] for name, first in catalog.aliases.items() if first in short},
            step=_step_of(source),
            numbers={
                short[name]: dict(own) for name, own in numbers.items() if name in short and isinstance(own, Mapping)
            },
        )


def _files(source: Source, model: _Model, options: SinkOptions) -> Iterator[tuple[str, Any]]:
    cut_of = _cuts(source)
    others: dict[str, dict[str, Any]] = {}
    for name, tensor in model.trained.items():
        states = model.states.get(name, {})
        told = _told(cut_of, name, tensor)
        yield f"zero/{name}/{MASTER}.pt", {"param": _whole(states.get(MASTER, tensor), "float32"), **told}
        for state, one in states.items():
            if state == MASTER:
                continue
            if one.shape == tensor.shape and state != "step":
                yield f"zero/{name}/{state}.pt", {"param": _whole(one, "float32"), **told}
            elif state != "step":
                others.setdefault(name, {})[state] = _whole(one, one.dtype)
        step = _step(model, name)
        if step is not None:
            yield f"zero/{name}/step.pt", step
    if others:
        yield OTHER_STATES, others
    yield "zero/optimizer_state.pt", _optimizer_state(source, model)
    whole, small = _model_states(source, model, options)
    yield "mp_rank_00_model_states.pt", whole
    yield "zero_pp_rank_0_mp_rank_00_model_states.pt", small


def _step(model: _Model, name: str) -> Any:
    """The step of a parameter: a tensor of the source, or a number made one, as optimizers of torch have it."""
    stored = model.states.get(name, {}).get("step")
    if stored is not None:
        return _whole(stored, stored.dtype)
    number = model.numbers.get(name, {}).get("step")
    return torch.tensor(float(number)) if isinstance(number, int | float) else None


def _optimizer_state(source: Source, model: _Model) -> dict[str, Any]:
    steps = [step for step in (_step(model, name) for name in model.trained) if step is not None]
    scaler = source.objects().get("loss_scaler")
    told = {key: scaler[key] for key in _SCALER if key in scaler} if isinstance(scaler, Mapping) else {}
    return {
        **told,
        "ds_version": str(source.objects().get("engine", {}).get("ds_version", _VERSION)),
        "param_groups": model.groups,
        "optimizer_state_dict": {
            "state": {0: {"step": steps[0] if steps else torch.tensor(float(model.step))}},
            "param_groups": model.groups,
        },
        NUMBERS: model.numbers,
    }


def _model_states(source: Source, model: _Model, options: SinkOptions) -> tuple[dict[str, Any], dict[str, Any]]:
    """Of ZeRO-0 to 2 and of ZeRO-3. The module is in the first alone: no loader of universal ones reads it."""
    objects = source.objects()
    engine = objects.get("engine") if isinstance(objects.get("engine"), Mapping) else {}
    assert engine is not None
    groups = model.groups or [{"params": list(model.trained)}]
    states: dict[str, Any] = {
        "module": {},
        "buffer_names": list(model.buffers),
        "optimizer": None,
        "param_shapes": [
            OrderedDict((name, torch.Size(model.trained[name].shape)) for name in group["params"]) for group in groups
        ],
        "frozen_param_shapes": OrderedDict((name, torch.Size(one.shape)) for name, one in model.frozen.items()),
        "shared_params": model.aliases,
        "frozen_param_fragments": None,
        "lr_scheduler": objects.get("lr_scheduler"),
        **dict.fromkeys(_COUNTERS),
        "skipped_steps": 0,
        **{key: engine[key] for key in _COUNTERS if key in engine},
        "global_steps": model.step,
        "dp_world_size": 1,
        "mp_world_size": 1,
        "ds_version": str(engine.get("ds_version", _VERSION)),
        "universal_checkpoint_info": engine.get("universal_checkpoint_info") or _INFO,
        **_client_state(objects, model.item),
    }
    if states["global_samples"] is None:
        del states["global_samples"]
    kept = {**model.frozen, **model.buffers}
    module = OrderedDict((name, _whole(one, _dtype(one, options))) for name, one in kept.items())
    return {**states, "module": module}, states


def _client_state(objects: Mapping[str, Any], item: str) -> dict[str, Any]:
    """What the job gave to save_checkpoint, and what other formats keep besides, by item."""
    own = objects.get("client_state")
    found = dict(own) if isinstance(own, Mapping) else {}
    known = {"client_state", "engine", "ds_config", "lr_scheduler", "loss_scaler", "optimizer", "optim", item}
    for name, value in objects.items():
        if name not in known and not (isinstance(value, Mapping) and "param_groups" in value):
            found.setdefault(name, value)
    return {name: value for name, value in found.items() if name not in _OF_LOADERS}


CutOf = Callable[[str, int], Cut]
"""How a parameter, by name and number of dimensions, is cut."""


def _cuts(source: Source) -> CutOf | None:
    """By specification, or as the job has left it; None where nothing is said."""
    spec = parse_spec(source.reference.spec) if source.reference.spec else None
    if spec is not None:
        return lambda name, _: spec.cut_of(name)
    engine = source.objects().get("engine")
    info = engine.get("universal_checkpoint_info") if isinstance(engine, Mapping) else None
    patterns = {key for key in info if key.endswith("patterns")} if isinstance(info, Mapping) else set()
    return Cuts(None, info, 1, source.reference.url).told if patterns else None


def _told(cut_of: CutOf | None, name: str, tensor: Tensor) -> dict[str, Any]:
    """How tensor-parallel ranks cut the parameter, for loaders that do not know it themselves."""
    if cut_of is None or not tensor.shape:
        return {"cat_dim": 0}
    cut = cut_of(name, len(tensor.shape))
    told: dict[str, Any] = {"cat_dim": cut.shards[0].dim if cut.shards else 0}
    if cut.sub_parameters is not None:
        if len(set(cut.sub_parameters.widths)) > 1:
            raise UsageError(
                f"{name} has sub-parameters of unequal widths, which a universal checkpoint says with a pickled class "
                "of DeepSpeed; leave them out of the specification and load with as many tensor-parallel ranks as one"
            )
        told["param_n_sub_params"] = len(cut.sub_parameters.widths)
    if cut.padded is not None:
        told["vocab_tensor"] = True
    return told


def _whole(tensor: Tensor, dtype: str) -> TensorBytes:
    return TensorBytes(tensor.name, (0,) * len(tensor.shape), tensor.shape, dtype)


def _dtype(tensor: Tensor, options: SinkOptions) -> str:
    floating = tensor.dtype.startswith(("float", "bfloat"))
    return options.dtype if options.dtype is not None and floating else tensor.dtype


def _step_of(source: Source) -> int:
    """Of formats that know no step it may be among the objects, where DeepSpeed's counters went."""
    engine = source.objects().get("engine")
    told = engine.get("global_steps") if isinstance(engine, Mapping) else None
    known = source.catalog.step if source.catalog.step is not None else told
    return known if isinstance(known, int) else 0


def _optimizer(source: Source) -> str | None:
    catalog = source.catalog
    items = {tensor.item for tensor in catalog.of_kind("optimizer")} | set(catalog.groups)
    return _only("optimizer", items, source) if items else None


def _only(what: str, items: set[str], source: Source) -> str:
    if len(items) != 1:
        known = ", ".join(sorted(items)) or "none"
        raise UsageError(
            f"{source.reference.url} has {len(items)} items with {what} tensors ({known}); "
            "a universal checkpoint has one: --select its names"
        )
    return next(iter(items))


def _named_groups(groups: list[dict[str, Any]], trained: Mapping[str, Tensor], item: str) -> list[dict[str, Any]]:
    """With the names of the module, each parameter once."""
    found = []
    for group in groups:
        names = [name for name in group["params"] if name in trained]
        values = {key: value for key, value in group.items() if key != "params"}
        found.append({**values, "params": [_short(name, item) for name in names]})
    return found


def _short(name: str, item: str) -> str:
    short = name.removeprefix(f"{item}.")
    if "/" in short or short in ("", ".", "..") or "\0" in short or short == "optimizer_state.pt":
        raise UsageError(f"{name!r} cannot be the name of a folder, as universal checkpoints have it")
    return short
