"""The nodes of a parity group as `bench/parity.py` measures them: one process each, without trainers.

`AgentNode` is what an agent has for its parity level (the real service and transport) over one image in memory.
`RawSockets` is the limit: plain `sendall` into `recv_into`, a connection and two threads for each pair of nodes between
which bytes flow, from the same images into as many buffers as ours has.
"""

import contextlib
import secrets
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from resilient.checkpoint.agent.memory import Memory, prefault, private_memory
from resilient.checkpoint.digest import BLOCK_BYTES, block_count, block_range, digest
from resilient.checkpoint.parity.gather import AHEAD
from resilient.checkpoint.parity.layout import Layout, Member, Stripe, layout_of
from resilient.checkpoint.parity.service import ParityService
from resilient.checkpoint.peers.tcp import TcpTransport
from resilient.checkpoint.peers.transport import Address
from resilient.checkpoint.record import Record
from resilient.errors import LevelFailed

HOST = "127.0.0.1"
LIFE = "life"
Flows = Mapping[tuple[int, int], int]
"""Bytes from one node to another."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """k + m nodes of one rank each, all with images of one size."""

    k: int
    m: int
    image_bytes: int

    @property
    def n(self) -> int:
        return self.k + self.m

    @property
    def nodes(self) -> list[str]:
        return [f"node{number}" for number in range(self.n)]

    def layout(self) -> Layout:
        members = tuple(
            Member(node=node, ranks=(rank,), image_bytes=(self.image_bytes,)) for rank, node in enumerate(self.nodes)
        )
        stripe = Stripe(life=LIFE, step=0, world_size=self.n, m=self.m, block_bytes=BLOCK_BYTES, members=members)
        return layout_of(stripe)


def encoding_flows(group: Group) -> Flows:
    """What protecting one snapshot moves: the data of each row to its primary, parities from there to their keepers."""
    layout = group.layout()
    flows: Counter[tuple[int, int]] = Counter()
    for row in range(group.n):
        primary, *others = layout.keepers(row)
        for number in range(layout.blocks(row)):
            for block in layout.shards(row, number):
                flows[block.member, primary] += block.nbytes
            for keeper in others:
                flows[primary, keeper] += layout.nbytes(row, number)
    return dict(flows)


def recovery_flows(group: Group, lost: int) -> Flows:
    """What decoding the image of a lost node moves to it: k shards of each row block that it has data in."""
    layout = group.layout()
    flows: Counter[tuple[int, int]] = Counter()
    for place in layout.places(lost):
        others = [block for block in layout.shards(place.row, place.number) if block.member != lost]
        for block in others:
            flows[block.member, lost] += block.nbytes
        for keeper in layout.keepers(place.row)[: group.k - len(others)]:
            flows[keeper, lost] += layout.nbytes(place.row, place.number)
    return dict(flows)


def random_image(nbytes: int, seed: int) -> Memory:
    """Memory as an agent holds images in."""
    memory = Memory(nbytes, f"bench-{seed}")
    pattern = torch.randint(256, (nbytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    torch.frombuffer(memory.view, dtype=torch.uint8).copy_(pattern)
    return memory


class AgentNode:
    """The parity level of one node. `fresh`: a node that has lost its image, and whose memory is still untouched."""

    def __init__(self, group: Group, rank: int, image: Memory | None, host: str = HOST) -> None:
        self.agent_id = secrets.token_hex(16)
        self._group = group
        self._rank = rank
        self._image = image
        self._blocks: tuple[str, ...] = ()
        if image is not None:
            ranges = [block_range(number, group.image_bytes) for number in range(block_count(group.image_bytes))]
            self._blocks = tuple(digest(image.view[start:stop]) for start, stop in ranges)
        self._records: dict[int, Record] = {}
        self._whole = threading.Event()
        self._error: str | None = None
        self._transport = TcpTransport(group.nodes[rank], "the token of a benchmark", self, host=host)
        self._transport.start()
        self._service = ParityService(group.nodes[rank], self, self._transport)

    def meet(self) -> None:
        """Tell one another where to listen. All ranks call it."""
        addresses: list[Any] = [None] * self._group.n
        dist.all_gather_object(addresses, tuple(self._transport.address))
        peers = zip(self._group.nodes, addresses, strict=True)
        mine = self._group.nodes[self._rank]
        self._transport.set_peers({node: Address(*address) for node, address in peers if node != mine})
        self._service.configure(self._group.nodes, self._group.m)
        dist.barrier()

    def protect(self, step: int) -> None:
        """Seal the image as that of `step`, and wait until its parity is whole: on return this node knows it."""
        self._whole.clear()
        self._records = {step: self._record(step)}
        self._service.sealed(LIFE, step, self._group.n, {self._rank: self._records[step]})
        self._whole.wait()
        if self._error is not None:
            raise LevelFailed(self._error)

    def keep_only(self, step: int) -> None:
        self._service.keep({(LIFE, step)})

    def recover(self, step: int, room: Callable[[int], memoryview]) -> None:
        """This node's image of a step, from what the others have, into `room(its size)`."""
        self._service.recover(self._rank, step, room)

    def close(self) -> None:
        self._transport.close()
        self._service.close()

    def _record(self, step: int) -> Record:
        return Record(
            run_id="bench",
            life=LIFE,
            step=step,
            rank=self._rank,
            world_size=self._group.n,
            plan_digest="plan",
            image_name=f"image-{step}",
            image_bytes=self._group.image_bytes,
            blocks=self._blocks,
            pieces_text="[]",
            software={},
        )

    # --- what the service asks of its agent

    @contextlib.contextmanager
    def lend_image(self, life: str, step: int, rank: int) -> Iterator[memoryview]:
        if self._image is None or step not in self._records:
            raise LevelFailed(f"no image of step {step}")
        yield self._image.view

    def mend_image(self, life: str, step: int, rank: int, offset: int, block: memoryview) -> None:
        raise LevelFailed("nothing is damaged here")

    def inventory(self) -> list[Record]:
        return list(self._records.values())

    def post(self, call: Callable[[], None]) -> None:
        call()

    def on_parity(self, life: str, step: int, error: str | None) -> None:
        self._error = error
        self._whole.set()

    # --- what peers ask

    def answer(self, peer: str, message: dict[str, Any]) -> dict[str, Any]:
        return self._service.answer(peer, message)

    def lend(self, peer: str, name: str, offset: int, nbytes: int) -> contextlib.AbstractContextManager[memoryview]:
        return self._service.lend(peer, name, offset, nbytes)

    def take(self, peer: str, name: str, offset: int, nbytes: int) -> contextlib.AbstractContextManager[memoryview]:
        return self._service.take(peer, name, offset, nbytes)


