"""The network that ranks are told of, or find: which leaf each host is on, and which paths there are.

Described in a TOML file, by interfaces (`interfaces:eth0,eth1`, one path each), or found out by the ranks of a job
(`discover`, see `discovery.py`). What is known of a path is said, and a plan never claims more:

    interface   every path is an interface of its own: a flow takes the one that it is bound to
    flow        switches choose by a hash of addresses and ports, and a probe tells which path a port leads to
    hash        switches choose, and do not tell: flows are spread by chance

    [leaves]                                    # hosts by the switch that they are plugged into
    leaf0 = ["host0", "host1"]
    [addresses]                                 # where they listen; one for each interface that is used
    host0 = ["10.1.0.2"]
    [[paths]]
    name = "spine0"
    rate = "100gbit"                            # of one leaf's link to it, each way
    hops = ["10.255.0.2", "10.255.1.2"]         # with which addresses it answers probes
    [[paths]]
    name = "plane1"
    interface = "eth1"
"""

import fcntl
import json
import re
import socket
import struct
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from resilient.comms.fabric import Fabric
from resilient.comms.lanes.wiring import Planes, Spines
from resilient.comms.probe import SPINE_TTL, Finder, OrChance, any_port
from resilient.errors import UsageError

Known = Literal["interface", "flow", "hash"]
USUAL_RATE = 12.5e9  # bytes a second of a path whose rate nobody told: 100 Gbit/s. Only what a step costs depends on it
DISCOVER = "discover"
_SIOCGIFADDR = 0x8915
_MOST_TTL = 16
_RATE = re.compile(r"([0-9]+(?:\.[0-9]+)?) *([kmgt]?)(bit|bps)", re.IGNORECASE)
_UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}


@dataclass(frozen=True, slots=True, kw_only=True)
class PathInfo:
    """`rate` in bytes a second; `hops`: the addresses by which it answers probes."""

    name: str
    interface: str | None = None
    rate: float = USUAL_RATE
    hops: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Topology:
    """`leaves`: host -> leaf, empty where every host is on its own; `addresses`: host -> addresses, as far as given.

    `interface`: whose address lanes take on hosts that `addresses` does not have; `ttl`: with which a probe dies at the
    router that a path is; `source`: where this stands, for messages; `reason`: why no more is known. Raises UsageError
    for paths that do not fit together.
    """

    paths: tuple[PathInfo, ...]
    known: Known
    leaves: Mapping[str, str] = field(default_factory=dict)
    addresses: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    interface: str = ""
    nic: float | None = None
    ttl: int = SPINE_TTL
    source: str = ""
    reason: str = ""

    def __post_init__(self) -> None:
        if not self.paths:
            raise UsageError(f"{self.source}: no paths; a topology needs a [[paths]] table for each")
        names = [path.name for path in self.paths]
        if len(set(names)) < len(names):
            raise UsageError(f"{self.source}: two paths have one name, of {names}")

    def fabric(self, hosts: Sequence[str]) -> Fabric:
        """For ranks on `hosts`, in the order of ranks. Raises UsageError for a host that is not in it."""
        if self.known == "interface" or not self.leaves:
            names = {host: host for host in hosts}
        else:
            missing = sorted({host for host in hosts if host not in self.leaves})
            if missing:
                raise UsageError(
                    f"{self.source} says nothing of host {missing[0]!r}; add it to [leaves], or set RESILIENT_NODE to "
                    f"what it is called there: {', '.join(sorted(self.leaves)[:8])}"
                )
            names = {host: self.leaves[host] for host in hosts}
        order = {leaf: number for number, leaf in enumerate(sorted(set(names.values())))}
        rows = (tuple(path.rate for path in self.paths),) * len(order)
        return Fabric(leaf_of=tuple(order[names[host]] for host in hosts), up=rows, down=rows, nic=self.nic)

    def wiring(self, host: str) -> Planes | Spines:
        """How a rank on `host` reaches the paths. Raises UsageError where no address is known, or not one for each."""
        addresses = self._addresses(host)
        if self.known == "interface":
            return Planes(addresses)
        if self.known == "hash":
            return Spines(addresses[0], len(self.paths), any_port)
        finder = Finder([path.hops for path in self.paths], ttl=self.ttl)
        return Spines(addresses[0], len(self.paths), OrChance(finder))

    def _addresses(self, host: str) -> tuple[str, ...]:
        wanted = len(self.paths) if self.known == "interface" else 1
        given = self.addresses.get(host)
        if given is None and self.known == "interface":
            given = tuple(address_of(path.interface) for path in self.paths if path.interface is not None)
        elif given is None and self.interface:
            given = (address_of(self.interface),)
        if given is None:
            raise UsageError(
                f'{self.source} has no address of host {host!r}; add it to [addresses], or say interface = "eth0"'
            )
        if len(given) != wanted:
            raise UsageError(f"{self.source}: host {host!r} has {len(given)} addresses, and {wanted} are needed")
        return given


