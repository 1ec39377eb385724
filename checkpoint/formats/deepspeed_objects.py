"""What a DeepSpeed checkpoint has besides tensors: as plain values and small real tensors, sorted by owner.

optimizer      numbers of its state that are no tensors, by parameter: {"state": {name: {key: number}}}
lr_scheduler   its state
loss_scaler    its attributes, without its class
engine         global_steps, global_samples, skipped_steps, ds_version and the like
ds_config      the configuration
client_state   what the job itself gave to save_checkpoint
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from resilient.checkpoint.formats.deepspeed_zero import RankFile
from resilient.checkpoint.formats.stored import Opaque, StoredTensor
from resilient.errors import DamagedImage

_MOST_TENSOR_BYTES = 64 << 20
_COUNTERS = (
    "skipped_steps global_steps global_samples dp_world_size mp_world_size ds_version checkpoint_parallel_dimensions "
    "data_sampler random_ltd sparse_tensor_module_names num_experts universal_checkpoint_info"
).split()
_STRUCTURE = frozenset(
    (
        "module buffer_names optimizer param_shapes frozen_param_shapes shared_params frozen_param_fragments "
        "lr_scheduler ds_config ds_autoep_layers"
    ).split()
)
_OF_SCALER = ("dynamic_loss_scale", "overflow", "clip_grad", "cur_scale", "cur_iter", "last_overflow_iter")

Load = Callable[[StoredTensor], torch.Tensor]


def objects_of(
    model: RankFile,
    optimizer: RankFile | None,
    config: Any,
    numbers: Mapping[str, Mapping[str, Any]],
    load: Callable[[StoredTensor, int], torch.Tensor],
) -> dict[str, Any]:
    """`model`, `optimizer`: the states of rank 0. `load` reads a tensor of a file (by number) that no catalog has."""
    found: dict[str, Any] = {}
    of_model = partial(_loaded, load=load, file=model.file)
    tree = model.tree
    if numbers:
        found["optimizer"] = {"state": {name: dict(values) for name, values in numbers.items()}}
    if tree.get("lr_scheduler") is not None:
        found["lr_scheduler"] = real(tree["lr_scheduler"], of_model)
    if optimizer is not None:
        scaler = _scaler(optimizer.tree, partial(_loaded, load=load, file=optimizer.file))
        found |= {"loss_scaler": scaler} if scaler else {}
    found["engine"] = {key: real(tree[key], of_model) for key in _COUNTERS if tree.get(key) is not None}
    config = tree.get("ds_config") or config
    if config is not None:
        found["ds_config"] = real(config, of_model)
    client = {key: real(value, of_model) for key, value in tree.items() if key not in _STRUCTURE.union(_COUNTERS)}
    return {**found, **({"client_state": client} if client else {})}


def _scaler(tree: Mapping[str, Any], load: Load) -> dict[str, Any]:
    found = {key: real(tree[key], load) for key in _OF_SCALER if key in tree}
    if isinstance(tree.get("loss_scaler"), Opaque):
        found |= real(tree["loss_scaler"].state or {}, load)
    return found


def _loaded(stored: StoredTensor, load: Callable[[StoredTensor, int], torch.Tensor], file: int) -> torch.Tensor:
    return load(stored, file)


def real(tree: Any, load: Load) -> Any:
    """Stored tensors → real ones; objects of foreign classes → their attributes."""
    if isinstance(tree, StoredTensor):
        if tree.nbytes > _MOST_TENSOR_BYTES:
            raise DamagedImage(f"a tensor of {tree.nbytes} bytes among what should be small: {tree.shape}")
        return load(tree)
    if isinstance(tree, Opaque):
        if tree.state is not None:
            return real(tree.state, load)
        return real(tree.args[0] if len(tree.args) == 1 else list(tree.args), load)
    if isinstance(tree, Mapping):
        return {key: real(value, load) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        made = [real(value, load) for value in tree]
        return made if isinstance(tree, list) else tuple(made)
    return tree
