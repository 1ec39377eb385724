"""Where the launchers of a job meet before each life, and what they agree on there.

`open_rendezvous` makes torch's elastic rendezvous as torchrun does, but for three things: the store listens at the one
address that is named, a job on one node has no listening store at all, and dead nodes are known sooner. `agree`: each
node tells what it knows, the first decides for all. The store of a rendezvous is new in each round, so nothing in it
is of the dead.
"""

import errno
import json
import os
import secrets
import socket
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousParameters, registry
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import create_handler
from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint
from torch.distributed.launcher.api import LaunchConfig

from resilient.errors import LevelFailed, UsageError
from resilient.launch.run.identity import new_token

DEFAULT_PORT = 29400
LOCAL = "localhost:0"
# A node is dead when its last sign of life is older than interval x attempts: 6 s, where torchrun has 15. Fewer than
# three attempts drop nodes that live. `last_call_timeout`: how long to wait for more nodes once there are enough.
_DEFAULTS = {
    "keep_alive_interval": 2,
    "keep_alive_max_attempt": 3,
    "last_call_timeout": 5,
    "read_timeout": 20,
}
_BROKEN = "resilient/broken"


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """What a node tells: its name, the last life it has seen and who was in it, the command it runs, the token and the
    name of the launch if it has them.
    """

    node: str
    life: int = -1
    command: str = ""
    token: str | None = None
    launch: str | None = None
    nodes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreed:
    """What holds for all nodes in this life. `lost` and `new`: nodes that have gone and come since the last; `launch`:
    a name that all lives of this job have in common, and no other job has.
    """

    life: int
    token: str = field(repr=False)
    launch: str
    nodes: tuple[str, ...]
    lost: tuple[str, ...] = ()
    new: tuple[str, ...] = ()


def open_rendezvous(config: LaunchConfig, scratch: Path) -> tuple[RendezvousHandler, bool]:
    """The handler of a launcher's rendezvous, and whether its store is served by this process. Blocks until the store
    is there, `read_timeout` at most.

    `scratch`: a private folder of this launcher.

    Raises LevelFailed when it cannot be reached.
    """
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # else all lives share one store, with the dead in it
    parameters = RendezvousParameters(
        backend=config.rdzv_backend,
        endpoint=config.rdzv_endpoint,
        run_id=config.run_id,
        min_nodes=config.min_nodes,
        max_nodes=config.max_nodes,
        local_addr=config.local_addr,
        **{**_DEFAULTS, **config.rdzv_configs},
    )
    if config.rdzv_backend != "c10d":
        return registry.get_rendezvous_handler(parameters), False
    store, serves = _open_store(parameters, scratch)
    return create_handler(store, C10dRendezvousBackend(store, config.run_id), parameters), serves


def serve(endpoint: str) -> dist.TCPStore:
    """The store of a rendezvous, at this address of this machine only; it listens as long as the object lives.

    Raises LevelFailed where the address is not this machine's, or taken.
    """
    host, port = parse_rendezvous_endpoint(endpoint, DEFAULT_PORT)
    try:
        listener = _listen(host, port, alone=False)
    except OSError as error:
        raise LevelFailed(f"the rendezvous cannot be served at {endpoint}: {error}") from error
    return _store_on(listener, host, timedelta(seconds=_DEFAULTS["read_timeout"]))


def _open_store(parameters: RendezvousParameters, scratch: Path) -> tuple[dist.Store, bool]:
    """The job's store, served here if the endpoint is free and this machine's, as the first of its launchers does."""
    timeout = timedelta(seconds=parameters.get_as_int("read_timeout") or _DEFAULTS["read_timeout"])
    if is_local(parameters.endpoint):
        store = dist.FileStore(str(scratch / "rendezvous"))
        store.set_timeout(timeout)
        return store, True
    host, port = parse_rendezvous_endpoint(parameters.endpoint, DEFAULT_PORT)
    serves = parameters.get_as_bool("is_host")
    try:
        if serves is not False:
            try:
                return _store_on(_listen(host, port, alone=parameters.max_nodes == 1), host, timeout), True
            except OSError as error:
                if serves or error.errno not in (errno.EADDRNOTAVAIL, errno.EADDRINUSE):
                    raise
        return dist.TCPStore(host, port, is_master=False, timeout=timeout), False
    except (RuntimeError, ValueError, OSError) as error:  # torch's DistError is a RuntimeError
        raise LevelFailed(
            f"the rendezvous at {parameters.endpoint} cannot be reached ({_first_line(error)}): is the node up that it "
            "names, and its launcher?"
        ) from error


