"""Ranks find one another through the job's store, and prove to each other that they belong to it.

Rank 0 draws a token, and every rank publishes its host, leaf and listening addresses. A connection begins with a
nonce from each side and an HMAC-SHA256 (RFC 2104) of both under the token: strangers learn a random number, and are
dropped after HANDSHAKE_S. Authentication, not encryption: who reads the network reads gradients, as with gloo and NCCL.
"""

import hashlib
import hmac
import json
import secrets
import socket
import struct
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from resilient.comms.lanes.messages import Failure
from resilient.comms.lanes.wiring import Address, Way, Wiring
from resilient.errors import UsageError

HANDSHAKE_S = 5.0
_MAGIC = b"RESILLANE1"
_NONCE = 32
_HELLO = struct.Struct(f"!{len(_MAGIC)}sIH{_NONCE}s32s")
_BACKLOG = 512


class Store(Protocol):
    """What is asked of a torch.distributed store."""

    def set(self, key: str, value: str, /) -> Any: ...

    def get(self, key: str, /) -> bytes: ...

    def check(self, keys: list[str], /) -> bool: ...


@dataclass(frozen=True, slots=True)
class Member:
    """What a rank says of itself."""

    host: str
    leaf: int
    paths: int
    addresses: tuple[Address, ...]


@dataclass(frozen=True, slots=True)
class Meeting:
    """Who is in the group, and the token that they share. `name` tells groups of one store apart."""

    name: str
    rank: int
    members: tuple[Member, ...]
    token: bytes


def listen(addresses: Sequence[str]) -> list[socket.socket]:
    """A listening socket at each address, at a free port, non-blocking. Raises OSError naming the address."""
    found: list[socket.socket] = []
    try:
        for address in addresses:
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            found.append(socket.create_server((address, 0), family=family, backlog=_BACKLOG))
            found[-1].setblocking(False)
    except OSError as error:
        for sock in found:
            sock.close()
        raise OSError(
            error.errno, f"cannot listen at {address}: {error.strerror}; is it an address of this host?"
        ) from None
    return found


def meet(
    store: Store,
    rank: int,
    size: int,
    *,
    name: str,
    host: str,
    leaf: int,
    wiring: Wiring,
    listening: Sequence[socket.socket],
    problem: str = "",
) -> Meeting:
    """Publish this rank and read all others; waits for them as long as the store's timeout.

    Raises UsageError on every rank when one has a `problem`, or ranks differ in their number of paths; whatever the
    store raises otherwise.
    """
    if rank == 0:
        store.set(f"{name}/token", secrets.token_hex(32))
    own = {
        "host": host,
        "leaf": leaf,
        "paths": wiring.paths,
        "addresses": [sock.getsockname()[:2] for sock in listening],
        "problem": problem,
    }
    store.set(f"{name}/{rank}", json.dumps(own))
    if rank == 0:  # reads what each says, so that the others have to read one thing only
        rows = [json.loads(store.get(f"{name}/{other}")) for other in range(size)]
        store.set(f"{name}/members", json.dumps(rows))
    rows = json.loads(store.get(f"{name}/members"))
    for number, row in enumerate(rows):
        if row["problem"]:
            raise UsageError(f"rank {number} ({row['host']}) cannot open lanes: {row['problem']}")
    members = tuple(_member(row) for row in rows)
    counts = {member.paths: number for number, member in reversed(list(enumerate(members)))}
    if len(counts) > 1:
        said = ", ".join(
            f"rank {number} ({members[number].host}) has {count}" for count, number in sorted(counts.items())
        )
        raise UsageError(f"all ranks need the same number of paths; {said}. Give all ranks the same topology")
    return Meeting(name, rank, members, bytes.fromhex(store.get(f"{name}/token").decode()))


def _member(said: dict[str, Any]) -> Member:
    return Member(said["host"], said["leaf"], said["paths"], tuple((host, port) for host, port in said["addresses"]))


def write_failure(store: Store, name: str, failure: Failure) -> None:
    """Why the group has failed, for ranks that nobody is connected with. The first one stays."""
    with suppress(Exception):  # whatever a store raises: it may be what has gone
        if not store.check([f"{name}/failed"]):
            store.set(f"{name}/failed", json.dumps(asdict(failure)))


def read_failure(store: Store, name: str) -> Failure | None:
    """What somebody has written down, if anybody has and the store is there."""
    with suppress(Exception):  # as above
        if store.check([f"{name}/failed"]):
            return Failure(**json.loads(store.get(f"{name}/failed")))
    return None


def connect(meeting: Meeting, peer: int, path: int, way: Way, limit_s: float = HANDSHAKE_S) -> socket.socket:
    """A connection to a peer that has proved itself, non-blocking. Blocks up to `limit_s`. Raises OSError."""
    deadline = time.monotonic() + limit_s
    sock = socket.socket(socket.AF_INET6 if ":" in way.source else socket.AF_INET)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((way.source, way.port))
        sock.settimeout(limit_s)
        sock.connect(way.target)
        server = _exactly(sock, _NONCE, deadline)
        client = secrets.token_bytes(_NONCE)
        said = _transcript(meeting, meeting.rank, peer, path, server, client)
        sock.sendall(_HELLO.pack(_MAGIC, meeting.rank, path, client, _mac(meeting, b"client", said)))
        if not hmac.compare_digest(_exactly(sock, 32, deadline), _mac(meeting, b"server", said)):
            raise ConnectionAbortedError(f"who answers at {way.target} is not rank {peer} of this job")
        _tune(sock)
    except BaseException:
        sock.close()
        raise
    return sock


def accept(meeting: Meeting, sock: socket.socket, limit_s: float = HANDSHAKE_S) -> tuple[int, int]:
    """The rank and path of who has connected, once proved. Blocks up to `limit_s`. Raises OSError for strangers."""
    deadline = time.monotonic() + limit_s
    sock.settimeout(limit_s)
    server = secrets.token_bytes(_NONCE)
    sock.sendall(server)
    magic, rank, path, client, proof = _HELLO.unpack(_exactly(sock, _HELLO.size, deadline))
    said = _transcript(meeting, rank, meeting.rank, path, server, client)
    known = magic == _MAGIC and rank < len(meeting.members) and path < meeting.members[meeting.rank].paths
    if not (known and hmac.compare_digest(proof, _mac(meeting, b"client", said))):
        raise ConnectionAbortedError("a stranger")
    sock.sendall(_mac(meeting, b"server", said))
    _tune(sock)
    return rank, path


def _transcript(meeting: Meeting, source: int, target: int, path: int, server: bytes, client: bytes) -> bytes:
    return json.dumps([meeting.name, source, target, path]).encode() + server + client


def _mac(meeting: Meeting, role: bytes, said: bytes) -> bytes:
    return hmac.digest(meeting.token, role + said, hashlib.sha256)


def _exactly(sock: socket.socket, count: int, deadline: float) -> bytes:
    got = bytearray()
    while len(got) < count:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("the handshake took too long")
        sock.settimeout(left)
        part = sock.recv(count - len(got))
        if not part:
            raise ConnectionResetError("it hung up during the handshake")
        got += part
    return bytes(got)


def _tune(sock: socket.socket) -> None:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    # What is not on the wire yet stays with us, where another lane can take it.
    sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, "TCP_NOTSENT_LOWAT", 25), 1 << 17)
    sock.setblocking(False)