def new_memory(nbytes: int) -> memoryview:
    """Memory for an image, made as agents make it: another thread makes its pages, from the first on."""
    view = Memory(nbytes, "bench-new").view
    threading.Thread(target=prefault, args=(view, lambda: False), daemon=True).start()
    return view


class RawSockets:
    """Moves the same bytes between the same nodes at the same time. Connected once, by all ranks together."""

    def __init__(self, flows: Flows, rank: int, image: Memory, host: str = HOST) -> None:
        self._image = image.view
        self._sending = {to: nbytes for (sender, to), nbytes in flows.items() if sender == rank}
        self._receiving = {sender: nbytes for (sender, to), nbytes in flows.items() if to == rank}
        self._buffers = {sender: private_memory(AHEAD * BLOCK_BYTES) for sender in self._receiving}
        self._socks = _connect(rank, host, list(self._sending), list(self._receiving))

    def move(self, room: Callable[[int], memoryview] | None = None, nbytes: int = 0) -> None:
        """Send and receive everything once; returns when this node has.

        The first `nbytes` that it receives go into `room(nbytes)`, an equal part from each sender; all else, as
        everything without `room`, into buffers.
        """
        count = len(self._receiving)
        part = nbytes // count // BLOCK_BYTES * BLOCK_BYTES if count else 0
        kept = room(nbytes) if room is not None and count else memoryview(b"")
        parts = [kept[number * part : (number + 1) * part] for number in range(count)]
        threads = [threading.Thread(target=self._send, args=(to,)) for to in self._sending]
        threads += [
            threading.Thread(target=self._receive, args=(sender, into))
            for sender, into in zip(self._receiving, parts, strict=True)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def close(self) -> None:
        for sock in self._socks.values():
            sock.close()

    def _send(self, to: int) -> None:
        for data in _walk(self._image, self._sending[to]):
            self._socks["to", to].sendall(data)

    def _receive(self, sender: int, kept: memoryview) -> None:
        sock, nbytes = self._socks["from", sender], self._receiving[sender]
        for into in (*_walk(kept, kept.nbytes), *_walk(self._buffers[sender], nbytes - kept.nbytes)):
            left = into
            while left.nbytes:
                left = left[sock.recv_into(left, 0, socket.MSG_WAITALL) :]


def _walk(memory: memoryview, nbytes: int) -> Iterator[memoryview]:
    """So many bytes of memory, by blocks, from the beginning again after its last whole block."""
    length = max(BLOCK_BYTES, memory.nbytes // BLOCK_BYTES * BLOCK_BYTES)
    for begin in range(0, nbytes, BLOCK_BYTES):
        yield memory[begin % length :][: min(BLOCK_BYTES, nbytes - begin)]


def _connect(rank: int, host: str, sending: list[int], receiving: list[int]) -> dict[tuple[str, int], socket.socket]:
    """A connection for each flow, by direction and node."""
    socks: dict[tuple[str, int], socket.socket] = {}
    with socket.create_server((host, 0), backlog=64) as listening:
        addresses: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(addresses, listening.getsockname())
        for to in sending:
            socks["to", to] = socket.create_connection(addresses[to])
            socks["to", to].sendall(bytes([rank]))
        for _ in receiving:
            sock = listening.accept()[0]
            socks["from", sock.recv(1)[0]] = sock
        dist.barrier()
    return socks
