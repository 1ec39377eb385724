"""What one node knows of one snapshot in its parity group. Values; only `core.py` changes them."""

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from resilient.checkpoint.parity.facts import DIGEST_CHARS, Done, Sealed
from resilient.checkpoint.parity.layout import Key, Member, Stripe
from resilient.errors import UsageError

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.05, 2.0


class State(enum.Enum):
    OPEN = "open"
    WHOLE = "whole"
    FAILED = "failed"
    GONE = "gone"


@dataclass(frozen=True, slots=True, kw_only=True)
class Images:
    """What one member's agent sealed."""

    agent: str
    world_size: int
    by_rank: Mapping[int, Sealed]


@dataclass(slots=True, kw_only=True)
class Snapshot:
    """What this node knows of a snapshot in its group. Only the core changes it."""

    key: Key
    group: tuple[str, ...]
    m: int
    state: State = State.OPEN
    reason: str = ""
    images: dict[str, Images] = field(default_factory=dict)
    stripe: Stripe | None = None
    agents: tuple[str, ...] = ()
    done: dict[int, Done] = field(default_factory=dict)
    confirmed: dict[str, set[str]] = field(default_factory=dict)
    pause_s: float = FIRST_PAUSE_S
    retry_at: float = 0.0
    started: bool = False

    def sealed(self) -> dict[int, Sealed]:
        """All images of the group, by rank."""
        return {rank: one for images in self.images.values() for rank, one in images.by_rank.items()}

    def copy(self) -> "Snapshot":
        """As it is now, for another thread."""
        return replace(self, images=dict(self.images), done=dict(self.done), confirmed={})

    def progress(self) -> dict[str, Any]:
        """Of an open snapshot: whose images, or else whose rows, it waits for."""
        missing = [node for node in self.group if node not in self.images]
        missing = missing or [node for row, node in enumerate(self.group) if row not in self.done]
        return {"life": self.key[0], "step": self.key[1], "waiting_for": missing}


def stripe_of(snapshot: Snapshot, members: Sequence[Images], block_bytes: int) -> Stripe:
    """The stripe that the images of all members make, in order. Raises UsageError where they do not fit together."""
    world_sizes = {images.world_size for images in members}
    if len(world_sizes) != 1:
        raise UsageError(f"they are of worlds of {sorted(world_sizes)} ranks")
    for images in members:
        for one in images.by_rank.values():
            if len(one.blocks) != DIGEST_CHARS * -(-one.nbytes // block_bytes):
                raise UsageError(f"the image of rank {one.rank} has {len(one.blocks)} characters of digests")
    return Stripe(
        life=snapshot.key[0],
        step=snapshot.key[1],
        world_size=world_sizes.pop(),
        m=snapshot.m,
        block_bytes=block_bytes,
        members=tuple(
            Member(
                node=node,
                ranks=tuple(sorted(images.by_rank)),
                image_bytes=tuple(images.by_rank[rank].nbytes for rank in sorted(images.by_rank)),
            )
            for node, images in zip(snapshot.group, members, strict=True)
        ),
    )
