"""Ranks tell one another what they are about to do, before they do it: a difference is an error, not a hang.

One small all-gather. Whoever calls this keeps the outcome for calls of the same shape.
"""

import json
from typing import Any

import torch
import torch.distributed as dist

from resilient.errors import CollectiveMismatch, UsageError
from resilient.kernels.overlap.exchange import Group

_BYTES = 2048


def agree(group: Group, what: str, *, problem: str | None = None, note: Any = None, device: str = "cpu") -> list[Any]:
    """Compare `what` among all ranks of a group; returns each rank's `note` (JSON, at most a thousand bytes).

    Blocks; all ranks have to call it. Raises, on all ranks alike, UsageError if any of them has a `problem`, and
    CollectiveMismatch if they are not about to do the same. A peer that is gone is the group's own error.
    """
    told = [json.loads(text) for text in _gathered(group, [what[:400], (problem or "")[:400], note], device)]
    ill = {rank: said[1] for rank, said in enumerate(told) if said[1]}
    if ill:
        raise UsageError(_listed(ill))
    if len({said[0] for said in told}) > 1:
        raise CollectiveMismatch(
            f"ranks called different operations; {_listed({rank: said[0] for rank, said in enumerate(told)})}"
        )
    return [said[2] for said in told]


def _listed(said: dict[int, str]) -> str:
    """Ranks that say the same are named together."""
    texts: dict[str, list[int]] = {}
    for rank, text in said.items():
        texts.setdefault(text, []).append(rank)
    parts = []
    for text, ranks in texts.items():
        who = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks[:8]))}"
        parts.append(f"{who}{' and more' if len(ranks) > 8 else ''}: {text}")
    return "; ".join(parts)


def _gathered(group: Group, mine: Any, device: str) -> list[str]:
    text = json.dumps(mine).encode()
    if len(text) > _BYTES:
        raise ValueError(f"a note of {len(text)} bytes is too long for {_BYTES}")
    sent = torch.frombuffer(bytearray(text.ljust(_BYTES)), dtype=torch.uint8).to(device)
    boxes = [torch.empty_like(sent) for _ in range(group.size())]
    dist.all_gather(boxes, sent, group=group)
    return [bytes(box.tolist()).decode() for box in boxes]
