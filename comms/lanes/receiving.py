"""What a rank has been sent: into the buffers that were posted for it, once each, in whatever order it comes.

Chunks that nobody waits for yet are kept, up to a bound; beyond it their connection is not read, so the sender's stops.
Messages between two ranks know no bound: what is asked for first may stand behind one that is asked for last.
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from resilient.comms.lanes.connection import Connection
from resilient.comms.lanes.messages import POINT_TO_POINT, Receive
from resilient.comms.lanes.spans import Spans
from resilient.comms.lanes.wire import Header

MOST_EARLY = 1 << 26  # bytes
_REMEMBERED = 4096  # messages that are whole

Key = tuple[int, int, int]  # operation, source, tag


@dataclass(slots=True)
class _Posted:
    into: Spans
    done: Callable[[], None]
    got: set[int] = field(default_factory=set)
    left: int = 0


class TooLong(Exception):
    """A chunk lies outside of the buffer that was posted for it. Never leaves this package."""


class Receiver:
    """Owned by the lanes' thread."""

    def __init__(self) -> None:
        self._posted: dict[Key, _Posted] = {}
        self._early: dict[Key, dict[int, bytearray]] = {}
        self._coming: dict[Connection, bytearray] = {}  # chunks that had no place when they began to come
        self._early_bytes = 0
        self._posts = 0
        self._whole: OrderedDict[Key, None] = OrderedDict()

    def sources(self) -> set[int]:
        """The ranks that something is still expected from."""
        return {source for _, source, _ in self._posted}

    def post(self, operation: int, receive: Receive, done: Callable[[], None]) -> None:
        """Raises TooLong when what came already does not fit."""
        self._posts += 1
        if self._posts % _REMEMBERED == 0:
            self._forget_strays(operation)
        key = (operation, receive.source, receive.tag)
        posted = self._posted[key] = _Posted(receive.into, done, left=len(receive.into))
        for offset, content in self._early.pop(key, {}).items():
            self._early_bytes -= len(content)
            self._copy(key, posted, offset, content)
        if not posted.left and key in self._posted:
            self._finish(key, posted)

    def place(self, connection: Connection, header: Header) -> memoryview | None:
        """Where a chunk's bytes go; None: nowhere yet. Raises TooLong."""
        key = (header.operation, connection.peer, header.tag)
        posted = self._posted.get(key)
        if posted is not None:
            _inside(posted, header.offset, header.length)
            if header.offset not in posted.got:
                lying = posted.into.lies(header.offset, header.offset + header.length)
                return lying if lying is not None else self._aside(connection, header)
        elif key not in self._whole and header.offset not in self._early.get(key, {}):
            if header.operation < POINT_TO_POINT and self._early_bytes + header.length > MOST_EARLY:
                return None
            return self._aside(connection, header)
        return memoryview(bytearray(header.length))  # it is here already

    def _aside(self, connection: Connection, header: Header) -> memoryview:
        """What has no place of its own, or several, is kept until it is whole."""
        self._coming[connection] = bytearray(header.length)
        self._early_bytes += header.length
        return memoryview(self._coming[connection])

    def arrived(self, connection: Connection, header: Header, others: list[Connection]) -> None:
        """A chunk is whole. `others`: connections of the same peer, which may be about to write into its message."""
        key = (header.operation, connection.peer, header.tag)
        posted = self._posted.get(key)
        content = self._coming.pop(connection, None)
        if posted is None:
            if content is not None and key not in self._whole and header.offset not in self._early.get(key, {}):
                self._early.setdefault(key, {})[header.offset] = content
            elif content is not None:
                self._early_bytes -= len(content)
            return
        if content is not None:
            self._early_bytes -= len(content)
        if header.offset in posted.got:
            return
        if content is not None:
            self._copy(key, posted, header.offset, content)
        else:
            self._note(key, posted, header.offset, header.length)
        if key in self._whole:
            for other in others:
                filling = other.filling
                if filling is not None and (filling.operation, filling.tag) == (header.operation, header.tag):
                    other.divert()

    def dropped(self, connection: Connection) -> None:
        """It is broken, and what was coming over it will come again over another."""
        self._early_bytes -= len(self._coming.pop(connection, b""))

    def forget(self) -> None:
        """Nothing will be received any more."""
        self._posted.clear()
        self._early.clear()
        self._coming.clear()
        self._early_bytes = 0

    def _forget_strays(self, now: int) -> None:
        """Chunks that came once more, over a path that had been silent for long: nobody will ask for them."""
        for key in [key for key in self._early if key[0] < now - _REMEMBERED]:
            self._early_bytes -= sum(len(content) for content in self._early.pop(key).values())

    def _copy(self, key: Key, posted: _Posted, offset: int, content: bytearray) -> None:
        _inside(posted, offset, len(content))
        posted.into.fill(offset, content)
        self._note(key, posted, offset, len(content))

    def _note(self, key: Key, posted: _Posted, offset: int, length: int) -> None:
        posted.got.add(offset)
        posted.left -= length
        if not posted.left:
            self._finish(key, posted)

    def _finish(self, key: Key, posted: _Posted) -> None:
        del self._posted[key]
        self._whole[key] = None
        while len(self._whole) > _REMEMBERED:
            self._whole.popitem(last=False)
        posted.done()


def _inside(posted: _Posted, offset: int, length: int) -> None:
    if offset + length > len(posted.into):
        raise TooLong(f"bytes {offset} to {offset + length} of {len(posted.into)}")
