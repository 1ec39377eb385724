"""Where the images are that a restore may take: what each rank sees of memory, other nodes and levels, told to all.

The facts for `decide.py`. A level that is out of reach is noted, not raised: others may still serve.
"""

import logging
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from resilient.checkpoint.agent.client import AgentClient, ImageInfo
from resilient.checkpoint.levels.open import open_store
from resilient.checkpoint.levels.store import Store
from resilient.checkpoint.names import complete_steps, records_by_step
from resilient.checkpoint.restore.decide import Facts
from resilient.checkpoint.world import World
from resilient.errors import LevelFailed
from resilient.policy import Policy

_log = logging.getLogger("resilient")


class Lookout:
    """Made and used on the training thread of every rank. `stores`: the levels by name, once `facts` was called."""

    def __init__(
        self,
        client: AgentClient,
        world: World,
        url: str,
        policy: Policy,
        *,
        peers: bool,
        steps: Collection[int] | None,
    ) -> None:
        """`peers`: the agents of other nodes can be asked for images. `steps`: no others count; None: all do."""
        self._client = client
        self._world = world
        self._policy = policy
        self._urls = {"durable": url} | ({} if policy.local is None else {"local": policy.local})
        self._peers = peers
        self._steps = steps
        self.stores: dict[str, Store] = {}

    def facts(self) -> list[Facts]:
        """Where every rank's images are. Only rank 0 lists the durable level, for all. Collective."""
        world = self._world
        rows = world.gather_results(self._look)
        durable = dict(rows[0]["durable"])
        ours = tuple(step for step, size in durable.items() if size == world.world_size)
        others = {step: size for step, size in durable.items() if size != world.world_size}
        facts = [
            Facts(
                rank=rank,
                steps={**{level: tuple(row[level]) for level in ("memory", "parity", "local")}, "durable": ours},
                other_worlds=others,
                others=tuple((step, size, other, level) for step, size, other, level in row["others"]),
                unseen=tuple(row["unseen"]),
            )
            for rank, row in enumerate(rows)
        ]
        return facts if self._steps is None else [one.only(self._steps) for one in facts]

    def _look(self) -> dict[str, Any]:
        """What this rank can see: steps in memory and on the local level, and on rank 0 what is durable."""
        rank, size = self._world.rank, self._world.world_size
        self.stores = {level: open_store(url, retries=self._policy.retries) for level, url in self._urls.items()}
        images = self._client.images()
        unseen: list[str] = []
        local = records_by_step(self._names("local", unseen))
        durable = complete_steps(self._names("durable", unseen)) if rank == 0 else {}
        return {
            "memory": sorted({image.step for image in images if (image.rank, image.world_size) == (rank, size)}),
            "parity": self._recoverable(unseen),
            "local": [step for step, sizes in local.items() if rank in sizes.get(size, ())],
            "durable": list(durable.items()),
            "others": self._others(images, local, unseen),
            "unseen": unseen,
        }

    def _others(
        self, images: Sequence[ImageInfo], local: Mapping[int, Mapping[int, set[int]]], unseen: list[str]
    ) -> list[tuple[int, int, int, str]]:
        """(step, world size, rank, level) of the images of jobs of other sizes that this rank can reach."""
        size = self._world.world_size
        found = [(each.step, each.world_size, each.rank, "memory") for each in images]
        found += [
            (step, other, rank, "local")
            for step, sizes in local.items()
            for other, ranks in sizes.items()
            for rank in sorted(ranks)
        ]
        try:
            if self._peers and self._world.rank == self._world.node_ranks[0]:
                found += [(*each, "parity") for each in self._client.images_of_others(size)]
        except (LevelFailed, TimeoutError) as error:
            unseen.append(f"rank {self._world.rank}: {error}")
        return [each for each in found if each[1] != size]

    def _recoverable(self, unseen: list[str]) -> list[int]:
        """The steps at which this rank's image can be had from other nodes."""
        try:
            return self._client.recoverable() if self._peers else []
        except (LevelFailed, TimeoutError) as error:
            unseen.append(f"rank {self._world.rank}: {error}")
            _log.warning("rank %d: other nodes cannot be asked for images: %s", self._world.rank, error)
            return []

    def _names(self, level: str, unseen: list[str]) -> list[str]:
        """What a level lists. One that is out of reach is noted, for the others may still serve."""
        try:
            return self.stores[level].list() if level in self.stores else []
        except LevelFailed as error:
            unseen.append(f"rank {self._world.rank}: {error}")
            _log.warning("rank %d: level %s cannot be looked at: %s", self._world.rank, level, error)
            return []
