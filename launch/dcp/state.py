"""A flattened state dict as an item of a Checkpointer's state: tensors under their own names, the rest as objects.

DTensors are cut as they are. Plain tensors of one name are replicas, as DCP has it, and are shared out among the ranks
that have them. What belongs to no rank alone (which objects there are, and on which rank) every rank saves.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor

from resilient.checkpoint.digest import digest
from resilient.checkpoint.leaves import Leaf, Leaves
from resilient.checkpoint.objects import encode
from resilient.checkpoint.provided import Provided, Saved, Wanted
from resilient.checkpoint.unsavable import refuse_tensor
from resilient.checkpoint.world import World
from resilient.errors import StateError

__all__ = ["ITEM", "Content", "StateDict", "content_of"]

ITEM = "dcp"


@dataclass(frozen=True, slots=True, eq=False)
class Content:
    """One state dict, by flattened name. `ranks`: of plain tensors those that have them; `where`: of objects the first
    rank that has them; `paths`: the keys that lead to each."""

    tensors: Mapping[str, Tensor]
    objects: Mapping[str, Any]
    ranks: Mapping[str, tuple[int, ...]]
    where: Mapping[str, int]
    paths: Mapping[str, Sequence[Any]]


def content_of(world: World, flat: Mapping[str, Any], paths: Mapping[str, Sequence[Any]]) -> Content:
    """Sort a state dict, and agree on who has what. Collective. Raises StateError, on all ranks."""
    tensors = {name: value.detach() for name, value in flat.items() if isinstance(value, Tensor)}
    objects = {name: value for name, value in flat.items() if name not in tensors}
    plain = {name: one for name, one in tensors.items() if not isinstance(one, DTensor)}

    def described() -> list[Any]:
        for name, value in flat.items():
            if hasattr(value, "local_shards"):
                raise StateError(
                    f"{name!r} cannot be saved: a ShardedTensor; shard with fully_shard, or make it a DTensor"
                )
        encode(objects, ITEM)
        return [[[name, str(one.dtype), list(one.shape)] for name, one in plain.items()], list(objects)]

    mine = world.together(described, StateError)
    ours = digest(repr(sorted(map(repr, mine[0])) + sorted(mine[1])).encode())
    if len(set(world.gather(ours))) == 1:
        everybody = tuple(range(world.world_size))
        return Content(tensors, objects, dict.fromkeys(plain, everybody), dict.fromkeys(objects, 0), paths)
    rows = world.gather(mine)
    having: dict[tuple[str, str, tuple[int, ...]], list[int]] = {}
    where: dict[str, int] = {}
    for rank, (theirs, names) in enumerate(rows):
        for name, dtype, shape in theirs:
            having.setdefault((name, dtype, tuple(shape)), []).append(rank)
        for name in names:
            where.setdefault(name, rank)
    ranks = {name: tuple(having[name, str(one.dtype), tuple(one.shape)]) for name, one in plain.items()}
    return Content(tensors, objects, ranks, where, paths)


class StateDict(Provided):
    """What is to be saved next: another content each time."""

    def __init__(self) -> None:
        self.content = Content({}, {}, {}, {}, {})

    def walk(self, found: Leaves, item: str) -> None:
        found.watch.add_keys(self.__dict__, ("content",))
        for name, tensor in self.content.tensors.items():
            refuse_tensor(name, tensor)
            local = tensor
            if isinstance(tensor, DTensor):
                place = found.place(tensor)
                box, replicas, group, local = place.box, place.replicas, place.group, tensor._local_tensor
            else:
                box = found.whole(tensor.shape)
                replicas = group = self.content.ranks[name]
            found.add(
                Leaf(key=name, kind="tensor", tensor=tensor, local=local, box=box, replicas=replicas, group=group)
            )

    def capture(self) -> object:
        content = self.content
        return {
            "values": dict(content.objects),
            "where": dict(content.where),
            "paths": {name: list(path) for name, path in content.paths.items()},
        }

    def propose(self, found: Leaves, item: str, saved: Saved) -> Wanted:
        return Wanted(())  # reading is the reader's business

    def apply(self, value: Any, groups: Sequence[Sequence[str]], found: Leaves, item: str) -> list[str]:
        return []
