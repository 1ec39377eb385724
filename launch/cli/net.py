"""`resilient net`: the network as lanes see it. `launch/net/` does the work."""

import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from resilient.errors import UsageError
from resilient.launch.cli import options
from resilient.launch.cli.output import Exit, remark, size_text, tell, tell_facts, tell_json, tell_table

if TYPE_CHECKING:
    from resilient.comms.fabric import Fabric
    from resilient.comms.topology import Topology
    from resilient.launch.net.planned import Planned
    from resilient.launch.net.watching import Row

F = TypeVar("F", bound=Callable[..., Any])
_KNOWN = {
    "interface": "each path is an interface: flows take the one that they are bound to",
    "flow": "switches choose by the flow's ports, and probes tell which path a port leads to",
    "hash": "switches choose by a hash, and do not tell: flows are spread by chance",
}
_COLLECTIVES = ("all_reduce", "reduce_scatter", "all_gather", "all_to_all", "broadcast")


def _topology(function: F) -> F:
    return click.option(
        "--topology", "description", envvar="RESILIENT_TOPOLOGY", metavar="FILE|interfaces:NAME,...",
        help="The network; RESILIENT_TOPOLOGY if not given.",
    )(function)  # fmt: skip


@click.group()
def net() -> None:
    """Show the network's paths, probe them, plan a collective on them, and watch lanes at work (docs/net.md)."""


@net.command()
@_topology
@options.as_json
def show(description: str | None, as_json: bool) -> int:
    """What is known of the network: leaves, paths, rates, and whether a flow's path can be chosen."""
    topology = _loaded(description)
    leaves = _by_leaf(topology)
    if as_json:
        paths = [
            {"name": one.name, "interface": one.interface, "rate": one.rate, "hops": one.hops} for one in topology.paths
        ]
        tell_json({"known": topology.known, "leaves": leaves, "addresses": topology.addresses, "paths": paths})
        return Exit.OK
    tell_facts({"network": topology.source, "known": _KNOWN[topology.known], "because": topology.reason})
    for leaf, hosts in leaves.items():
        tell(f"{leaf}: {', '.join(hosts)}")
    rows = [[one.name, one.interface or "", _rate_text(one.rate), ", ".join(one.hops)] for one in topology.paths]
    tell_table(["path", "interface", "rate", "answers as"], rows, right=["rate"])
    return Exit.OK


@net.command()
@click.argument("targets", nargs=-1, required=True, metavar="[NAME=]ADDRESS...")
@click.option("--from", "source", metavar="ADDRESS", help="The address of this host to probe from.")
@click.option(
    "--patience",
    "patience_s",
    type=click.FloatRange(min=0.5),
    default=10.0,
    show_default=True,
    metavar="SECONDS",
    help="How long all probes may take.",
)
@click.option("--write", "writes", is_flag=True, help="Print a topology file instead.")
@options.as_json
def probe(targets: tuple[str, ...], source: str | None, patience_s: float, writes: bool, as_json: bool) -> int:
    """Find out which hosts share this one's leaf, and over which spines the way to the others leads.

    Probes are connection attempts that end at the routers on the way: no privilege is needed, and nothing arrives at
    the targets but an attempt to connect to port 9. Exit code 1: paths remain unknown.
    """
    from resilient.comms.discovery import as_data
    from resilient.comms.topology import as_toml
    from resilient.launch.net.written import from_probes, named

    known = named(targets)
    host = os.environ.get("RESILIENT_NODE") or socket.gethostname()
    found, topology = from_probes(host, source or _towards(next(iter(known.values()))), known, patience_s)
    if as_json:
        tell_json(
            {"known": topology.known, "reason": topology.reason, "leaves": topology.leaves, "survey": as_data(found)}
        )
    elif writes:
        tell(as_toml(topology).rstrip("\n"))
    else:
        rows = [
            [way.target, known[way.target], "-" if way.routers is None else way.routers, ", ".join(way.middle)]
            for way in found.ways
        ]
        tell_table(["host", "address", "routers", "in the middle"], rows, right=["routers"])
        for leaf, hosts in _by_leaf(topology).items():
            tell(f"{leaf}: {', '.join(hosts)}")
        crosses = len(set(topology.leaves.values())) > 1
        tell_facts({"known": _KNOWN[topology.known] if crosses else "", "because": topology.reason})
    return Exit.OK if topology.known == "flow" or len(set(topology.leaves.values())) == 1 else Exit.FOUND


