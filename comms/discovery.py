"""The network as hosts find it out by probes: which of them share a leaf, and which spines lie between.

    survey    one host probes the others: routers on the way, by TTL, from several source ports
    merge     what all hosts have found, as a Topology: pure
    meet      ranks of a job do both through the job's store

Hosts with no more than one way between them share a leaf. Elsewhere the router in the middle of the way is the path. It
answers each leaf from another interface; that two answers are of one router follows from the next router on the way,
which answers from the other end of a cable, so from the same subnet of two (RFC 3021) or four addresses. Where that
does not give a whole picture, or nobody answers, flows are spread by chance, and `known` says so.
"""

import ipaddress
import json
import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from resilient.comms.probe import ask, some_ports
from resilient.comms.topology import PathInfo, Topology
from resilient.errors import UsageError

LIMIT_S = 10.0
_MOST_ROUTERS = 6
_PROBED_PORT = 9  # discard: nobody listens, so what arrives is refused
_AT_ONCE = 16
_MOST_PORTS = 512
_SOURCE = "probes"


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """From the surveying host to another. `routers`: on the way, None where nobody has arrived within the time.

    `middle`: for each router in the middle, the one behind it, "" where that is the target or does not answer.
    """

    target: str
    routers: int | None
    middle: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """What `host` at `address` has found of the other hosts."""

    host: str
    address: str
    ways: tuple[Way, ...]


def survey(host: str, address: str, others: Mapping[str, str], *, limit_s: float = LIMIT_S) -> Survey:
    """Probe from `address` to the others' addresses. Blocks for up to about `limit_s`, without answers for less.

    Raises OSError where nothing can be sent.
    """
    end, chooser = time.monotonic() + limit_s, random.Random()
    ways = []
    for name, target in others.items():
        if name != host:
            ways.append(_way(address, name, target, chooser, end))
    return Survey(host=host, address=address, ways=tuple(ways))


