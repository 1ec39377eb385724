"""Which images can still be had, and from whom: directly, or decoded from the rest of their group. Pure.

Every agent that answers gives its `Inventory`. What is not in one of them does not count, so a node that is away, slow
or has started again is as good as lost; one that comes back with old data has them under an older life or step.
Reading what is found is `reader.py`.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from resilient.checkpoint.parity.facts import Json
from resilient.checkpoint.parity.layout import Key, Stripe, layout_of
from resilient.checkpoint.parity.snapshot import Snapshot, State

ImageId = tuple[str, int, int]
"""(life, step, rank)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """A snapshot whose parity is whole, as one of its group knows it; `seals` has `Sealed.seal` of each rank."""

    stripe: Stripe
    seals: Mapping[int, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Inventory:
    """What one agent holds: images (their seals and world sizes), parity shards, and what it knows of its group."""

    node: str
    images: Mapping[ImageId, tuple[str, int]] = field(default_factory=dict)
    parity: Mapping[Key, frozenset[tuple[int, int]]] = field(default_factory=dict)
    known: Mapping[Key, Known] = field(default_factory=dict)

    def to_json(self) -> Json:
        return {
            "node": self.node,
            "images": [[*image_id, seal, size] for image_id, (seal, size) in self.images.items()],
            "parity": [[*key, sorted(shards)] for key, shards in self.parity.items()],
            "known": [[one.stripe.to_json(), list(one.seals.items())] for one in self.known.values()],
        }

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> "Inventory":
        """Raises UsageError, KeyError, TypeError or ValueError."""
        known = [
            Known(stripe=Stripe.from_json(stripe), seals={int(rank): str(seal) for rank, seal in seals})
            for stripe, seals in raw["known"]
        ]
        return cls(
            node=str(raw["node"]),
            images={
                (str(life), int(step), int(rank)): (str(seal), int(size))
                for life, step, rank, seal, size in raw["images"]
            },
            parity={
                (str(life), int(step)): frozenset((int(row), int(j)) for row, j in shards)
                for life, step, shards in raw["parity"]
            },
            known={one.stripe.key: one for one in known},
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Sources:
    """Who has what of one snapshot: the nodes that hold each rank's image, and that keep each (row, parity number)."""

    images: Mapping[int, Sequence[str]]
    parity: Mapping[tuple[int, int], Sequence[str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """How the image of a rank can be had: from `holders` as it is, or decoded from the rest of `stripe` (None: not)."""

    key: Key
    rank: int
    world_size: int
    seal: str
    holders: tuple[str, ...]
    stripe: Stripe | None

    @property
    def reason(self) -> str:
        if self.holders:
            return f"rank {self.rank}: node {self.holders[0]} holds its image"
        return f"rank {self.rank}: its image can be decoded"


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """`action` is "recover" (then `key`, and `images` by rank) or "nothing"."""

    action: str
    reason: str
    key: Key = ("", -1)
    images: Mapping[int, Found] = field(default_factory=dict)


def decide(inventories: Sequence[Inventory], world_size: int) -> Decision:
    """The newest snapshot of a world of this size that all ranks can have: of the latest life, then the latest step."""
    passed: list[Key] = []
    for key in keys_of(inventories):
        images = {rank: find(inventories, key, rank) for rank in range(world_size)}
        there = {rank: one for rank, one in images.items() if one is not None and one.world_size == world_size}
        if len(there) == world_size:
            decoded = [rank for rank, one in there.items() if not one.holders]
            how = f"ranks {decoded} are decoded" if decoded else "all images are held"
            reason = f"step {key[1]} is the newest that all {world_size} ranks can have; {how}"
            if passed:
                reason += f"; newer but not whole: {', '.join(str(step) for _, step in passed[:3])}"
            return Decision(action="recover", key=key, images=there, reason=reason)
        passed.append(key)
    return Decision(action="nothing", reason=f"none of {len(passed)} snapshots can be had for all {world_size} ranks")


def recoverable(inventories: Sequence[Inventory], ranks: Iterable[int]) -> dict[int, list[Found]]:
    """For each rank what can be had of it, the newest first."""
    keys = keys_of(inventories)
    return {rank: [one for key in keys if (one := find(inventories, key, rank)) is not None] for rank in ranks}


def images_of_others(inventories: Sequence[Inventory], world_size: int) -> list[tuple[int, int, int]]:
    """(step, world size, rank) of all images that can be had of jobs of another size."""
    found = set()
    for key in keys_of(inventories):
        sizes = {size for each in inventories for id, (_, size) in each.images.items() if id[:2] == key}
        sizes |= {each.known[key].stripe.world_size for each in inventories if key in each.known}
        for size in sizes - {world_size}:
            found |= {(key[1], size, rank) for rank in range(size) if find(inventories, key, rank) is not None}
    return sorted(found)


def find(inventories: Sequence[Inventory], key: Key, rank: int) -> Found | None:
    """How the image of a rank of a snapshot can be had; None where it cannot."""
    known = _known(inventories, key, rank)
    image_id = (*key, rank)
    seals = Counter(each.images[image_id] for each in inventories if image_id in each.images)
    if known is not None:
        seal, world_size = known.seals[rank], known.stripe.world_size
    elif seals:
        seal, world_size = seals.most_common(1)[0][0]
    else:
        return None
    holders = tuple(each.node for each in inventories if each.images.get(image_id, ("",))[0] == seal)
    stripe = known.stripe if known is not None and _is_decodable(inventories, known, rank) else None
    if not holders and stripe is None:
        return None
    return Found(key=key, rank=rank, world_size=world_size, seal=seal, holders=holders, stripe=stripe)


def inventory_of(
    node: str,
    images: Mapping[ImageId, tuple[str, int]],
    shards: Mapping[Key, Iterable[tuple[int, int]]],
    snapshots: Iterable[Snapshot],
) -> Inventory:
    """What a node says of itself: `shards` whose blocks are all there, and of `snapshots` those that are whole."""
    return Inventory(
        node=node,
        images=images,
        parity={key: frozenset(found) for key, found in shards.items()},
        known={
            each.key: Known(stripe=each.stripe, seals={rank: one.seal for rank, one in each.sealed().items()})
            for each in snapshots
            if each.state is State.WHOLE and each.stripe is not None
        },
    )


def keys_of(inventories: Sequence[Inventory]) -> list[Key]:
    """All snapshots of which anything is there, the newest first."""
    images = {image_id[:2] for each in inventories for image_id in each.images}
    return sorted(images | {key for each in inventories for key in each.known}, reverse=True)


def _known(inventories: Sequence[Inventory], key: Key, rank: int) -> Known | None:
    for each in inventories:
        one = each.known.get(key)
        if one is not None and rank in one.seals:
            return one
    return None


def _is_decodable(inventories: Sequence[Inventory], known: Known, rank: int) -> bool:
    """Whether every row that a rank's image is in has at least k shards elsewhere."""
    stripe, layout = known.stripe, layout_of(known.stripe)
    sources = sources_of(inventories, known)
    held = {other for other, nodes in sources.images.items() if nodes and other != rank}
    for row in {place.row for place in layout.places(rank)}:
        data = sum(ranks <= held for ranks in layout.segment_ranks(row))
        parity = sum(bool(sources.parity[row, j]) for j in range(stripe.m))
        if data + parity < stripe.k:
            return False
    return True


def sources_of(inventories: Sequence[Inventory], known: Known) -> Sources:
    """Whom to read the images and the parity of a stripe from."""
    stripe, layout = known.stripe, layout_of(known.stripe)
    images = {
        rank: [each.node for each in inventories if each.images.get((*stripe.key, rank), ("",))[0] == seal]
        for rank, seal in known.seals.items()
    }
    keeping = {each.node: each.parity.get(stripe.key, frozenset()) for each in inventories}
    parity = {}
    for row in range(stripe.n):
        for j, member in enumerate(layout.keepers(row)):
            node = stripe.members[member].node
            parity[row, j] = [node] if (row, j) in keeping.get(node, ()) else []
    return Sources(images=images, parity=parity)
