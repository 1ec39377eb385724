"""Failure domains of nodes, for `groups.decide_groups`: what is likely to fail together. Pure: facts in, reason out.

Asked in this order: a TOML file that the user wrote, what SLURM tells each node of its job, SLURM's topology as text,
and the numbers in the host names. The first that knows is taken, for all nodes alike, so that all take one decision.
"""

import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from resilient.ec.groups import Node
from resilient.ec.hostlist import expand
from resilient.errors import UsageError

_Known = Mapping[str, tuple[str, ...]]  # node -> domains, from the widest to the narrowest
_LEAVES, _PARENTS, _IGNORED = ("switchname", "blockname"), "switches", ("blocksizes", "aggregatedblock")


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """One node: its name and, from its own environment, SLURM_TOPOLOGY_ADDR and SLURM_TOPOLOGY_ADDR_PATTERN."""

    name: str
    address: str = ""
    pattern: str = ""


@dataclass(frozen=True, slots=True)
class Document:
    """A text, and what to call it in messages: a path or a command."""

    name: str
    text: str


@dataclass(frozen=True, slots=True)
class Domains:
    """The nodes in the order they were given. `reason` says where their domains come from, or why there are none."""

    nodes: tuple[Node, ...]
    reason: str


def host_of(name: str, environment: Mapping[str, str]) -> Host:
    """This node, as it tells the others; `environment` is its own, inside a SLURM job or not."""
    return Host(
        name=name,
        address=environment.get("SLURM_TOPOLOGY_ADDR", ""),
        pattern=environment.get("SLURM_TOPOLOGY_ADDR_PATTERN", ""),
    )


def decide_domains(hosts: Sequence[Host], *, file: Document | None = None, topology: Document | None = None) -> Domains:
    """The domains of all nodes, from one source. Every rank takes the same decision from the same facts.

    `file` is for `parse_file`, `topology` for `parse_topology`. A node that a file does not name has no domains.
    Raises UsageError for texts that cannot be understood, or a file that names none of the nodes.
    """
    if file is not None:
        return _looked_up(hosts, parse_file(file), f"domains from {file.name}", must=True)
    known, why_not = _by_slurm(hosts)
    if known:
        return _looked_up(hosts, known, "domains from SLURM_TOPOLOGY_ADDR")
    if topology is not None:
        found = _looked_up(hosts, parse_topology(topology), f"domains from {topology.name}")
        if any(node.domains for node in found.nodes):
            return found
        why_not += f"; {topology.name} names none of the nodes"
    known = _by_names(hosts)
    if known:
        example = next(iter(known.values()))[-1]
        return _looked_up(hosts, known, f"domains from the numbers in host names, such as {example!r} ({why_not})")
    return Domains(tuple(Node(host.name) for host in hosts), f"no domains: {why_not}; host names do not tell any")


def parse_file(file: Document) -> dict[str, tuple[str, ...]]:
    """A TOML file: `[nodes]`, then `"n[1-4]" = ["row 2", "switch 7"]` for one or more nodes, the widest domain first.

    Raises UsageError with the line: of TOML that is none, of a node named twice, of other than the same levels for all.
    """
    try:
        nodes = tomllib.loads(file.text).get("nodes")
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{file.name}: {error}") from error
    if not isinstance(nodes, dict):
        raise UsageError(f'{file.name}: there is no table [nodes] with lines such as "n1" = ["row 2", "switch 7"]')
    known: dict[str, tuple[str, ...]] = {}
    first = ""
    for expression, value in nodes.items():
        where = f"{file.name}, line {_line_of(expression, file.text)}"
        domains = _checked(value, expression, where)
        first = first or expression
        if len(domains) != len(_checked(nodes[first], first, where)):
            raise UsageError(
                f"{where}: {expression!r} has {len(domains)} domains and {first!r} has {len(nodes[first])}: "
                "name the same levels for all nodes, the widest first"
            )
        _add(known, _names(expression, where), domains, where)
    return known


def _checked(value: Any, expression: str, where: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(name, str) and name.strip() for name in value):
        raise UsageError(f"{where}: {expression!r} needs a list of names of domains, such as ['row 2', 'switch 7']")
    return tuple(value)


def _line_of(key: str, text: str) -> int | str:
    """Where a key of TOML stands; the parser does not say."""
    pattern = re.compile(rf"""^\s*["']?{re.escape(key)}["']?\s*=""")
    return next((number for number, line in enumerate(text.splitlines(), 1) if pattern.search(line)), "?")