def load(description: str) -> Topology:
    """From what RESILIENT_TOPOLOGY says: `interfaces:NAME,NAME...` or the path of a TOML file.

    Raises UsageError for what cannot be read or understood; the message says where and what to do.
    """
    kind, sign, words = description.partition(":")
    if kind == DISCOVER:
        raise UsageError(f"{DISCOVER!r} needs the ranks of a job, which probe one another; here, name a file")
    if sign and kind == "slurm":
        raise UsageError(
            f"SLURM knows leaves, and not what lies between them: `resilient net write --slurm {words} --paths N` "
            "makes a file of it"
        )
    if sign and kind == "interfaces":
        return from_interfaces(words.split(","))
    return from_file(Path(description))


def from_interfaces(names: Sequence[str]) -> Topology:
    """A path for each interface. Rates are the devices' own, where they tell."""
    named = [name.strip() for name in names if name.strip()]
    source = f"interfaces:{','.join(named)}"
    if not named:
        raise UsageError(f"{source} names no interface; write for example interfaces:eth0,eth1")
    paths = tuple(PathInfo(name=name, interface=name, rate=_speed(name)) for name in named)
    return Topology(paths=paths, known="interface", source=source)


def from_file(path: Path) -> Topology:
    """Raises UsageError naming the file and the key."""
    try:
        content = tomllib.loads(path.read_text())
    except OSError as error:
        raise UsageError(f"cannot read the topology {path}: {error.strerror}; see RESILIENT_TOPOLOGY") from None
    except ValueError as error:
        raise UsageError(f"{path} is no TOML: {error}") from None
    return parse(content, str(path))


def parse(content: Mapping[str, Any], source: str) -> Topology:
    """From the tables of a file. Raises UsageError naming the key."""
    unknown = sorted(set(content) - {"leaves", "addresses", "paths", "interface", "nic", "ttl"})
    if unknown:
        raise UsageError(f"{source}: {unknown[0]!r} is no key; there are leaves, addresses, paths, interface, nic, ttl")
    paths = tuple(_path(row, f"{source}: path {number}") for number, row in enumerate(_rows(content, source)))
    if paths and all(path.interface for path in paths):
        known: Known = "interface"
    elif any(path.interface for path in paths):
        raise UsageError(f"{source}: either all paths have an interface, or none")
    else:
        known = "flow" if paths and all(path.hops for path in paths) else "hash"
    interface = content.get("interface", "")
    if not isinstance(interface, str):
        raise UsageError(f"{source}: interface is {interface!r}; give its name")
    leaves: dict[str, str] = {}
    for leaf, hosts in _table(content, "leaves", source).items():
        for host in _names(hosts, f"{source}: leaf {leaf}"):
            if leaves.setdefault(host, leaf) != leaf:
                raise UsageError(f"{source}: host {host!r} is on two leaves, {leaves[host]!r} and {leaf!r}")
    ttl = content.get("ttl", SPINE_TTL)
    if type(ttl) is not int or not 1 <= ttl <= _MOST_TTL:
        raise UsageError(f"{source}: ttl is {ttl!r}; it is the number of the router that a path is, from 1 on")
    addresses = {
        host: _names(rows, f"{source}: addresses of {host}")
        for host, rows in _table(content, "addresses", source).items()
    }
    reason = ""
    if known == "flow" and any(":" in address for rows in addresses.values() for address in rows):
        known, reason = "hash", "probes know IPv4 only"
    return Topology(
        paths=paths,
        known=known,
        leaves=leaves,
        addresses=addresses,
        interface=interface,
        nic=rate(content["nic"], f"{source}: nic") if "nic" in content else None,
        ttl=ttl,
        source=source,
        reason=reason,
    )


