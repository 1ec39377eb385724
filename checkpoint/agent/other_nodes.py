"""What trainers ask of the agents of other nodes, through their own: who they are, and which images they have.

Everything runs on the loop; where nodes have to be asked, a thread of `protecting.py` does it, and the reply comes
later.
"""

from collections.abc import Callable
from typing import Protocol

from resilient.checkpoint.agent.images import Images
from resilient.checkpoint.agent.protecting import Member, Protecting
from resilient.checkpoint.agent.protocol import Message, ProtocolError, error_reply, text, whole, wholes
from resilient.checkpoint.agent.session import Session
from resilient.checkpoint.peers.transport import Address
from resilient.checkpoint.record import Record
from resilient.errors import DamagedImage, LevelFailed, OverBudget, ResilientError
from resilient.policy import Policy

Answer = tuple[Message, list[int]]
NOTHING: Answer = ({}, [])


class Node(Protocol):
    """What is used here of `node.Node`."""

    policy: Policy | None
    images: Images
    protecting: Protecting

    def settle(self) -> None: ...


class OtherNodes:
    """The operations; `operations()` by name."""

    def __init__(self, node: Node) -> None:
        self._node = node

    def operations(self) -> dict[str, Callable[[Session, Message], Answer | None]]:
        return {
            "token": lambda _session, _message: ({"token": self._node.protecting.token}, []),
            "listen": self._listen,
            "join": self._join,
            "recoverable": self._recoverable,
            "others": self._others,
            "recover": self._recover,
        }

    def _listen(self, session: Session, message: Message) -> Answer:
        assert self._node.policy is not None
        node, token, host = (text(message, key) for key in ("node", "token", "host"))
        address = self._node.protecting.listen(node, token, host, self._node.policy)
        return {"host": address.host, "port": address.port}, []

    def _join(self, session: Session, message: Message) -> Answer:
        raw, groups = message.get("members"), message.get("groups")
        if not isinstance(raw, list) or not isinstance(groups, list):
            raise ProtocolError("members or groups are no lists")
        members = [Member(text(each, "node"), Address(text(each, "host"), whole(each, "port"))) for each in raw]
        numbers = [wholes({"group": group}, "group") for group in groups]
        if any(number >= len(members) for group in numbers for number in group):
            raise ProtocolError("a group has members that there are not")
        budget_bytes = whole(message, "budget_bytes") if message.get("budget_bytes") is not None else None
        self._node.protecting.join(members, numbers, whole(message, "m"), budget_bytes)
        return NOTHING

    def _recoverable(self, session: Session, message: Message) -> None:
        request_id = whole(message, "id")
        self._node.protecting.recoverable(
            rank_of(session),
            lambda steps: session.send({"id": request_id, "ok": True, "steps": steps}),
            lambda error: session.send(error_reply(request_id, error)),
        )

    def _others(self, session: Session, message: Message) -> None:
        request_id = whole(message, "id")
        self._node.protecting.images_of_others(
            whole(message, "world_size"),
            lambda found: session.send({"id": request_id, "ok": True, "images": [list(one) for one in found]}),
            lambda error: session.send(error_reply(request_id, error)),
        )

    def _recover(self, session: Session, message: Message) -> None:
        """Into a scratch slot, which is adopted: the trainer maps it as it maps any image."""
        rank, step, request_id = rank_of(session), whole(message, "step"), whole(message, "id")
        image_rank = whole(message, "image_rank") if message.get("image_rank") is not None else rank
        world_size = whole(message, "world_size") if message.get("world_size") is not None else None

        def make_room(nbytes: int) -> tuple[int, memoryview]:
            if session.closed or self._node.policy is None:
                raise LevelFailed(f"the trainer of rank {rank} is gone")
            return self._node.images.room(rank, nbytes, self._node.policy.budget_bytes(nbytes))

        def done(slot: int, record: Record) -> None:
            self._node.images.leave_room(rank, slot, keep=not session.closed)
            if not session.closed:
                self._node.images.adopt(rank, slot, step, record.text())
                session.send({"id": request_id, "ok": True, "slot": slot})
            self._node.settle()

        def failed(slot: int, error: ResilientError) -> None:
            if slot:
                self._node.images.leave_room(rank, slot, keep=False)
            said = error if isinstance(error, OverBudget | DamagedImage) else LevelFailed(str(error))
            session.send(error_reply(request_id, said))
            self._node.settle()

        self._node.protecting.recover(image_rank, step, world_size, make_room, done, failed)


def rank_of(session: Session) -> int:
    """The rank that said hello on this connection."""
    assert session.rank is not None
    return session.rank