def parse_topology(topology: Document) -> dict[str, tuple[str, ...]]:
    """SLURM's topology.conf, or what `scontrol show topology` prints: switches in a tree, or blocks.

    A node or switch below several at once has them together as its domain, `s1,s2`. Raises UsageError with the line.
    """
    leaves: dict[str, list[str]] = {}
    parents: dict[str, list[str]] = {}
    for where, entry in _entries(topology):
        name = next((entry[key] for key in _LEAVES if key in entry), None)
        if name is None:
            if not any(key in entry for key in _IGNORED):
                raise UsageError(f"{where}: neither SwitchName= nor BlockName= is there")
            continue
        below, under = (leaves, "nodes") if not _given(entry, _PARENTS) else (parents, _PARENTS)
        for child in _names(entry[under], where) if _given(entry, under) else ():
            below.setdefault(child, []).append(name)
    return {node: _path(tuple(sorted(set(switches))), parents, topology.name) for node, switches in leaves.items()}


def _entries(document: Document) -> Iterable[tuple[str, dict[str, str]]]:
    """Each line as its `key=value` pairs, keys in lower case; without comments, and lines that go on joined."""
    begun, text = 0, ""
    for number, raw in enumerate(document.text.splitlines(), 1):
        begun = begun if text else number
        text += raw.partition("#")[0].rstrip()
        if text.endswith("\\"):
            text = text[:-1] + " "
            continue
        where = f"{document.name}, line {begun}"
        entry: dict[str, str] = {}
        for word in text.split():
            key, sign, value = word.partition("=")
            if not sign or not key:
                raise UsageError(f"{where}: {word!r} is not of the form key=value")
            entry[key.lower()] = value
        if entry:
            yield where, entry
        text = ""


def _given(entry: Mapping[str, str], key: str) -> bool:
    return entry.get(key, "") not in ("", "(null)")


def _path(switches: tuple[str, ...], parents: Mapping[str, list[str]], where: str) -> tuple[str, ...]:
    """From the widest to the switches themselves."""
    found: list[str] = []
    while switches:
        found.insert(0, ",".join(switches))
        if len(found) > len(parents) + 1:
            raise UsageError(f"{where}: switch {found[0]!r} is below itself")
        switches = tuple(sorted({parent for switch in switches for parent in parents.get(switch, ())}))
    return tuple(found)


def _names(expression: str, where: str) -> list[str]:
    try:
        return expand(expression)
    except ValueError as error:
        raise UsageError(f"{where}: {error}") from error


def _add(known: dict[str, tuple[str, ...]], names: Iterable[str], domains: tuple[str, ...], where: str) -> None:
    for name in names:
        if name in known:
            raise UsageError(f"{where}: node {name!r} is named for the second time")
        known[name] = domains


def _by_slurm(hosts: Sequence[Host]) -> tuple[_Known, str]:
    """What each node's own environment says, if all say it in the same form; else why not."""
    known: dict[str, tuple[str, ...]] = {}
    for host in hosts:
        if not host.address:
            return {}, f"{host.name} has no SLURM_TOPOLOGY_ADDR"
        levels = host.pattern.split(".")
        parts = host.address.split(".", len(levels) - 1)  # the node comes last, and its name may have dots
        if levels[-1] != "node" or len(parts) != len(levels):
            return {}, f"SLURM_TOPOLOGY_ADDR {host.address!r} of {host.name} does not fit {host.pattern!r}"
        known[host.name] = tuple(parts[:-1])
    if not any(known.values()):
        return {}, "SLURM_TOPOLOGY_ADDR names no switches"
    return known, ""


def _by_names(hosts: Sequence[Host]) -> _Known:
    """`rack3-chassis1-node7` is in `rack3` and in `rack3-chassis1`, if all names are made like that.

    A guess, so a number that is the same for all or another for each is left out, and addresses (ip-10-0-3-17) are.
    """
    split = {host.name: re.split(r"(\d+)", host.name.partition(".")[0]) for host in hosts}
    forms = {tuple(parts[::2]) for parts in split.values()}
    if len(forms) != 1 or forms == {("ip-", "-", "-", "-", "")}:
        return {}
    depth = len(next(iter(forms))) - 2  # the last number is the node's
    ends = []
    for end in range(2, 2 * depth + 2, 2):
        distinct = {tuple(parts[:end]) for parts in split.values()}
        if 1 < len(distinct) < len(split):
            ends.append(end)
    if not ends:
        return {}
    return {name: tuple("".join(parts[:end]) for end in ends) for name, parts in split.items()}


def _looked_up(hosts: Sequence[Host], known: _Known, source: str, *, must: bool = False) -> Domains:
    """Each host by its name, or by its name without the part behind the first dot."""
    nodes = tuple(Node(host.name, known.get(host.name) or known.get(host.name.partition(".")[0], ())) for host in hosts)
    missing = [node.name for node in nodes if not node.domains]
    if must and hosts and len(missing) == len(hosts):
        raise UsageError(f"{source.removeprefix('domains from ')} names none of the nodes, such as {missing[0]!r}")
    if not missing:
        return Domains(nodes, source)
    rest = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
    return Domains(nodes, f"{source}, which does not name {', '.join(missing[:3])}{rest}")
