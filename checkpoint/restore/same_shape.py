"""What a job needs of a snapshot that is cut as itself: no rank reads, or is told of, every record.

Each rank has the record of its own image. Of what other images have it is told only what it may need, by who has it:
what several ranks hold together (`offers`: replicas, an optimizer's counters), and of a sharded model that is next to
nothing. Should that not be all (the live state is another than the one that was saved), every rank tells all of what is
not its own, and what fits then, or does not, is as if all records had been read. Collective; nothing is overwritten.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from resilient.checkpoint.leaves import Leaf, Leaves
from resilient.checkpoint.pieces import Piece
from resilient.checkpoint.restore.images import Image, Stored, stored_pieces
from resilient.checkpoint.restore.load import Catalog, CutOtherwise, Proposal, propose
from resilient.checkpoint.world import World
from resilient.errors import LayoutMismatch

Raw = Mapping[str, Any]
"""An entry of a record's `pieces`."""
Offers = dict[tuple[int, ...], list[Raw]]
"""What a rank tells others of its image: by the ranks to tell, none of them named where it is all."""


def agreed_proposal(world: World, image: Image, state: Mapping[str, object], found: Leaves) -> tuple[Proposal, int]:
    """What every rank is to fill, and of how many images this rank knows the pieces. Collective.

    `cut_otherwise` is set where this rank's state is cut at other places. Raises LayoutMismatch, on all ranks.
    """
    proposal, told = _attempt(world, image, state, found, offers(image, found, world.rank, world.world_size))
    if any(world.gather(proposal is None)):
        proposal, told = _attempt(world, image, state, found, {(): _shared(image)})
    assert proposal is not None, "what does not fit was raised, for all had been told"
    return proposal, 1 + told


def offers(image: Image, found: Leaves, rank: int, world_size: int) -> Offers:
    """What other ranks may need of this rank's image, and who. `found`: the live state, which the ranks share.

    A piece is kept back only where it is sure that nobody wants it: where this rank alone holds that box now.
    """
    leaves = found.by_key()
    made = {(key, name) for value in image.objects.values() for key, name in _made(value)}
    told: Offers = {}
    for raw in _shared(image):
        leaf = leaves.get(raw["key"])
        if leaf is None and (raw.get("parameter"), raw.get("name")) not in made:
            leaf = leaves.get(raw.get("parameter", ""))  # state that this job has not made yet lies as its parameter
        targets = _targets(raw, leaf, rank)
        if leaf is None or leaf.key in found.provided or targets is None or len(set(targets) | {rank}) == world_size:
            told.setdefault((), []).append(raw)
        elif targets != (rank,):
            told.setdefault(targets, []).append(raw)
    return told


def _targets(raw: Raw, leaf: Leaf | None, rank: int) -> tuple[int, ...] | None:
    """The ranks that may need a piece; None where that cannot be said."""
    if leaf is None or rank not in leaf.group:
        return None
    saved = Piece.box(tuple(raw["shape"]), tuple(raw["offsets"]), tuple(raw["sizes"]))
    return leaf.replicas if saved.same_box(leaf.box) and rank in leaf.replicas else leaf.group


def _shared(image: Image) -> list[Raw]:
    return [raw for raw in image.raw_pieces if "nbytes" in raw and not raw["own"]]


def _made(value: Any) -> Iterable[tuple[str, str]]:
    """Parameter and name of the optimizer's state that does not lie as its parameter does."""
    made = value.get("made", {}) if isinstance(value, dict) and "param_groups" in value else {}
    return [(key, name) for key, names in made.items() for name in names]


def _attempt(
    world: World, image: Image, state: Mapping[str, object], found: Leaves, told: Offers
) -> tuple[Proposal | None, int]:
    """The proposal as far as is known; None where something was not found, but not all has been told."""
    heard = _heard(world, told, image.data_start)
    pieces = image.pieces() + heard
    everything = len(told.get((), [])) == len(_shared(image))

    def proposed() -> Proposal | None:
        try:
            return propose(state, found, Catalog(pieces, world.rank), image.objects)
        except CutOtherwise:
            return Proposal(cut_otherwise=True)
        except LayoutMismatch:
            if all_told:
                raise
            return None

    all_told = all(world.gather(everything))
    return world.together(proposed), len({piece.image_rank for piece in heard})


def _heard(world: World, told: Offers, data_start: int) -> list[Stored]:
    """What others tell this rank of their images. Collective."""
    if world.group is None:
        return []
    messages = {targets: json.dumps([data_start, raws]).encode() for targets, raws in told.items() if raws}
    to_all = messages.pop((), b"")
    lengths = world.gather([len(to_all), bool(messages)])
    found: list[Stored] = []
    for rank, (length, _) in enumerate(lengths):
        if length:  # one after the other, so that nobody holds room for as many as the longest
            room = torch.frombuffer(bytearray(to_all if rank == world.rank else length), dtype=torch.uint8)
            world.broadcast(room, rank)
            found += _parsed(room.numpy().tobytes(), rank, world.rank)
    if any(some for _, some in lengths):
        for rank, data in enumerate(world.exchange(_by_rank(messages, world.world_size))):
            for message in filter(None, data.split(b"\n")):
                found += _parsed(message, rank, world.rank)
    return found


def _by_rank(messages: Mapping[tuple[int, ...], bytes], world_size: int) -> Sequence[bytes]:
    parts: list[list[bytes]] = [[] for _ in range(world_size)]
    for targets, message in messages.items():
        for rank in targets:
            parts[rank].append(message)
    return [b"\n".join(part) for part in parts]


def _parsed(message: bytes, rank: int, mine: int) -> list[Stored]:
    if rank == mine:
        return []
    begins, raws = json.loads(message)
    return stored_pieces(raws, rank, begins)