def _store_on(listener: socket.socket, host: str, timeout: timedelta) -> dist.TCPStore:
    with listener:
        port = listener.getsockname()[1]
        descriptor = os.dup(listener.fileno())  # the store closes it
    return dist.TCPStore(
        host, port, is_master=True, wait_for_workers=False, timeout=timeout, master_listen_fd=descriptor
    )


def is_local(endpoint: str) -> bool:
    """Whether this is no place where another node could come: what a job on one node has when none is given."""
    return endpoint == LOCAL


def _listen(host: str, port: int, *, alone: bool) -> socket.socket:
    """A socket that listens at the endpoint. `alone`: no other machine has to reach it. Raises OSError."""
    found: tuple[Any, ...] = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    family, address = found[0], found[-1]
    named = host == "localhost" or host.startswith("127.") or host == "::1"
    # /etc/hosts may give this machine's own name an address that no other node can reach.
    everywhere = ip_address(str(address[0])).is_loopback and not named and not alone
    return socket.create_server(("", *address[1:]) if everywhere else address, family=family, backlog=1024)


def agree(store: dist.Store, group_rank: int, group_size: int, told: Told) -> Agreed:
    """What all nodes of this round start their life with. Blocks for the slowest node, the store's timeout at most.

    Raises UsageError where a node runs another command; RuntimeError (torch's) when a node or the store is gone.
    """
    store.set(f"resilient/told/{group_rank}", json.dumps(asdict(told)))
    if group_rank == 0:
        everyone = [_told(store.get(f"resilient/told/{rank}")) for rank in range(group_size)]
        store.set("resilient/agreed", json.dumps(_decided(everyone)))
    decided = json.loads(store.get("resilient/agreed"))
    if "problem" in decided:
        raise UsageError(decided["problem"])
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in decided.items()}
    return Agreed(**values)


def _told(text: bytes) -> Told:
    return Told(**json.loads(text))


def _decided(everyone: Sequence[Told]) -> dict[str, Any]:
    """From what the nodes have told, in order of rank. The node that has seen the newest life knows best."""
    commands = {told.command: told.node for told in everyone}
    if len(commands) > 1:
        places = ", ".join(sorted(commands.values()))
        problem = (
            f"two different commands met in one rendezvous (on {places}): two jobs have the same --rdzv-id and "
            "endpoint; give one of them another"
        )
        return {"problem": problem}
    newest = max(everyone, key=lambda told: told.life)
    nodes = [told.node for told in everyone]
    token = newest.token or next((told.token for told in everyone if told.token), None) or new_token()
    return asdict(
        Agreed(
            life=newest.life + 1,
            token=token,
            launch=newest.launch or secrets.token_hex(8),
            nodes=tuple(nodes),
            lost=tuple(node for node in newest.nodes if node not in nodes),
            new=tuple(node for node in nodes if newest.nodes and node not in newest.nodes),
        )
    )


def announce_failure(store: dist.Store, failure: Mapping[str, Any]) -> Mapping[str, Any]:
    """Tell all nodes of this round that its life is over; returns the first failure that was told, ours or another's.

    Whoever notices first is nearest to the cause: peers of a dead rank fail later. Does not raise.
    """
    try:
        first: Mapping[str, Any] = json.loads(store.compare_set(_BROKEN, "", json.dumps(dict(failure))))
    except (RuntimeError, ValueError):
        return failure
    return first


def announced_failure(store: dist.Store) -> Mapping[str, Any] | None:
    """The failure that some node has told of in this round, if any. Raises RuntimeError when the store is gone."""
    if not store.check([_BROKEN]):
        return None
    told: Mapping[str, Any] = json.loads(store.get(_BROKEN))
    return told


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