@net.command()
@click.argument("collective", type=click.Choice(_COLLECTIVES))
@click.argument("size", metavar="SIZE")
@_topology
@click.option("--hosts", metavar="NAME,...", help="Where the ranks are; all of the topology's if not given.")
@click.option("--ranks-per-host", type=click.IntRange(min=1), default=1, show_default=True)
@click.option(
    "--slow",
    "faults",
    multiple=True,
    metavar="LEAF,PATH=SHARE",
    help="A link that has this share of its rate; 0: it has failed.",
)
@options.as_json
def plan(
    collective: str,
    size: str,
    description: str | None,
    hosts: str | None,
    ranks_per_host: int,
    faults: tuple[str, ...],
    as_json: bool,
) -> int:
    """How a collective of a tensor of SIZE ("64 MiB") is cut and placed, and how near that is to what is possible."""
    from resilient.launch.net.planned import planned

    topology = _loaded(description)
    names = [name.strip() for name in hosts.split(",")] if hosts else list(topology.leaves or topology.addresses)
    if not names:
        raise UsageError("the topology names no hosts; give --hosts")
    fabric = _faulty(topology.fabric([name for name in names for _ in range(ranks_per_host)]), faults)
    found = planned(fabric, collective, _bytes(size))
    if as_json:
        tell_json(_plan_data(found))
    else:
        _tell_plan(topology, fabric, found)
    return Exit.OK


@net.command()
@click.argument("folder", type=click.Path(path_type=Path), envvar="RESILIENT_NET_STATUS")
@click.option("--every", "every_s", type=click.FloatRange(min=0.1), default=1.0, show_default=True, metavar="SECONDS")
@click.option("--times", type=click.IntRange(min=1), help="How many tables to show; without end if not given.")
@options.as_json
def watch(folder: Path, every_s: float, times: int | None, as_json: bool) -> int:
    """What the lanes of this host's ranks carry right now; FOLDER is the job's RESILIENT_NET_STATUS."""
    from resilient.launch.net.watching import look, rows

    before = look(folder)
    shown = 0
    while times is None or shown < times:
        time.sleep(every_s)
        now = look(folder)
        _tell_lanes(rows(now, before), as_json=as_json)
        before, shown = now, shown + 1
    return Exit.OK


@net.command()
@click.argument("surveys", nargs=-1, type=click.Path(path_type=Path), metavar="[SURVEY]...")
@click.option(
    "--slurm", type=click.Path(path_type=Path), help="topology.conf, or what `scontrol show topology` prints."
)
@click.option("--paths", type=click.IntRange(min=1), help="With --slurm: how many spines join the leaves.")
@click.option("--rate", default="100gbit", show_default=True, help="Of a leaf's link to one of them.")
@click.option("--interface", default="eth0", show_default=True, help="Whose address lanes take on hosts without one.")
def write(surveys: tuple[Path, ...], slurm: Path | None, paths: int | None, rate: str, interface: str) -> int:
    """Print a topology file: from SLURM's leaves, or from SURVEYs, what `net probe --json` printed on several hosts."""
    from resilient.comms.topology import as_toml
    from resilient.comms.topology import rate as parsed
    from resilient.launch.net.written import from_slurm, from_surveys

    if bool(surveys) == (slurm is not None) or (slurm is not None and paths is None):
        raise UsageError("give either surveys, or --slurm FILE with --paths N")
    each = parsed(rate, "--rate")
    if slurm is not None:
        topology = from_slurm(slurm.read_text(), str(slurm), paths or 1, each)
    else:
        topology = from_surveys(surveys)
    remark(f"flows: {_KNOWN[topology.known]}; {topology.reason}")
    rated = [replace(path, rate=each) for path in topology.paths]
    tell(as_toml(replace(topology, paths=tuple(rated), interface=interface)).rstrip("\n"))
    return Exit.OK


def _loaded(description: str | None) -> "Topology":
    from resilient.comms.topology import load

    if not description:
        raise UsageError("no network is described; give --topology, or set RESILIENT_TOPOLOGY (docs/net.md)")
    return load(description)


def _by_leaf(topology: "Topology") -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for host, leaf in topology.leaves.items():
        found.setdefault(leaf, []).append(host)
    return found


