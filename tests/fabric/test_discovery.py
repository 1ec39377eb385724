"""The ranks of a job find their network out together: what they say is what was built."""

import json
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from examples.fabric import Fabric, LeafSpine
from resilient.comms.topology import Topology, parse
from tests.fabric.test_execution import Up

ROOT = Path(__file__).resolve().parents[2]
MEET = """
import json, os, time
from datetime import timedelta
from torch.distributed import TCPStore
from resilient.comms.discovery import meet
from resilient.comms.topology import as_toml
rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
store = TCPStore(os.environ["MASTER_ADDR"], 29400, size, rank == 0, timedelta(seconds=60))
began = time.monotonic()
topology = meet(store, rank, size, host=os.environ["RESILIENT_NODE"], address=lambda: os.environ["FABRIC_ADDRESS"])
took = time.monotonic() - began
print("\\n" + json.dumps([as_toml(topology), topology.known, topology.reason, took]))
store.set(f"left/{rank}", "1")
if rank == 0:
    store.wait([f"left/{other}" for other in range(size)])
"""


def met(fabric: Fabric, **more: Any) -> tuple[Topology, list[Any]]:
    """What all ranks have found alike, and what rank 0 said of it."""
    outcome = fabric.run(
        [sys.executable, "-P", "-c", MEET], env={"PYTHONPATH": str(ROOT)}, timeout_s=90, **more
    ).check()
    rows = [json.loads(output.splitlines()[-1]) for output in outcome.outputs.values()]
    assert len({row[0] for row in rows}) == 1
    return parse(tomllib.loads(rows[0][0]), "probes"), rows[0]


def built(fabric: Fabric) -> Topology:
    return parse(tomllib.loads(fabric.topology()), "built")


@pytest.mark.parametrize(("leaves", "spines", "hosts", "bare"), [(2, 4, 4, True), (3, 2, 3, False)])
def test_leaves_and_spines_are_found_as_they_were_built(
    leaves: int, spines: int, hosts: int, bare: bool, up: Up
) -> None:
    fabric = up(LeafSpine(leaves=leaves, spines=spines, hosts=hosts))
    found, (_, known, reason, took) = met(fabric, bare=bare)
    wanted = built(fabric)
    assert (known, reason) == ("flow", "every path has answered")
    assert [path.hops for path in found.paths] == [path.hops for path in wanted.paths]
    names = list(wanted.leaves)
    assert found.fabric(names).leaf_of == wanted.fabric(names).leaf_of
    assert found.addresses == wanted.addresses
    assert took < 5


def test_several_ranks_of_a_host_are_one_host(up: Up) -> None:
    found, _ = met(up(LeafSpine()), per_host=2)
    assert sorted(found.leaves) == ["host0", "host1"]


def test_where_a_link_is_down_the_path_is_not_there(up: Up) -> None:
    fabric = up(LeafSpine(spines=3))
    fabric.link(1, 1).down()
    found, _ = met(fabric)
    wanted = built(fabric)
    assert [path.hops for path in found.paths] == [wanted.paths[0].hops, wanted.paths[2].hops]


def test_where_switches_are_silent_that_is_said_in_a_short_time(up: Up) -> None:
    found, (_, known, reason, took) = met(up(LeafSpine(answering=False)))
    assert known == "hash"
    assert "do not answer probes" in reason
    assert len(found.paths) == 1
    assert took < 8
