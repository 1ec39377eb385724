"""The names of an engine's parameters in a snapshot: those of its module, with experts numbered over all their ranks.

DeepSpeed's MoE layers number the experts of each rank from nought; under such names different experts would be taken
for one. The number that is used here counts on over the ranks, so that an expert keeps its name wherever it is put.
"""

from collections.abc import Iterator
from typing import Any

from torch import nn

_EXPERTS = "deepspeed_experts"


class Names:
    """Of one engine; made when it is walked. `of(name)` is what a parameter or buffer is called in a snapshot."""

    def __init__(self, engine: Any) -> None:
        self._firsts = {f"{prefix}.{_EXPERTS}.": first for prefix, first in _first_experts(engine)}

    def of(self, name: str) -> str:
        for prefix, first in self._firsts.items():
            if name.startswith(prefix):
                number, _, rest = name.removeprefix(prefix).partition(".")
                return f"{prefix}{first + int(number)}.{rest}"
        return name


def _first_experts(engine: Any) -> Iterator[tuple[str, int]]:
    """The layers whose experts are spread over ranks, and the number of the first expert that is here."""
    for prefix, part in engine.module.named_modules():
        experts = part._modules.get(_EXPERTS)
        if experts is None:
            continue
        group = _group_name(experts)
        if group is not None:
            rank = engine.expert_parallel_group[group].rank()
            yield prefix, rank * len(list(experts.children()))


def _group_name(experts: nn.Module) -> str | None:
    return next((name for one in experts.parameters() if (name := getattr(one, "group_name", None))), None)