def _way(source: str, name: str, target: str, chooser: random.Random, end: float) -> Way:
    at = (target, _PROBED_PORT)
    routers = _distance(source, at, chooser, end)
    if not routers:
        return Way(target=name, routers=routers, middle={})
    middle: dict[str, str] = {}
    ttl, asked, last_new = _middle(routers), 0, 0
    while asked < min(_MOST_PORTS, last_new + _AT_ONCE * max(1, len(middle) // 2)) and time.monotonic() < end:
        new: dict[str, int] = {}
        for answer in ask(source, dict.fromkeys(some_ports(_AT_ONCE, chooser), ttl), at):
            if answer.router is not None and answer.router not in middle:
                new.setdefault(answer.router, answer.port)
        asked += _AT_ONCE
        if new:
            last_new = asked
            middle |= _behind(source, new, at, ttl + 1)
    return Way(target=name, routers=routers, middle=middle)


def _behind(source: str, ports: Mapping[str, int], target: tuple[str, int], ttl: int) -> dict[str, str]:
    """The next routers on the same flows."""
    asked = dict.fromkeys(ports.values(), ttl)
    found = {answer.port: answer.router or "" for answer in ask(source, asked, target)}
    return {router: found.get(port, "") for router, port in ports.items()}


def _distance(source: str, target: tuple[str, int], chooser: random.Random, end: float) -> int | None:
    """Routers on the way; a TTL of one more arrives."""
    if time.monotonic() > end:
        return None
    ports = some_ports(2 * (_MOST_ROUTERS + 1), chooser)
    ttls = {port: 1 + number // 2 for number, port in enumerate(ports)}
    return min((ttls[answer.port] - 1 for answer in ask(source, ttls, target) if answer.arrived), default=None)


def _middle(routers: int) -> int:
    """The TTL with which a probe dies in the middle: at the spine, where leaves are routers or not."""
    return (routers + 1) // 2


def merge(surveys: Sequence[Survey]) -> Topology:
    """What hosts have found together. With one survey alone, paths are as that host sees them.

    Raises UsageError where hosts have not reached one another at all.
    """
    addresses = {survey.host: (survey.address,) for survey in surveys}
    hosts = sorted({*addresses, *(way.target for survey in surveys for way in survey.ways)})
    unreached = [(survey.host, way.target) for survey in surveys for way in survey.ways if way.routers is None]
    crossing = [(survey.host, way) for survey in surveys for way in survey.ways if not _near(way)]
    leaves = _leaves(hosts, surveys)
    paths, why = _paths(surveys, leaves, crossing)
    if paths and not unreached:
        ttl = max(_middle(way.routers or 0) for _, way in crossing)
        return Topology(
            paths=paths, known="flow", leaves=leaves, addresses=addresses, source=_SOURCE, ttl=ttl, reason=why
        )
    if unreached:
        one, other = unreached[0]
        why = f"probes from {one} have not arrived at {other} (in time, over up to {_MOST_ROUTERS} routers)"
        leaves = {}
    count = max([1, *(len(way.middle) for _, way in crossing)])
    unknown = tuple(PathInfo(name=f"path{number}") for number in range(count))
    return Topology(paths=unknown, known="hash", leaves=leaves, addresses=addresses, source=_SOURCE, reason=why)


def _near(way: Way) -> bool:
    """Whether there is one way only: no router, or one and the same."""
    return way.routers == 0 or (way.routers == 1 and len(way.middle) <= 1)


def _leaves(hosts: Sequence[str], surveys: Sequence[Survey]) -> dict[str, str]:
    """Hosts that are near one another, or behind the same last routers as seen from one place."""
    together = _Sets(hosts)
    for one in surveys:
        behind: dict[str, str] = {}
        for way in one.ways:
            if _near(way):
                together.join(one.host, way.target)
                continue
            for last in filter(None, way.middle.values()):
                together.join(way.target, behind.setdefault(last, way.target))
    return {host: f"leaf of {together.first(host)}" for host in hosts}


def _paths(
    surveys: Sequence[Survey], leaves: Mapping[str, str], crossing: Sequence[tuple[str, Way]]
) -> tuple[tuple[PathInfo, ...], str]:
    """Which answers are of one router; none, and why, where that remains open."""
    if not crossing:
        return (), "all hosts share a leaf"
    seen: dict[str, set[str]] = defaultdict(set)
    for host, way in crossing:
        seen[leaves[host]] |= set(way.middle)
    if not all(seen.values()):
        leaf = next(leaf for leaf, routers in seen.items() if not routers)
        return (), f"the routers between leaves do not answer probes from hosts on the {leaf}"
    same = _Sets(sorted({address for routers in seen.values() for address in routers}))
    for _, way in crossing:
        for router, behind in way.middle.items():
            other = next((end for end in _other_ends(behind) if end in same.members), None)
            if other is not None:
                same.join(router, other)
    classes = same.classes()
    if len(seen) > 1 and any(
        sum(address in routers for address in members) != 1 for members in classes for routers in seen.values()
    ):
        return (), (
            f"which answers of {len(same.members)} addresses are of one router does not follow from them: "
            "describe the network in a file"
        )
    rows = sorted(classes, key=lambda members: min(map(ipaddress.IPv4Address, members)))
    return tuple(PathInfo(name=f"via {members[0]}", hops=tuple(members)) for members in rows), "every path has answered"


def _other_ends(address: str) -> Iterator[str]:
    """What the other end of its cable may be called, in a subnet of two addresses, or of four."""
    if address:
        number = int(ipaddress.IPv4Address(address))
        yield str(ipaddress.IPv4Address(number ^ 1))
        if number % 4 in (1, 2):
            yield str(ipaddress.IPv4Address(number ^ 3))


class _Sets:
    """Disjoint sets; each is known by its first member in order."""

    def __init__(self, members: Iterable[str]) -> None:
        self.members = list(members)
        self._parent = {member: member for member in self.members}

    def first(self, member: str) -> str:
        while self._parent[member] != member:
            member = self._parent[member]
        return member

    def join(self, one: str, other: str) -> None:
        low, high = sorted((self.first(one), self.first(other)), key=self.members.index)
        self._parent[high] = low

    def classes(self) -> list[list[str]]:
        found: dict[str, list[str]] = defaultdict(list)
        for member in self.members:
            found[self.first(member)].append(member)
        return list(found.values())


class Store(Protocol):
    """What is asked of a torch.distributed store."""

    def set(self, key: str, value: str, /) -> Any: ...

    def get(self, key: str, /) -> bytes: ...


def meet(
    store: Store, rank: int, size: int, *, host: str, address: Callable[[], str], limit_s: float = LIMIT_S
) -> Topology:
    """All ranks of a job find the network out together; the first rank of each host probes. The same on all of them.

    Blocks until all are there, and up to `limit_s` for probes. Raises UsageError, on all alike, where hosts are
    unclear (one name with two addresses), or `address` has raised it on any rank.
    """
    try:
        own = [host, address(), ""]
    except (UsageError, OSError) as error:
        own = [host, "", str(error)]
    store.set(f"survey/at/{rank}", json.dumps(own))
    said = [json.loads(store.get(f"survey/at/{other}")) for other in range(size)]
    lost = next((f"rank {number} ({name}): {error}" for number, (name, _, error) in enumerate(said) if error), None)
    if lost is not None:
        raise UsageError(lost)
    at: list[tuple[str, str]] = [(name, given) for name, given, _ in said]
    where = dict(reversed(at))
    for number, (name, given) in enumerate(at):
        if where[name] != given:
            raise UsageError(
                f"host {name!r} has two addresses, {where[name]} and {given} of rank {number}; "
                "set RESILIENT_NODE to a name of its own on each host"
            )
    probing = {name: [one for one, _ in at].index(name) for name in where}
    if probing[host] == rank:
        try:
            found = as_data(survey(host, own[1], where, limit_s=limit_s))
        except OSError as error:
            found = {"error": f"rank {rank} ({host}): no probes can be sent from {own[1]}: {error}"}
        store.set(f"survey/{rank}", json.dumps(found))
    rows = [json.loads(store.get(f"survey/{number}")) for number in sorted(probing.values())]
    wrong = next((row["error"] for row in rows if "error" in row), None)
    if wrong is not None:
        raise UsageError(wrong)
    return merge([from_data(row) for row in rows])


def as_data(survey: Survey) -> dict[str, Any]:
    """As JSON can hold it."""
    ways = [{"target": way.target, "routers": way.routers, "middle": dict(way.middle)} for way in survey.ways]
    return {"host": survey.host, "address": survey.address, "ways": ways}


def from_data(data: Mapping[str, Any]) -> Survey:
    ways = tuple(Way(target=row["target"], routers=row["routers"], middle=row["middle"]) for row in data["ways"])
    return Survey(host=data["host"], address=data["address"], ways=ways)
