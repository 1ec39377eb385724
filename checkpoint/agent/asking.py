"""What a trainer asks of its agent that changes nothing on its own side: one message each, and mostly an answer.

The half of `client.py` without buffers: the fate of a snapshot, images to read, agents of other nodes. Thread-safe.
"""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from resilient.checkpoint.agent.buffers import MappedImage
from resilient.checkpoint.agent.connection import Connection
from resilient.checkpoint.agent.protocol import Message
from resilient.checkpoint.record import Record, parse_record
from resilient.errors import AgentLost, LevelFailed

PEERS_S = 60.0  # for the agents of other nodes to answer, or to be given up


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageInfo:
    """A sealed image in the node's memory. `complete`: the snapshot is known to be complete on all nodes."""

    rank: int
    step: int
    world_size: int
    plan_digest: str
    image_bytes: int
    complete: bool


class Asking:
    """Questions over the connection to the agent, which `AgentClient` opens. `_who` is its rank, for errors."""

    _connection: Connection
    _who: str

    # --- what becomes of a snapshot

    def complete(self, level: str, step: int, life: str | None = None) -> None:
        """The leader's answer to a `node` event: every node has it."""
        self._connection.send("complete", level=level, step=step, life=life)

    def failed(self, level: str, step: int, rank: int | None, reason: str) -> None:
        """A step cannot become complete at a level; for memory also before any slot was begun for it.

        `rank`: whose fault it is; None where it is no single rank's.
        """
        self._connection.send("failed", level=level, step=step, rank=rank, reason=reason)

    def make_durable(self, step: int) -> None:
        """Have this rank's sealed image written to the durable level, where it was not due. Blocks until it is begun.

        Raises LevelFailed when the image is not in memory.
        """
        self._connection.request("write", step=step)

    def flush(self, timeout_s: float) -> list[str]:
        """Wait until none of this rank's writes is pending; what failed since the last flush. Raises LevelFailed."""
        try:
            reply = self._connection.request("flush", within_s=timeout_s)
        except TimeoutError as error:
            raise LevelFailed(f"{self._who}: images are still being written after {timeout_s:g} s") from error
        return [str(failure) for failure in reply["failures"]]

    # --- reading and loading

    def images(self) -> list[ImageInfo]:
        """The sealed images in this node's memory. Blocks. Raises AgentLost."""
        reply = self._connection.request("images")
        return [ImageInfo(**image) for image in reply["images"]]

    def map_image(self, rank: int, step: int, world_size: int | None = None, slot_id: int | None = None) -> MappedImage:
        """A sealed image, to read; with `slot_id` the one in that slot, where there are several of the step.

        It is not recycled before it is closed. Raises LevelFailed if it is not there.
        """
        where = f"the record of rank {rank} at step {step} in memory"

        def take(reply: Message, fds: list[int]) -> MappedImage:
            slot = reply["slot"]
            return MappedImage(parse_record(reply["record"], where), slot, fds[0], lambda: self._unmap(slot))

        wanted = {"rank": rank, "step": step, "world_size": world_size, "slot": slot_id}
        image: MappedImage = self._connection.request("map", take=take, **wanted)
        return image

    def adopt(self, slot_id: int, step: int, record: Record) -> None:
        """Let other ranks map the image that was read, and verified, into a slot. Blocks."""
        self._connection.request("adopt", slot=slot_id, step=step, record=record.text())

    def release(self, slot_id: int) -> None:
        """The image in a scratch slot, or one that was recovered, is not needed any more. Blocks."""
        self._connection.request("release", slot=slot_id)

    def restored(self, slot_id: int) -> None:
        """The training goes on from the image in this slot: the rank's other images are not needed any more. Blocks."""
        self._connection.request("restored", slot=slot_id)

    # --- other nodes

    def token(self) -> str | None:
        """The secret that this agent shares with its peers already; None while it has none. Blocks."""
        return self._connection.request("token")["token"]  # type: ignore[no-any-return]

    def listen(self, node: str, token: str, host: str) -> tuple[str, int]:
        """Have the agent listen for its peers at an address of this node; where it does. Blocks. Raises LevelFailed."""
        reply = self._connection.request("listen", node=node, token=token, host=host)
        return reply["host"], reply["port"]

    def join(
        self,
        members: Sequence[tuple[str, str, int]],
        groups: Sequence[Sequence[int]],
        m: int,
        budget_bytes: int | None = None,
    ) -> None:
        """Tell the agent of all nodes, (name, host, port), and which of them make a parity group. Blocks.

        `budget_bytes`: what parity may take of this node's memory; None: what there is.
        """
        told = [{"node": node, "host": host, "port": port} for node, host, port in members]
        numbers = [list(group) for group in groups]
        self._connection.request("join", members=told, groups=numbers, m=m, budget_bytes=budget_bytes)

    def recoverable(self) -> list[int]:
        """Steps at which this rank's image can be had from other nodes' memory, whole or from parity. Blocks."""
        steps: list[int] = self._connection.request("recoverable", within_s=PEERS_S)["steps"]
        return steps

    def images_of_others(self, world_size: int) -> list[tuple[int, int, int]]:
        """(step, world size, rank) of all images that other nodes have, whole or in parity, of jobs of another size
        than `world_size`. Blocks."""
        reply = self._connection.request("others", within_s=PEERS_S, world_size=world_size)
        return [(step, size, rank) for step, size, rank in reply["images"]]

    def recover(self, step: int, within_s: float, rank: int | None = None, world_size: int | None = None) -> int:
        """Have the agent fetch this rank's image from other nodes, and verify it; the slot that holds it then. Blocks.

        With `rank` and `world_size` that of a rank of a job of another size.
        `release` it if it is not used. Raises LevelFailed or RestoreError where too little of it is left, DamagedImage,
        OverBudget.
        """
        try:
            reply = self._connection.request(
                "recover", within_s=within_s, step=step, image_rank=rank, world_size=world_size
            )
        except TimeoutError as error:
            raise LevelFailed(str(error)) from error
        slot: int = reply["slot"]
        return slot

    # --- the rest

    def status(self) -> dict[str, Any]:
        """What the agent holds and uses: slots, bytes, images, jobs, threads, fds, pid. Blocks."""
        status: dict[str, Any] = self._connection.request("status")
        return status

    def _unmap(self, slot_id: int) -> None:
        with contextlib.suppress(AgentLost):
            self._connection.send("unmap", slot=slot_id)
