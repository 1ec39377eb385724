"""The images that this node's agent has in memory, as a store: so that a snapshot in memory is read like any other.

Only where an agent of this job runs already: whoever only reads starts none, and claims nothing.
"""

import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace

from resilient.checkpoint.agent.address import address_of
from resilient.checkpoint.agent.buffers import MappedImage
from resilient.checkpoint.agent.client import AgentClient
from resilient.checkpoint.agent.connection import dial
from resilient.checkpoint.catalog.native import native_catalog
from resilient.checkpoint.formats.folder import Folder
from resilient.checkpoint.formats.native import NativeSource
from resilient.checkpoint.formats.native_records import check_lives
from resilient.checkpoint.formats.source import Reference
from resilient.checkpoint.levels.index_io import make_index
from resilient.checkpoint.levels.store import Store
from resilient.checkpoint.link import hello_of
from resilient.checkpoint.names import image_name, record_name
from resilient.checkpoint.world import World
from resilient.errors import ResilientError, UsageError
from resilient.policy import Policy

__all__ = ["AgentMemory", "MemorySource", "agent_memory"]


class AgentMemory(Store):
    """Read-only. Names are those that the images and records would have on a disk; the bytes are not verified here."""

    url = "memory"

    def __init__(self, client: AgentClient, *, shared: bool = False) -> None:
        """Takes the client over, unless it is `shared`. Raises AgentLost."""
        self._client = client
        self._shared = shared
        self._images = {(one.step, one.world_size, one.rank) for one in client.images()}
        self._mapped: dict[str, MappedImage] = {}
        self._names: dict[str, tuple[int, int, int]] = {}
        for step, size, rank in self._images:
            for name in (image_name(step, rank, size), record_name(step, rank, size)):
                self._names[name] = step, size, rank

    def steps(self) -> dict[int, int]:
        """The steps of which all images are here, and of how many ranks they are."""
        ranks: dict[tuple[int, int], set[int]] = {}
        for step, size, rank in self._images:
            ranks.setdefault((step, size), set()).add(rank)
        return {step: size for (step, size), held in sorted(ranks.items()) if len(held) == size}

    def write(self, name: str, chunks: Iterable[memoryview], *, exclusive: bool = False) -> None:
        raise UsageError(f"{name}: the agent's memory is only read here")

    def delete(self, names: Iterable[str]) -> None:
        raise UsageError("the agent's memory is only read here")

    def list(self, folder: str = "") -> list[str]:
        return sorted(name for name in self._names if name.startswith(f"{folder}/" if folder else ""))

    def size(self, name: str) -> int:
        return self._bytes(name).nbytes

    def read(self, name: str, offset: int, into: memoryview) -> None:
        into[:] = self._bytes(name)[offset : offset + into.nbytes]

    def close(self) -> None:
        for image in self._mapped.values():
            image.close()
        self._mapped = {}
        if not self._shared:
            self._client.close(keep=True)

    def _bytes(self, name: str) -> memoryview:
        if name not in self._names:
            raise FileNotFoundError(name)
        step, size, rank = self._names[name]
        image = image_name(step, rank, size)
        if image not in self._mapped:
            self._mapped[image] = self._client.map_image(rank, step, size)
        mapped = self._mapped[image]
        return mapped.view if name == image else memoryview(mapped.record.text().encode())


class MemorySource(NativeSource):
    """A snapshot in the agent's memory, which must hold all of its images. Verified as any other is."""

    def __init__(self, memory: AgentMemory, step: int, world_size: int) -> None:
        """Takes the memory over. Raises DamagedImage, LevelFailed."""
        self._memory = memory
        try:
            index = make_index(memory, step, range(world_size), world_size)
            check_lives(memory.url, step, {rank: member.life for rank, member in index.members.items()})
            reference = Reference(url=memory.url, format="native", step=step)
            super().__init__(reference, Folder(memory.url), native_catalog(index), memory, index)
        except BaseException:  # the memory was handed over, and nobody else closes it
            memory.close()
            raise

    def close(self) -> None:
        self._memory.close()


def agent_memory(url: str, world: World, policy: Policy) -> AgentMemory | None:
    """The memory of this job's agent on this node; None where there is none, or it does not answer."""
    run_id = policy.run_identity(url, os.environ)
    address = address_of(run_id, url, world.node)
    with suppress(ResilientError, OSError):
        mine = AgentClient.of_this_process(address)
        if mine is not None:
            return AgentMemory(mine, shared=True)
        sock = dial(address.socket)
        if sock is None:
            return None
        sock.close()
        hello = replace(hello_of(run_id, url, world, policy), reads=True)
        client = AgentClient.connect(hello, lambda _: None, lambda _: None)
        return AgentMemory(client)
    return None
