"""What the user wants, and whether lanes are worth having in a group: pure.

RESILIENT_TOPOLOGY           what the paths are: see `resilient.comms.topology.load`; or `discover`, `discover:eth0`
RESILIENT_NODE               what this host is called there; the host name if not set
RESILIENT_STRIPE_FROM        bytes from which on a tensor is striped; smaller ones go over gloo
RESILIENT_NET_STATUS         a folder into which each rank writes the state of its lanes, for `resilient net watch`
"""

import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from resilient.comms.fabric import Fabric
from resilient.errors import UsageError

STRIPE_FROM = 1 << 20
_SIZES = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30}


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """`topology`: its description, "" for none. `master`: a host of the job. `stripe_from`: bytes."""

    topology: str = ""
    host: str = ""
    master: str = "localhost"
    stripe_from: int = STRIPE_FROM
    status: str = ""

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> "Options":
        """Raises UsageError for a size that is none."""
        return cls(
            topology=environment.get("RESILIENT_TOPOLOGY", ""),
            host=environment.get("RESILIENT_NODE") or socket.gethostname(),
            master=environment.get("MASTER_ADDR") or "localhost",
            stripe_from=_size(environment.get("RESILIENT_STRIPE_FROM") or str(STRIPE_FROM)),
            status=environment.get("RESILIENT_NET_STATUS", ""),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What a group uses, and why."""

    action: Literal["gloo", "lanes"]
    reason: str


def decide(hosts: Sequence[str], fabric: Fabric | None) -> Decision:
    """Whether a group of ranks on `hosts` gets lanes; `fabric` is None where nothing is known of the network."""
    if fabric is None:
        return Decision(action="gloo", reason="no topology is given; set RESILIENT_TOPOLOGY")
    if len(set(hosts)) < 2:
        return Decision(action="gloo", reason=f"all ranks are on {hosts[0]}, and nothing leaves a host")
    if len({fabric.leaf_of[rank] for rank in range(len(hosts))}) < 2:
        return Decision(action="gloo", reason="all ranks are behind one switch: there is one path")
    if fabric.paths < 2:
        return Decision(action="gloo", reason="there is one path")
    return Decision(action="lanes", reason=f"{fabric.paths} paths between {len(set(hosts))} hosts")


def _size(text: str) -> int:
    number = text.strip().lower().removesuffix("ib").removesuffix("b")
    unit = number[-1:] if number[-1:] in ("k", "m", "g") else ""
    try:
        return int(float(number.removesuffix(unit)) * _SIZES[unit])
    except ValueError:
        raise UsageError(f"RESILIENT_STRIPE_FROM is {text!r}; give a number of bytes, as 262144, 256k or 1m") from None
