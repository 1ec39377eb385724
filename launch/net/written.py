"""Topologies that are made rather than written: from SLURM's description, or from this host's probes."""

import json
import socket
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from resilient.comms.discovery import Survey, from_data, merge, survey
from resilient.comms.topology import USUAL_RATE, PathInfo, Topology
from resilient.ec.domains import Document, parse_topology
from resilient.errors import UsageError


def from_slurm(text: str, name: str, paths: int, rate: float = USUAL_RATE) -> Topology:
    """Leaves from topology.conf, or what `scontrol show topology` prints; how many paths join them the user says.

    Raises UsageError with the line that cannot be understood.
    """
    domains = parse_topology(Document(name, text))
    leaves = {node: switches[-1] for node, switches in domains.items() if switches}
    if not leaves:
        raise UsageError(f"{name} names no nodes below switches")
    return Topology(
        paths=tuple(PathInfo(name=f"spine{number}", rate=rate) for number in range(paths)),
        known="hash",
        leaves=leaves,
        source=name,
        reason="SLURM says nothing of what lies between leaves",
    )


def from_probes(host: str, address: str, targets: Mapping[str, str], limit_s: float) -> tuple[Survey, Topology]:
    """As seen from this host alone. Blocks for up to about `limit_s`. Raises OSError where nothing can be sent."""
    found = survey(host, address, targets, limit_s=limit_s)
    topology = merge([found])
    given = {name: (target,) for name, target in targets.items()}
    return found, replace(topology, addresses={**given, **topology.addresses})


def from_surveys(paths: Sequence[Path]) -> Topology:
    """What `resilient net probe --json` has printed on several hosts, together. Raises UsageError naming the file."""
    surveys = []
    for path in paths:
        try:
            surveys.append(from_data(json.loads(path.read_text())["survey"]))
        except OSError as error:
            raise UsageError(f"cannot read {path}: {error.strerror}") from None
        except (ValueError, KeyError, TypeError):
            raise UsageError(f"{path} is not what `resilient net probe --json` prints") from None
    return merge(surveys)


def named(targets: Sequence[str]) -> dict[str, str]:
    """`NAME=ADDRESS`, or an address or a host name alone. Raises UsageError for names that nobody knows."""
    found = {}
    for target in targets:
        name, sign, address = target.partition("=")
        try:
            found[name] = socket.gethostbyname(address if sign else name)
        except OSError as error:
            raise UsageError(f"{target}: the name is not known here ({error})") from None
    return found
