"""The transport between real nodes: TCP, authenticated by the job's token, at the speed of the bare socket.

The serving side is `listener.py`. The asking side is here: it takes a link (`links.py`), uses it, and tries again a few
times when it breaks; never when an attempt has waited for its whole time limit, and never when the peer itself says
what is wrong. `handshake.py` says what the token protects, `frames.py` what goes over the wire.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Self, TypeVar

from resilient.checkpoint.peers.frames import Broken
from resilient.checkpoint.peers.handshake import LEAST_TOKEN_BYTES, NAME_BYTES
from resilient.checkpoint.peers.links import Answered, Link, Links
from resilient.checkpoint.peers.listener import HANDSHAKE_S, Listener
from resilient.checkpoint.peers.pacing import Pace
from resilient.checkpoint.peers.requests import ASKED_AHEAD, Range, message_text
from resilient.checkpoint.peers.transport import Address, Message, Served, Transport, Wanted
from resilient.errors import LevelFailed, UsageError

LIMIT_S = 30.0
CONNECT_S = 5.0
ATTEMPTS = 3
FIRST_PAUSE_S = 0.1  # before the second attempt; twice as long before each that follows
_EVERYWHERE = ("", "0.0.0.0", "::", "*")

T = TypeVar("T")


class TcpTransport(Transport):
    """A node's transport. `start` before anything else; `close`, or `with`, at the end.

    A `read` takes up to ASKED_AHEAD ranges from its iterable before it gives the first back.
    """

    def __init__(
        self,
        node: str,
        token: str,
        served: Served,
        *,
        host: str,
        port: int = 0,
        pace: Pace | None = None,
        limit_s: float = LIMIT_S,
        connect_s: float = CONNECT_S,
        handshake_s: float = HANDSHAKE_S,
        attempts: int = ATTEMPTS,
    ) -> None:
        """`host` names the one interface to listen at; port 0 takes any that is free. `pace` bounds all data sent.

        Raises UsageError for what cannot be meant.
        """
        if host in _EVERYWHERE:
            raise UsageError(f"node {node} would listen at {host!r}, that is everywhere; name one interface's address")
        if len(token.encode()) < LEAST_TOKEN_BYTES:
            raise UsageError(f"the token of a job has at least {LEAST_TOKEN_BYTES} bytes; secrets.token_hex makes one")
        if not 0 < len(node.encode()) <= NAME_BYTES:
            raise UsageError(f"a node's name has 1 to {NAME_BYTES} bytes, unlike {node!r}")
        self._node = node
        self._host = host
        self._port = port
        self._attempts = attempts
        self._address: Address | None = None
        pace = pace or Pace()
        self._links = Links(node, token.encode(), pace, limit_s, connect_s)
        self._listener = Listener(node, token.encode(), served, pace, limit_s, handshake_s)
        self._closed = threading.Event()

    @property
    def address(self) -> Address:
        """Where peers reach this node, once it is started."""
        assert self._address is not None, "start() comes first"
        return self._address

    @property
    def connections(self) -> int:
        """How many connections from peers, or from those who may turn out to be, there are."""
        return self._listener.connections()

    def start(self) -> Address:
        """Listen. Raises UsageError where the address cannot be had."""
        try:
            self._address = self._listener.start(self._host, self._port)
        except OSError as error:
            raise UsageError(
                f"node {self._node} cannot listen at {self._host}:{self._port} ({error.strerror or error}); "
                "name an address of this machine, and a port that is free"
            ) from error
        return self._address

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Blocks until the serving threads have ended."""
        self._closed.set()
        self._links.close()
        self._listener.close()

    def set_peers(self, peers: Mapping[str, Address]) -> None:
        self._listener.interrupt(self._links.set_addresses(peers))

    def call(self, peer: str, message: Message) -> Message:
        body = message_text(message)
        return self._with_link(peer, lambda link: link.ask(body))

    def push(self, peer: str, name: str, offset: int, data: memoryview, digest: str) -> None:
        """Raises DamagedImage, too: what arrived does not match the digest. It may help to push again."""
        data = data.cast("B")
        pushed = Range(name=name, offset=offset, nbytes=data.nbytes, digest=digest)
        self._with_link(peer, lambda link: link.push(pushed, data))

    def read(self, peer: str, wanted: Iterable[Wanted]) -> Iterator[Wanted]:
        source = iter(wanted)
        asked: deque[Wanted] = deque()  # the first `link.outstanding` of them by way of this link
        link: Link | None = None
        failures = 0
        try:
            while True:
                asked.extend(islice(source, ASKED_AHEAD - len(asked)))
                if not asked:
                    return
                try:
                    link = link or self._links.take(peer)
                    while link.outstanding < len(asked):
                        link.ask_for(_range(asked[link.outstanding]))
                    link.receive(asked[0].into.cast("B"))
                except Broken as error:
                    if link is not None:
                        self._links.give_back(link)
                        link = None
                    failures += 1
                    self._pause(peer, error, failures)
                    continue
                failures = 0
                yield asked.popleft()
        except Answered as answered:
            raise answered.error from None
        finally:
            if link is not None:
                self._links.give_back(link)

    def _with_link(self, peer: str, use: Callable[[Link], T]) -> T:
        """Use a link, and another one when it breaks."""
        failures = 0
        while True:
            try:
                with self._links.one(peer) as link:
                    return use(link)
            except Broken as error:
                failures += 1
                self._pause(peer, error, failures)
            except Answered as answered:
                raise answered.error from None

    def _pause(self, peer: str, error: Broken, failures: int) -> None:
        """Return when it is time for the next attempt. Raises LevelFailed if there is to be none."""
        if not error.final and failures < self._attempts:
            self._closed.wait(FIRST_PAUSE_S * 2 ** (failures - 1))
        elif not self._closed.is_set():
            tries = "once" if failures == 1 else f"{failures} times"
            raise LevelFailed(f"node {self._node} cannot reach node {peer}, tried {tries}: {error}") from error
        if self._closed.is_set():
            raise LevelFailed(f"node {self._node} has closed its connections, the one to node {peer} too")


def _range(wanted: Wanted) -> Range:
    return Range(name=wanted.name, offset=wanted.offset, nbytes=wanted.into.nbytes)
