"""The ranks of a group agree, through its store, on what they use, and open lanes.

Rank 0 reads what all say of themselves, decides, and publishes the fabric and the decision: so all plan for the same,
and what is wrong on one rank is an error on all.
"""

import json
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from resilient.comms.backend.options import Decision, Options, decide
from resilient.comms.backend.striped import Striped
from resilient.comms.discovery import meet
from resilient.comms.fabric import Fabric
from resilient.comms.lanes.meeting import Store
from resilient.comms.lanes.opening import open_lanes
from resilient.comms.topology import DISCOVER, Topology, load, own_address
from resilient.errors import UsageError


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """`striped` is None where the group goes without lanes."""

    decision: Decision
    striped: Striped | None


def open_group(store: Store, rank: int, size: int, options: Options, timeout_s: float) -> Opened:
    """Blocks until all ranks are there. Raises UsageError, on all ranks alike, for topologies that cannot be used."""
    topology, error = _loaded(store, rank, size, options)
    store.set(f"hosts/{rank}", json.dumps({"host": options.host, "topology": options.topology, "error": error}))
    if rank == 0:
        store.set("agreed", json.dumps(_agree(store, size, topology)))
    agreed = json.loads(store.get("agreed"))
    if agreed["error"]:
        raise UsageError(agreed["error"])
    decision = Decision(**agreed["decision"])
    if decision.action == "gloo" or topology is None:
        return Opened(decision=decision, striped=None)
    fabric = _fabric(agreed["fabric"])
    lanes = open_lanes(
        store,
        rank,
        size,
        name="lanes",
        host=options.host,
        fabric=fabric,
        wiring=topology.wiring(options.host),
        timeout_s=timeout_s,
        status=options.status,
    )
    return Opened(decision=decision, striped=Striped(lanes, fabric))


def _loaded(store: Store, rank: int, size: int, options: Options) -> tuple[Topology | None, str]:
    """What this rank knows of the network, and what is wrong with it."""
    if not options.topology:
        return None, ""
    kind, _, interface = options.topology.partition(":")
    try:
        if kind == DISCOVER:
            address = partial(own_address, interface, options.master)
            topology = meet(store, rank, size, host=options.host, address=address)
        else:
            topology = load(options.topology)
        topology.wiring(options.host)
    except (UsageError, OSError) as error:
        return None, str(error)
    return topology, ""


def _agree(store: Store, size: int, topology: Topology | None) -> dict[str, Any]:
    said = [json.loads(store.get(f"hosts/{rank}")) for rank in range(size)]
    wrong = [f"rank {rank} ({one['host']}): {one['error']}" for rank, one in enumerate(said) if one["error"]]
    wrong += [
        f"rank {rank} ({one['host']}) has RESILIENT_TOPOLOGY={one['topology']!r}, rank 0 {said[0]['topology']!r}"
        for rank, one in enumerate(said)
        if bool(one["topology"]) != bool(said[0]["topology"])
    ]
    hosts = [one["host"] for one in said]
    fabric = None
    if not wrong and topology is not None:
        try:
            fabric = topology.fabric(hosts)
        except UsageError as error:
            wrong = [str(error)]
    if wrong:
        return {"error": f"the topology cannot be used. {wrong[0]}"}
    decision = decide(hosts, fabric)
    if decision.action == "gloo" and topology is not None and topology.reason:
        decision = replace(decision, reason=f"{decision.reason}; {topology.reason}")
    return {"error": "", "decision": asdict(decision), "fabric": None if fabric is None else asdict(fabric)}


def _fabric(content: dict[str, Any]) -> Fabric:
    return Fabric(
        leaf_of=tuple(content["leaf_of"]),
        up=tuple(tuple(row) for row in content["up"]),
        down=tuple(tuple(row) for row in content["down"]),
        nic=content["nic"],
    )
