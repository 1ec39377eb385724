"""Which path a flow takes, found by the host itself, without privilege and before the flow exists.

A connection attempt from the chosen source port, with a limited TTL, takes the flow's path and dies at a router on it,
whose ICMP "time exceeded" (RFC 792) names the router; Linux hands it over in the socket's error queue (`IP_RECVERR`,
ip(7)). It never arrives. Routers that do not answer, or answer too rarely, leave the path unknown: then that is said.
What all hosts' probes together say of the network is in `discovery.py`.
"""

import errno
import logging
import random
import select
import socket
import struct
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

Address = tuple[str, int]

_log = logging.getLogger(__name__)

_IP_RECVERR = 11
_TIME_EXCEEDED, _ORIGIN_ICMP = 11, 2
_ON_ITS_WAY = (0, errno.EINPROGRESS)
WAIT_S = 0.3  # a router in a data centre answers within a millisecond
SPINE_TTL = 2  # hosts, leaf, spine
LIMIT_S = 4.0
_PORTS = (20000, 32000)  # below Linux's own range: nobody else is likely to take one
_AT_ONCE = 8
_MOST_SILENT = 2  # times so many in a row: then nobody will answer
_MOST_STRANGE = 4  # times so many: then the hops are those of another network
_EACH = 32  # probes for each path: that one is there and none of them takes it has a chance of 1e-13
_BLIND_S = 30.0


class Answer(NamedTuple):
    """Of a probe from `port`: the router that it died at, or None and whether it has `arrived` at the target."""

    port: int
    router: str | None
    arrived: bool


def ask(source: str, ttls: Mapping[int, int], target: Address, *, wait_s: float = WAIT_S) -> Iterator[Answer]:
    """Probe from several ports at once, each with its TTL; answers as they come. Who gives none is silent, or in use.

    Blocks for up to `wait_s` in all. Raises OSError where none of the ports could be used.
    """
    pending: dict[int, tuple[int, socket.socket]] = {}
    poll = select.poll()
    problem: OSError | None = None
    try:
        for port, ttl in ttls.items():
            sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
            try:
                _send(sock, (source, port), target, ttl)
            except OSError as error:
                problem = error
                sock.close()
                continue
            pending[sock.fileno()] = port, sock
            poll.register(sock, select.POLLOUT)
        if problem is not None and not pending:
            raise problem
        end = time.monotonic() + wait_s
        while pending and (left := end - time.monotonic()) > 0:
            for descriptor, _ in poll.poll(left * 1000):
                port, sock = pending.pop(descriptor)
                poll.unregister(descriptor)
                with sock:
                    answer = _answer(port, sock)
                if answer is not None:
                    yield answer
    finally:
        for _, sock in pending.values():
            sock.close()


def _send(sock: socket.socket, source: Address, target: Address, ttl: int) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    # A probe that has arrived is reset, not closed: its port is free again at once.
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.setsockopt(socket.IPPROTO_IP, _IP_RECVERR, 1)
    sock.setsockopt(socket.IPPROTO_IP, socket.IP_TTL, ttl)
    sock.setblocking(False)
    sock.bind(source)
    number = sock.connect_ex(target)
    if number not in _ON_ITS_WAY:  # there is such a flow, or no route
        raise OSError(number, f"probe from {source[0]}:{source[1]} to {target[0]}: {errno.errorcode.get(number)}")


def _answer(port: int, sock: socket.socket) -> Answer | None:
    try:
        _, ancillary, _, _ = sock.recvmsg(64, 512, socket.MSG_ERRQUEUE)
    except OSError:  # nothing from a router
        number = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        return Answer(port, None, True) if number in (0, errno.ECONNREFUSED) else None
    for level, kind, data in ancillary:
        # struct sock_extended_err: errno, origin, type, code ...; then the sockaddr of the router
        if (level, kind) == (socket.IPPROTO_IP, _IP_RECVERR) and data[4:6] == bytes((_ORIGIN_ICMP, _TIME_EXCEEDED)):
            return Answer(port, socket.inet_ntoa(data[20:24]), False)
    return None


