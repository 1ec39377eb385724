"""NCCL on several paths: what it can be told, as environment variables, and why. Pure; nothing is set here.

NCCL places its own flows. Over InfiniBand and RoCE each connection is cut over queue pairs, whose UDP source ports
differ, so that switches which hash (ECMP) spread them; rings of different channels may use different NICs. What it
cannot be told is which spine a queue pair takes. So of the planner's two halves, cutting and placing, NCCL gets the
first, and with it what random cutting wins (see docs/collectives.md).

Names and meanings are those of NCCL's documentation of its environment variables.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import gcd

from resilient.comms.topology import Topology

_MOST_PAIRS = 16  # queue pairs cost memory on the NIC
_MOST_SOCKETS = 64  # NCCL's own limit for the product of threads and sockets


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """A variable, its value and the reason."""

    name: str
    value: str
    reason: str


def settings(topology: Topology, *, flows: int = 1, sockets: bool = False) -> tuple[Setting, ...]:
    """For a job whose steps send `flows` equal flows out of each leaf. `sockets`: NCCL over TCP, not over verbs."""
    paths = len(topology.paths)
    if topology.known == "interface":
        return _planes(topology, sockets)
    pieces = paths // gcd(flows, paths)
    if sockets:
        threads = min(4, pieces)
        each = max(1, min(-(-pieces // threads), _MOST_SOCKETS // threads))
        return (
            Setting(name="NCCL_SOCKET_NTHREADS", value=str(threads), reason="threads a connection, each with sockets"),
            Setting(
                name="NCCL_NSOCKS_PERTHREAD",
                value=str(each),
                reason=f"{threads * each} sockets a connection: a flow is cut into {pieces} for {paths} paths",
            ),
        )
    pairs = min(pieces, _MOST_PAIRS)
    return (
        Setting(
            name="NCCL_IB_QPS_PER_CONNECTION",
            value=str(pairs),
            reason=f"{flows} equal flows a leaf over {paths} paths: {pieces} pieces each reach the load of spraying",
        ),
        Setting(
            name="NCCL_IB_SPLIT_DATA_ON_QPS",
            value="1",
            reason="each message is cut over all queue pairs; otherwise whole messages take turns",
        ),
    )


def as_environment(found: tuple[Setting, ...]) -> Mapping[str, str]:
    """The variables alone."""
    return {setting.name: setting.value for setting in found}


def _planes(topology: Topology, sockets: bool) -> tuple[Setting, ...]:
    names = ",".join(path.interface or path.name for path in topology.paths)
    devices = Setting(
        name="NCCL_SOCKET_IFNAME" if sockets else "NCCL_IB_HCA",
        value=f"={names}",
        reason="these devices and no others; = means exactly these names",
    )
    cross = Setting(
        name="NCCL_CROSS_NIC",
        value="0",
        reason="each plane is a network of its own: a ring must stay on one NIC number on all hosts",
    )
    return devices, cross
