"""Addresses: where this node's agent would listen for others, and whether other machines can be reached at all.

Outside a job nobody listens yet, so a peer that refuses a connection counts as reached: it has answered. Inside a job
`job.py` tries the real thing.
"""

import errno
import ipaddress
import socket
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from resilient.checkpoint.peers.route import address_towards
from resilient.launch.doctor.finding import Finding, fail, ok, warn
from resilient.launch.doctor.question import Question

_SSH = 22
_CONNECT_S = 5.0
_AT_A_TIME = 16
_LOOPBACK = "127.0.0.1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """Facts of another machine. `error`: why it could not be reached; "" if it answered, if only with a refusal."""

    name: str
    address: str = ""
    error: str = ""


def examine(question: Question) -> list[Finding]:
    """This node's address, and the peers that were named. Blocks for some seconds a peer."""
    host = own_address(question)
    findings = [decide_address(host, _try_to_listen(host), question)]
    with ThreadPoolExecutor(_AT_A_TIME) as pool:
        findings += map(decide_peer, pool.map(reach, question.peers))
    return findings


def own_address(question: Question) -> str:
    """Where the agent would listen: as it is stated, else towards the job's master, else towards the first peer."""
    environment: Mapping[str, str] = question.environment
    if question.policy.peer_address:
        return question.policy.peer_address
    for host in (environment.get("MASTER_ADDR"), *(peer.partition(":")[0] for peer in question.peers)):
        if host:
            try:
                return address_towards(host)
            except OSError:
                continue
    return _LOOPBACK


def decide_address(host: str, error: str, question: Question) -> Finding:
    name, needed = "address", question.policy.parity is not None
    if error:
        change = "set peer_address to an address of this node"
        return fail(name, f"no agent can listen at {host}: {error}", change) if needed else warn(name, error, change)
    if not needed:
        return ok(name, f"{host}; without parity no agent listens")
    if question.peers and _is_loopback(host):
        return fail(
            name,
            f"the agent would listen at {host}, where the peers cannot reach it",
            "set peer_address, or have this node's name stand for an address of its network (see /etc/hosts)",
        )
    return ok(name, f"the agent listens at {host}")


def decide_peer(peer: Peer) -> Finding:
    if not peer.error:
        return ok(f"peer {peer.name}", f"reached at {peer.address}")
    return fail(
        f"peer {peer.name}",
        peer.error,
        "correct the name, or open the network between the nodes, for all ports that agents may take",
    )


def reach(name: str) -> Peer:
    """Connect to `host` or `host:port`. Blocks for some seconds at most, and for the name service."""
    host, _, port = name.partition(":")
    try:
        address = str(socket.getaddrinfo(host, int(port or _SSH), type=socket.SOCK_STREAM)[0][4][0])
    except (OSError, ValueError) as error:
        return Peer(name=name, error=f"{name}: the name is not known here ({error})")
    try:
        socket.create_connection((address, int(port or _SSH)), _CONNECT_S).close()
    except OSError as error:
        if error.errno != errno.ECONNREFUSED:
            return Peer(name=name, address=address, error=f"{name} ({address}) does not answer: {error}")
    return Peer(name=name, address=address)


def _try_to_listen(host: str) -> str:
    try:
        family, kind, _, _, where = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.bind(where)
    except OSError as error:
        return str(error)
    return ""


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