def hop(source: str, port: int, target: Address, *, ttl: int = SPINE_TTL, wait_s: float = WAIT_S) -> str | None:
    """The router `ttl` hops along the flow; None: it does not say. Raises OSError where the port cannot be used."""
    return next((answer.router for answer in ask(source, {port: ttl}, target, wait_s=wait_s)), None)


def some_ports(count: int, chooser: random.Random) -> list[int]:
    """Different ones, that are likely to be free."""
    return chooser.sample(range(*_PORTS), count)


class NobodyTells(OSError):
    """No path can be told from another."""


class Finder:
    """Finds source ports by path: `hops[path]` are the addresses by which that path answers. From any thread."""

    def __init__(self, hops: Sequence[Sequence[str]], *, ttl: int = SPINE_TTL, limit_s: float = LIMIT_S) -> None:
        self._paths = len(hops)
        self._path_of = {address: path for path, addresses in enumerate(hops) for address in addresses}
        self._ttl, self._limit_s = ttl, limit_s
        self._spare: dict[tuple[str, Address, int], list[int]] = {}  # found on the way to another path
        self._lock = threading.Lock()
        self._random = random.Random()

    def __call__(self, source: str, target: Address, path: int) -> int:
        """A source port that is free and whose flow takes the path.

        Blocks for up to `limit_s`. Raises OSError where none is found and others are: the path is down; NobodyTells
        where no router answers that is known.
        """
        with self._lock:
            spare = self._spare.get((source, target, path), [])
            while spare:
                port = spare.pop()
                if self._still(source, port, target, path):
                    return port
            return self._search(source, target, path)

    def _still(self, source: str, port: int, target: Address, path: int) -> bool:
        """Switches may have changed their minds, and somebody may have taken the port."""
        try:
            router = hop(source, port, target, ttl=self._ttl)
        except OSError:
            return False
        return router is not None and self._path_of.get(router) == path

    def _search(self, source: str, target: Address, path: int) -> int:
        end, silent = time.monotonic() + self._limit_s, 0
        seen: set[int] = set()
        strangers: set[str] = set()
        for turn in range(-(-_EACH * self._paths // _AT_ONCE)):
            if time.monotonic() > end or silent == _MOST_SILENT or (turn == _MOST_STRANGE and not seen):
                break
            silent += 1
            for answer in self._asked(source, target):
                silent = 0
                found = self._path_of.get(answer.router or "")
                if found == path:
                    return answer.port
                if found is None:
                    strangers.add(answer.router or "the target itself")
                else:
                    seen.add(found)
                    self._spare.setdefault((source, target, found), []).append(answer.port)
        kind = OSError if seen else NobodyTells
        raise kind(f"no flow from {source} to {target[0]} over path {path} was found: {_why(seen, strangers)}")

    def _asked(self, source: str, target: Address) -> Iterator[Answer]:
        try:
            yield from ask(source, dict.fromkeys(some_ports(_AT_ONCE, self._random), self._ttl), target)
        except OSError as error:
            if error.errno not in (errno.EADDRINUSE, errno.EADDRNOTAVAIL):
                raise


def _why(seen: set[int], strangers: set[str]) -> str:
    if seen:
        return f"flows took paths {sorted(seen)}"
    if strangers:
        return f"probes died at {', '.join(sorted(strangers))}, and no path has that among its hops"
    return "no router on the way has answered probes"


class OrChance:
    """A finder; where nobody tells, any port will do, and flows are spread by chance, which is logged. Thread-safe."""

    def __init__(self, finder: Finder, *, blind_s: float = _BLIND_S) -> None:
        self._finder, self._blind_s = finder, blind_s
        self._blind_until = 0.0

    def __call__(self, source: str, target: Address, path: int) -> int:
        """As the finder. 0, any port, where nobody tells; for `blind_s` then nobody is asked. Raises OSError."""
        if time.monotonic() < self._blind_until:
            return 0
        try:
            return self._finder(source, target, path)
        except NobodyTells as error:
            if not self._blind_until:
                _log.warning("flows are spread by chance: %s", error)
            self._blind_until = time.monotonic() + self._blind_s
            return 0


def any_port(source: str, target: Address, path: int) -> int:
    """Where paths cannot be found out: whatever port comes."""
    return 0