def _towards(target: str) -> str:
    """This host's address on the way to a target."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.connect((target, 9))
        address: str = sock.getsockname()[0]
        return address


def _bytes(size: str) -> int:
    from resilient.policy import parse_bytes

    try:
        return parse_bytes(size) // 4 * 4
    except ValueError as error:
        raise UsageError(f'SIZE: {error}; write a number of bytes, or a size such as "64 MiB"') from error


def _faulty(fabric: "Fabric", faults: Sequence[str]) -> "Fabric":
    for fault in faults:
        where, _, share = fault.partition("=")
        try:
            leaf, path = (int(word) for word in where.split(","))
            fabric = fabric.with_rate(leaf, path, float(share) * fabric.up[leaf][path])
        except (ValueError, IndexError):
            raise UsageError(
                f"--slow {fault}: write LEAF,PATH=SHARE, as 0,2=0.25; there are {fabric.leaves} leaves and "
                f"{fabric.paths} paths, numbered from 0"
            ) from None
    return fabric


def _plan_data(found: "Planned") -> dict[str, Any]:
    return {
        "schedule": found.script,
        "reason": found.reason,
        "load_s": found.load_s,
        "bound_s": found.bound_s,
        "ratio": found.ratio,
        "stages": [
            {
                "times": stage.times,
                "flows": stage.flows,
                "bytes": stage.nbytes,
                "pieces": stage.certificate.pieces,
                "cut": stage.certificate.cut,
                "load_s": stage.certificate.load_s,
                "bound_s": stage.certificate.bound_s,
                "limit": stage.certificate.limit,
                "reason": stage.reason,
            }
            for stage in found.stages
        ],
        "links": {f"{way} {leaf} {path}": count for (way, leaf, path), count in sorted(found.bytes_on.items())},
    }


def _tell_plan(topology: "Topology", fabric: "Fabric", found: "Planned") -> None:
    from resilient.launch.net.planned import links

    tell_facts({"schedule": f"{found.script} ({found.reason})", "known": _KNOWN[topology.known]})
    tell_table(
        ["steps", "flows", "each", "pieces", "fullest link", "bound", "ratio", "set by", "placement"],
        [
            [
                stage.times,
                stage.flows,
                size_text(stage.nbytes),
                stage.certificate.pieces,
                _time_text(stage.certificate.load_s),
                _time_text(stage.certificate.bound_s),
                f"{stage.certificate.ratio:.3f}",
                stage.certificate.limit,
                stage.reason.partition(";")[0],
            ]
            for stage in found.stages
        ],
        right=["steps", "flows", "each", "pieces", "fullest link", "bound", "ratio"],
    )
    tell_table(
        ["link", *(path.name for path in topology.paths)],
        [
            [f"leaf {leaf} {way}", *(f"{size_text(count)}, {_time_text(seconds)}" for count, seconds in cells)]
            for way, leaf, cells in links(fabric, found)
        ],
    )
    tell(
        f"together {_time_text(found.load_s)}; no placement takes less than {_time_text(found.bound_s)}: "
        f"{found.ratio:.3f}"
    )
    if topology.known == "hash":
        tell("where paths cannot be chosen, this is what chance would have to hit")


def _tell_lanes(found: "Sequence[Row]", *, as_json: bool) -> None:
    from resilient.launch.net.watching import OLD_S

    if as_json:
        tell_json([asdict(row) for row in found])
        return
    if not found:
        tell("no rank writes here")
        return
    failures: Mapping[str, None] = dict.fromkeys(row.failure for row in found if row.failure)
    tell_table(
        ["group", "rank", "host", "path", "peers", "state", "sent", "rate", "as it should be"],
        [
            [
                row.group,
                row.rank,
                row.host,
                row.path,
                row.peers,
                row.state if row.age_s < OLD_S else f"gone? {row.age_s:.0f} s old",
                size_text(row.nbytes),
                "" if row.rate is None else f"{size_text(int(row.rate))}/s",
                f"{row.factor:.0%}",
            ]
            for row in found
        ],
        right=["rank", "path", "peers", "sent", "rate", "as it should be"],
    )
    for failure in failures:
        tell(f"failed: {failure}")


def _rate_text(rate: float) -> str:
    mbit = rate * 8 / 1e6
    return f"{mbit / 1000:g} Gbit/s" if mbit >= 1000 else f"{mbit:g} Mbit/s"


def _time_text(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"
