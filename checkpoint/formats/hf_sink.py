"""Safetensors as transformers' `save_pretrained` lays it out, planned from any catalog.

Parameters and persistent buffers of one item; tied weights once. Without metadata of ours the files are byte for byte
those of `safetensors.torch.save_file`. With `extra={"optimizer": "1"}` the optimizer's state goes to a file of its own.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence

from resilient.checkpoint.catalog.catalog import Catalog, Tensor
from resilient.checkpoint.formats.hf_extra import OPTIMIZER_FILE, STORED_AS, Extra, State
from resilient.checkpoint.formats.hf_header import Entry, layout, make_header
from resilient.checkpoint.formats.output import Output, SinkOptions, TensorBytes
from resilient.checkpoint.formats.source import Source
from resilient.checkpoint.formats.values import is_floating
from resilient.errors import UsageError

_INDEX = "model.safetensors.index.json"


def plan(source: Source, options: SinkOptions) -> list[Output]:
    """See `formats/output.py`. `extra`: {"optimizer": "1"} for the optimizer's state, too.

    With a `dtype`, where the optimizer has fp32 master weights that can tell more in it, their values are taken.
    Raises UsageError where no item, or more than one that could be meant, has parameters.
    """
    catalog = source.catalog
    model = _model(catalog, options.dtype)
    shards = [model] if options.into else _shards(model, options.shard_bytes)
    outputs = [
        _file(name, shard, _extra(catalog, shard))
        for name, shard in zip(_names(len(shards), options.into), shards, strict=True)
    ]
    if len(shards) > 1:
        outputs.append(_index(outputs, shards))
    if options.extra.get("optimizer") == "1":
        if options.into:
            raise UsageError("the optimizer's state goes to a file of its own: give a folder to convert to")
        outputs.insert(0, _optimizer(catalog))
    return outputs


Chosen = tuple[str, Tensor, str]
"""A tensor to write: its name in the file, the tensor of the source, and the dtype to write it in."""


def _model(catalog: Catalog, dtype: str | None) -> list[Chosen]:
    tensors = catalog.of_kind("parameter", "buffer")
    items = list(dict.fromkeys(tensor.item for tensor in tensors if tensor.kind == "parameter"))
    item = items[0] if len(items) == 1 else "model"
    if items and item not in items:
        raise UsageError(f"there are several models ({', '.join(items)}): select one, such as --select '{items[0]}.*'")
    if not items:
        raise UsageError("there are no parameters to write (of what is selected)")
    states = catalog.all_states()
    return [_choose(one, states.get(one.name, {}).get("fp32"), dtype) for one in tensors if one.item == item]


def _choose(tensor: Tensor, master: Tensor | None, dtype: str | None) -> Chosen:
    if dtype is None or dtype == tensor.dtype or not is_floating(tensor.dtype):
        return tensor.fqn, tensor, tensor.dtype
    better = master is not None and master.shape == tensor.shape and master.itemsize > tensor.itemsize
    return tensor.fqn, master if better and master is not None else tensor, dtype


def _entry(chosen: Chosen) -> Entry:
    name, tensor, dtype = chosen
    stored, added = STORED_AS.get(dtype, (dtype, ()))
    return Entry(name, stored, (*tensor.shape, *added), 0)


def _shards(tensors: Sequence[Chosen], most_bytes: int) -> list[list[Chosen]]:
    """As huggingface_hub cuts: in order, a new shard where one more would be too much, what is larger by itself."""
    shards: list[list[Chosen]] = []
    current: list[Chosen] = []
    used = 0
    for chosen in tensors:
        nbytes = _entry(chosen).nbytes
        if nbytes > most_bytes:
            shards.append([chosen])
            continue
        if used + nbytes > most_bytes:
            shards.append(current)
            current, used = [], 0
        current.append(chosen)
        used += nbytes
    return [*shards, current] if current else shards


def _names(count: int, into: str | None) -> list[str]:
    if count == 1:
        return [into or "model.safetensors"]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def _extra(catalog: Catalog, shard: Iterable[Chosen]) -> Extra:
    names = {name for name, _, _ in shard}
    tensors = [tensor for tensor in catalog.of_kind("parameter", "buffer") if tensor.fqn in names]
    item = next(tensor.item for tensor in tensors)
    fqns = {tensor.name: tensor.fqn for tensor in tensors if tensor.item == item}
    return Extra(
        item=item,
        step=catalog.step,
        aliases={
            name.removeprefix(f"{item}."): fqns[first] for name, first in catalog.aliases.items() if first in fqns
        },
        buffers=frozenset(tensor.fqn for tensor in tensors if tensor.kind == "buffer"),
        dtypes=_stored_as(shard),
    )


def _stored_as(tensors: Iterable[Chosen]) -> dict[str, str]:
    return {name: dtype for name, _, dtype in tensors if dtype in STORED_AS}


def _file(name: str, tensors: Iterable[Chosen], extra: Extra) -> Output:
    by_name = {chosen[0]: chosen for chosen in tensors}
    entries = layout(map(_entry, by_name.values()))
    parts = [_bytes(by_name[entry.name]) for entry in entries]
    return Output(name=name, parts=(make_header(entries, {"format": "pt"} | extra.metadata()), *parts))


def _bytes(chosen: Chosen) -> TensorBytes:
    _, tensor, dtype = chosen
    return TensorBytes(tensor.name, (0,) * len(tensor.shape), tensor.shape, dtype)


def _index(outputs: Sequence[Output], shards: Sequence[Sequence[Chosen]]) -> Output:
    tensors = [tensor for shard in shards for _, tensor, _ in shard]
    raw = {
        "metadata": {
            "total_parameters": sum(math.prod(tensor.shape) for tensor in tensors if tensor.kind != "buffer"),
            "total_size": sum(_entry(chosen).nbytes for shard in shards for chosen in shard),
        },
        "weight_map": {
            name: output.name for output, shard in zip(outputs, shards, strict=True) for name, _, _ in shard
        },
    }
    text = json.dumps(raw, indent=2, sort_keys=True) + "\n"
    return Output(name=_INDEX, parts=(text.encode(),), last=True)


def _optimizer(catalog: Catalog) -> Output:
    """All optimizers' state under the catalog's names, in the dtypes that it has; its groups in the metadata."""
    tensors: list[Chosen] = [(tensor.name, tensor, tensor.dtype) for tensor in catalog.of_kind("optimizer")]
    extra = Extra(
        step=catalog.step,
        states={name: State(one.item, one.parameter, one.state) for name, one, _ in tensors},
        groups=_plain(catalog.groups),
        dtypes=_stored_as(tensors),
    )
    return _file(OPTIMIZER_FILE, tensors, extra)


def _plain(groups: Mapping[str, list[dict[str, object]]]) -> Mapping[str, list[dict[str, object]]]:
    """Groups as JSON has them. Raises UsageError for a hyperparameter that is none of its values."""
    try:
        json.dumps(groups, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise UsageError(f"the optimizer's groups have what JSON cannot say ({error}): convert without it") from error
    return groups
