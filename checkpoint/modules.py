"""The modules of a model by the names that they have without their wrappers: DDP, torch.compile, checkpointing.

Which tensors they hold is for `leaves.py`; what else of theirs is saved, for `extras.py`.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

# Names under which wrappers hold what they wrap: torch.compile, activation checkpointing.
_TRANSPARENT = frozenset({"_orig_mod", "_checkpoint_wrapped_module"})


@dataclass(frozen=True, slots=True)
class Home:
    """The DistributedDataParallel around a module, if any: its ranks, and the ids of what it leaves alone."""

    ranks: tuple[int, ...] = ()
    ignored: frozenset[int] = frozenset()


def modules_of(module: nn.Module, prefix: str = "", home: Home | None = None) -> Iterator[tuple[str, nn.Module, Home]]:
    """All modules, wrappers too, with the names that they have without wrappers, and their homes. Depth first."""
    home = home or Home()
    if isinstance(module, DistributedDataParallel):
        home = _home_of(module)
    yield prefix, module, home
    wraps = isinstance(module, (DistributedDataParallel, DataParallel))
    for name, child in module._modules.items():
        if child is None:
            continue
        transparent = name in _TRANSPARENT or (wraps and name == "module")
        yield from modules_of(child, prefix if transparent else f"{prefix}.{name}" if prefix else name, home)


def with_extra_state(module: nn.Module) -> dict[str, nn.Module]:
    """The modules that have extra state, by name; one that is there twice under its first name."""
    found: dict[str, nn.Module] = {}
    seen: set[int] = set()
    for name, part, _ in modules_of(module):
        if id(part) not in seen and type(part).get_extra_state is not nn.Module.get_extra_state:
            found[name] = part
        seen.add(id(part))
    return found


def _home_of(module: DistributedDataParallel) -> Home:
    names = module.parameters_to_ignore
    ignored = frozenset(id(tensor) for name, tensor in module.module.named_parameters() if name in names)
    return Home(tuple(sorted(torch.distributed.get_process_group_ranks(module.process_group))), ignored)
