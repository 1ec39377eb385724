"""Nodes of one process: the real service on each, with images in plain memory, joined by the transport in memory."""

import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np

from resilient.checkpoint.digest import BLOCK_BYTES, digest
from resilient.checkpoint.names import image_name
from resilient.checkpoint.parity.layout import Key
from resilient.checkpoint.parity.scrub import Finding
from resilient.checkpoint.parity.service import ParityService
from resilient.checkpoint.peers.memory import Network
from resilient.checkpoint.peers.transport import Address
from resilient.checkpoint.record import Record
from resilient.errors import LevelFailed

ImageId = tuple[str, int, int]


def image_of(life: str, step: int, rank: int, nbytes: int) -> bytearray:
    seed = [step, rank, *life.encode()]
    return bytearray(np.random.default_rng(seed).integers(0, 256, nbytes, dtype=np.uint8).tobytes())


def record_for(life: str, step: int, rank: int, world_size: int, data: bytearray) -> Record:
    blocks = [bytes(data[at : at + BLOCK_BYTES]) for at in range(0, len(data), BLOCK_BYTES)]
    return Record(
        run_id="run",
        life=life,
        step=step,
        rank=rank,
        world_size=world_size,
        plan_digest="plan",
        image_name=image_name(step, rank, world_size),
        image_bytes=len(data),
        blocks=tuple(digest(block) for block in blocks),
        pieces_text=f'[{{"rank":{rank}}}]',
        software={"torch": "x"},
    )


class FakeNode:
    """An agent with images in plain memory. `heard` has what on_parity was told; calls run on a thread of its own."""

    def __init__(self, network: Network, name: str, agent_id: str, *, scrub_bytes_per_s: float | None = None) -> None:
        self.name = name
        self._agent_id = agent_id
        self._network = network
        self.images: dict[ImageId, tuple[bytearray, Record]] = {}
        self.heard: dict[Key, str | None] = {}
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._loop = threading.Thread(target=self._run, name=f"loop-{name}", daemon=True)
        self._loop.start()
        self.transport = network.join(name, self)
        self.findings: list[Finding] = []
        self.service = ParityService(
            name, self, self.transport, scrub_bytes_per_s=scrub_bytes_per_s, on_damage=self.findings.append
        )
        self.answer = self.service.answer
        self.lend = self.service.lend
        self.take = self.service.take

    @property
    def agent_id(self) -> str:
        return self._agent_id

    @contextmanager
    def lend_image(self, life: str, step: int, rank: int) -> Iterator[memoryview]:
        if (life, step, rank) not in self.images:
            raise LevelFailed(f"node {self.name} has no image of rank {rank} at step {step}")
        yield memoryview(self.images[life, step, rank][0]).toreadonly()

    def mend_image(self, life: str, step: int, rank: int, offset: int, block: memoryview) -> None:
        self.images[life, step, rank][0][offset : offset + block.nbytes] = block

    def inventory(self) -> list[Record]:
        return [record for _, record in list(self.images.values())]

    def post(self, call: Callable[[], None]) -> None:
        self._calls.put(call)

    def on_parity(self, life: str, step: int, error: str | None) -> None:
        self.heard[life, step] = error

    def call(self, call: Callable[[], None]) -> None:
        """Run a call on the loop and wait for it."""
        done = threading.Event()

        def run() -> None:
            call()
            done.set()

        self.post(run)
        assert done.wait(20)

    def seal(self, life: str, step: int, world_size: int, images: dict[int, bytearray]) -> None:
        records = {rank: record_for(life, step, rank, world_size, data) for rank, data in images.items()}
        for rank, data in images.items():
            self.images[life, step, rank] = data, records[rank]
        self.call(lambda: self.service.sealed(life, step, world_size, records))

    def drop(self, life: str, step: int) -> None:
        for image_id in [each for each in self.images if each[:2] == (life, step)]:
            del self.images[image_id]
        self.call(lambda: self.service.dropped(life, step))

    def stop(self) -> None:
        self.transport.close()
        self.service.close()
        self._calls.put(None)
        self._loop.join(20)

    def _run(self) -> None:
        while (call := self._calls.get()) is not None:
            call()


class Cluster:
    """`nodes[name]` are those that live. `kill` and `start` again as they like; `stop` in the end."""

    def __init__(self) -> None:
        self.network = Network()
        self.nodes: dict[str, FakeNode] = {}
        self._starts = 0
        self._all: list[FakeNode] = []

    def start(self, name: str, *, scrub_bytes_per_s: float | None = None) -> FakeNode:
        self._starts += 1
        node = FakeNode(self.network, name, f"agent{self._starts}", scrub_bytes_per_s=scrub_bytes_per_s)
        self.nodes[name] = node
        self._all.append(node)
        return node

    def configure(self, m: int, budget_bytes: int | None = None) -> None:
        """All living nodes are one group."""
        names = sorted(self.nodes)
        for node in self.nodes.values():
            self.configure_one(node, names, m, budget_bytes)

    def configure_one(self, node: FakeNode, names: list[str], m: int, budget_bytes: int | None = None) -> None:
        node.transport.set_peers({name: Address(name, 1) for name in names if name != node.name})
        node.call(lambda: node.service.configure(names, m, budget_bytes=budget_bytes))

    def kill(self, name: str) -> None:
        self.nodes.pop(name).stop()

    def seal(self, life: str, step: int, sizes: dict[str, dict[int, int]]) -> dict[int, bytearray]:
        """Images of these sizes by node and rank, sealed on all nodes. Gives back a copy of each."""
        world_size = sum(len(images) for images in sizes.values())
        made = {
            name: {rank: image_of(life, step, rank, nbytes) for rank, nbytes in images.items()}
            for name, images in sizes.items()
        }
        for name, images in made.items():
            self.nodes[name].seal(life, step, world_size, images)
        return {rank: bytearray(data) for images in made.values() for rank, data in images.items()}

    def heard(self, key: Key) -> list[str | None]:
        """What all nodes have been told of a snapshot; shorter than their number while some have not."""
        return [node.heard[key] for node in list(self.nodes.values()) if key in node.heard]

    def all_whole(self, key: Key) -> bool:
        return self.heard(key) == [None] * len(self.nodes)

    def stop(self) -> None:
        for node in self._all:
            node.stop()