def as_toml(topology: Topology) -> str:
    """What `parse` reads. Strings are escaped as in JSON, which TOML allows."""
    lines = [] if topology.nic is None else [f"nic = {_said(topology.nic)}"]
    lines += [f"interface = {json.dumps(topology.interface)}"] if topology.interface else []
    lines += [] if topology.ttl == SPINE_TTL else [f"ttl = {topology.ttl}"]
    lines.append("[leaves]")
    for leaf in dict.fromkeys(topology.leaves.values()):
        hosts = [host for host, on in topology.leaves.items() if on == leaf]
        lines.append(f"{json.dumps(leaf)} = {json.dumps(hosts)}")
    lines.append("[addresses]")
    lines += [f"{json.dumps(host)} = {json.dumps(rows)}" for host, rows in topology.addresses.items()]
    for path in topology.paths:
        lines += ["[[paths]]", f"name = {json.dumps(path.name)}", f"rate = {_said(path.rate)}"]
        lines += [] if path.interface is None else [f"interface = {json.dumps(path.interface)}"]
        lines += [f"hops = {json.dumps(path.hops)}"] if path.hops else []
    return "\n".join(lines) + "\n"


def _said(rate: float) -> str:
    return f'"{8 * rate / 1e6:.12g}mbit"'


def rate(text: Any, where: str) -> float:
    """Bytes a second from "100gbit". Raises UsageError."""
    match = _RATE.fullmatch(text.strip()) if isinstance(text, str) else None
    if match is None or not float(match[1]):
        raise UsageError(f'{where}: {text!r} is no rate; write for example "100gbit" or "250mbit"')
    return float(match[1]) * _UNITS[match[2].lower()] / 8


def address_of(interface: str) -> str:
    """The IPv4 address of an interface of this host. Raises UsageError where it has none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            found = fcntl.ioctl(sock, _SIOCGIFADDR, struct.pack("256s", interface.encode()[:15]))
        except OSError as error:
            there = ", ".join(name for _, name in socket.if_nameindex())
            raise UsageError(f"interface {interface!r}: {error.strerror}; there are {there}") from None
    return socket.inet_ntoa(found[20:24])


def own_address(interface: str, towards: str) -> str:
    """That of an interface, or where none is named the one that leads towards a host. Raises UsageError."""
    if interface:
        return address_of(interface)
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.connect((towards, 9))  # sends nothing
            address: str = sock.getsockname()[0]
    except OSError as error:
        raise UsageError(f"no way leads to {towards!r}: {error}; name an interface, as {DISCOVER}:eth0") from None
    return address


def _speed(interface: str) -> float:
    try:
        speed = int((Path("/sys/class/net") / interface / "speed").read_text())
    except (OSError, ValueError):
        return USUAL_RATE
    return speed * 1e6 / 8 if speed > 0 else USUAL_RATE


def _rows(content: Mapping[str, Any], source: str) -> list[Any]:
    rows = content.get("paths", [])
    if not isinstance(rows, list):
        raise UsageError(f"{source}: paths is no array of tables; write [[paths]]")
    return rows


def _path(row: Any, where: str) -> PathInfo:
    if not isinstance(row, dict) or not isinstance(row.get("name"), str):
        raise UsageError(f"{where} has no name")
    unknown = sorted(set(row) - {"name", "interface", "rate", "hops"})
    if unknown:
        raise UsageError(f"{where}: {unknown[0]!r} is no key; there are name, interface, rate and hops")
    interface = row.get("interface")
    if interface is not None and not isinstance(interface, str):
        raise UsageError(f"{where}: interface is {interface!r}; give its name")
    return PathInfo(
        name=row["name"],
        interface=interface,
        rate=rate(row["rate"], where) if "rate" in row else USUAL_RATE,
        hops=_names(row.get("hops", []), f"{where}: hops"),
    )


def _table(content: Mapping[str, Any], key: str, source: str) -> dict[str, Any]:
    table = content.get(key, {})
    if not isinstance(table, dict):
        raise UsageError(f"{source}: {key} is no table; write [{key}]")
    return table


def _names(rows: Any, where: str) -> tuple[str, ...]:
    if not isinstance(rows, list) or not all(isinstance(row, str) for row in rows):
        raise UsageError(f"{where}: {rows!r} is no list of names")
    return tuple(rows)
