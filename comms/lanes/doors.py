"""What takes a while, beside the lanes' thread: connecting, accepting, and knocking at a rank that may be gone."""

import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial

from resilient.comms.lanes.connection import Connection
from resilient.comms.lanes.meeting import Meeting, accept, connect
from resilient.comms.lanes.wiring import Wiring

_THREADS = 4
_KNOCK_S = 1.0
_LAST_WORDS_S = 0.5  # what one that has ended said before may still be on its way


class Doors:
    """The callbacks come from other threads: `opened(connection)`, `closed(peer, path, error)`, `empty(peer)`: nobody
    is there any more."""

    def __init__(
        self,
        meeting: Meeting,
        wiring: Wiring,
        *,
        opened: Callable[[Connection], None],
        closed: Callable[[int, int, Exception], None],
        empty: Callable[[int], None],
    ) -> None:
        self._meeting, self._wiring = meeting, wiring
        self._opened, self._closed, self._empty = opened, closed, empty
        self._outwards = ThreadPoolExecutor(_THREADS, f"lanes-open-{meeting.rank}")
        self._inwards = ThreadPoolExecutor(_THREADS, f"lanes-accept-{meeting.rank}")

    def open(self, peer: int, path: int) -> None:
        """Connect to a peer over a path."""
        self._give(self._outwards, partial(self._connect, peer, path))

    def welcome(self, sock: socket.socket) -> None:
        """Find out who has connected."""
        self._give(self._inwards, partial(self._accept, sock))

    def knock(self, peer: int) -> None:
        """Find out whether a peer's process is there: where it has ended, its host refuses. A cut network is silent."""
        self.submit(partial(self._knock, peer))

    def submit(self, call: Callable[[], None]) -> None:
        """Anything else that takes a while. Nothing once the doors are closed, or Python is ending."""
        self._give(self._outwards, call)

    def close(self) -> None:
        """Does not wait for what is under way."""
        self._outwards.shutdown(wait=False, cancel_futures=True)
        self._inwards.shutdown(wait=False, cancel_futures=True)

    @staticmethod
    def _give(pool: ThreadPoolExecutor, call: Callable[[], None]) -> None:
        with suppress(RuntimeError):  # it takes nothing any more
            pool.submit(call)

    def _connect(self, peer: int, path: int) -> None:
        member = self._meeting.members[peer]
        crosses = member.leaf != self._meeting.members[self._meeting.rank].leaf
        try:
            sock = connect(self._meeting, peer, path, self._wiring.ways(path, member.addresses, crosses=crosses))
        except Exception as error:  # a wiring may raise anything; a lane must not be opening for ever
            self._closed(peer, path, error)
            return
        self._opened(Connection(sock, peer, path, sending=True))

    def _accept(self, sock: socket.socket) -> None:
        try:
            rank, path = accept(self._meeting, sock)
        except OSError:
            sock.close()
            return
        self._opened(Connection(sock, rank, path, sending=False))

    def _knock(self, peer: int) -> None:
        refused = False
        for address in self._meeting.members[peer].addresses:
            try:
                socket.create_connection(address, timeout=_KNOCK_S).close()
                return
            except ConnectionRefusedError:
                refused = True
            except OSError:
                continue
        if refused:
            time.sleep(_LAST_WORDS_S)
            self._empty(peer)
