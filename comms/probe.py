"""Which path a flow takes, found by the host itself, without privilege and before the flow exists.

A connection attempt from the chosen source port, with a limited TTL, takes the flow's path and dies at a router on it,
whose ICMP "time exceeded" (RFC 792) names the router; Linux hands it over in the socket's error queue (`IP_RECVERR`,
ip(7)). It never arrives. Routers that do not answer, or answer too rarely, leave the path unknown: then that is said.
"""

import random
import select
import socket
import threading
import time
from collections.abc import Sequence

Address = tuple[str, int]

_IP_RECVERR = 11
_TIME_EXCEEDED = 11
WAIT_S = 0.3  # a router in a data centre answers within a millisecond
SPINE_TTL = 2  # hosts, leaf, spine
_PORTS = (20000, 32000)  # below Linux's own range: nobody else is likely to take one
_MOST_SILENT = 3  # probes in a row: then nobody will answer
LIMIT_S = 4.0


def hop(source: str, port: int, target: Address, *, ttl: int = SPINE_TTL, wait_s: float = WAIT_S) -> str | None:
    """The router `ttl` hops along the flow; None: it does not say. Raises OSError where the port cannot be used."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.IPPROTO_IP, _IP_RECVERR, 1)
        sock.setsockopt(socket.IPPROTO_IP, socket.IP_TTL, ttl)
        sock.setblocking(False)
        sock.bind((source, port))
        sock.connect_ex(target)
        poll = select.poll()
        poll.register(sock, 0)  # errors are told unasked
        if not poll.poll(wait_s * 1000):
            return None
        try:
            _, ancillary, _, _ = sock.recvmsg(64, 512, socket.MSG_ERRQUEUE)
        except OSError:
            return None
    for level, kind, data in ancillary:
        # struct sock_extended_err: errno, origin, type, code ...; then the sockaddr of the router
        if (level, kind) == (socket.IPPROTO_IP, _IP_RECVERR) and data[5] == _TIME_EXCEEDED:
            return socket.inet_ntoa(data[20:24])
    return None


class Finder:
    """Finds source ports by path: `hops[path]` are the addresses by which that path answers. From any thread."""

    def __init__(self, hops: Sequence[Sequence[str]], *, ttl: int = SPINE_TTL, limit_s: float = LIMIT_S) -> None:
        self._path_of = {address: path for path, addresses in enumerate(hops) for address in addresses}
        self._ttl, self._limit_s = ttl, limit_s
        self._spare: dict[tuple[str, Address, int], list[int]] = {}  # found on the way to another path
        self._lock = threading.Lock()
        self._random = random.Random()

    def __call__(self, source: str, target: Address, path: int) -> int:
        """A source port that is free and whose flow takes the path.

        Blocks for up to `limit_s`. Raises OSError where none is found: routers do not answer, or the path is down.
        """
        with self._lock:
            spare = self._spare.get((source, target, path), [])
            while spare:
                port = spare.pop()
                if self._probe(source, port, target) == path:  # switches may have changed their minds
                    return port
            return self._search(source, target, path)

    def _search(self, source: str, target: Address, path: int) -> int:
        end, silent, seen = time.monotonic() + self._limit_s, 0, set()
        while time.monotonic() < end:
            port = self._random.randrange(*_PORTS)
            try:
                found = self._probe(source, port, target)
            except OSError:  # it is in use
                continue
            if found is None:
                silent += 1
                if silent >= _MOST_SILENT:
                    break
                continue
            silent = 0
            if found == path:
                return port
            seen.add(found)
            self._spare.setdefault((source, target, found), []).append(port)
        what = f"flows took paths {sorted(seen)}" if seen else "no router on the way has answered probes"
        raise OSError(f"no flow from {source} to {target[0]} over path {path} was found: {what}")

    def _probe(self, source: str, port: int, target: Address) -> int | None:
        router = hop(source, port, target, ttl=self._ttl)
        return None if router is None else self._path_of.get(router)


def any_port(source: str, target: Address, path: int) -> int:
    """Where paths cannot be found out: whatever port comes."""
    return 0
