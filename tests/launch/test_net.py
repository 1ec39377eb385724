"""`resilient net` without a network: plans, what ranks wrote of their lanes, and topologies that are made."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from examples.fabric import LeafSpine, MultiPlane
from resilient.comms.fabric import leaf_spine, multi_plane
from resilient.comms.lanes.status import StatusFile
from resilient.comms.topology import from_file
from resilient.errors import UsageError
from resilient.launch.net.planned import COLLECTIVES, planned
from resilient.launch.net.watching import Look, look, rows
from resilient.launch.net.written import from_slurm, named
from tests.launch.conftest import Resilient

MIB = 1 << 20


@pytest.fixture
def network(tmp_path: Path) -> str:
    path = tmp_path / "network.toml"
    path.write_text(LeafSpine(hosts=4).topology())
    return str(path)


# -- plans -----------------------------------------------------------------------------


def test_a_plan_says_what_each_link_carries_and_how_long_that_takes() -> None:
    found = planned(leaf_spine(leaves=2, spines=4, hosts=2, rate=1e6), "all_reduce", 4 * MIB)
    # around the ring of four ranks, one flow leaves each leaf in each of six steps of a quarter
    assert found.bytes_on == {
        (way, leaf, path): 6 * MIB // 4 for way in ("up", "down") for leaf in (0, 1) for path in range(4)
    }
    assert found.load_s == pytest.approx(6 * MIB / 4 / 1e6)
    assert found.ratio == pytest.approx(1.0)
    assert [stage.times for stage in found.stages] == [6]


@pytest.mark.parametrize("collective", COLLECTIVES)
def test_every_collective_can_be_planned_and_is_placed_as_well_as_is_possible(collective: str) -> None:
    for fabric in (leaf_spine(leaves=2, spines=4, hosts=2, rate=1e6), multi_plane(hosts=3, rates=[2e6, 1e6])):
        found = planned(fabric, collective, 12 * MIB)
        assert 1.0 <= found.ratio < 1.01
        assert sum(found.bytes_on.values()) > 0


def test_a_slow_link_carries_less_by_the_plan() -> None:
    fabric = leaf_spine(leaves=2, spines=4, hosts=1, rate=1e6)
    slow = planned(fabric.with_rate(1, 2, 0.25e6), "all_reduce", 8 * MIB)
    carried = [slow.bytes_on["up", 1, path] for path in range(4)]
    assert carried[2] == pytest.approx(carried[0] / 4, rel=0.02)
    assert slow.load_s == pytest.approx(planned(fabric, "all_reduce", 8 * MIB).load_s * 4 / 3.25, rel=0.02)


def test_the_command_shows_the_plan_and_the_network(resilient: Resilient, network: str) -> None:
    shown = resilient("net", "show", "--topology", network)
    assert shown.code == 0
    assert "leaf1: host1, host3" in shown.out
    assert "100 Mbit/s  10.255.0.2, 10.255.1.2" in shown.out
    told = resilient("net", "plan", "all_reduce", "16 MiB", "--topology", network)
    assert told.code == 0
    assert "no placement takes less" in told.out
    slow = resilient("net", "plan", "all_reduce", "16 MiB", "--topology", network, "--slow", "1,2=0.25", "--json").json
    assert slow["links"]["up 1 2"] < slow["links"]["up 1 1"] / 3
    assert slow["ratio"] < 1.05


def test_what_cannot_be_planned_is_told(resilient: Resilient, network: str) -> None:
    assert "no network is described" in resilient("net", "plan", "all_reduce", "1 MiB").err
    wrong = resilient("net", "plan", "all_reduce", "much", "--topology", network)
    assert (wrong.code, "SIZE" in wrong.err) == (2, True)
    assert "0,2=0.25" in resilient("net", "plan", "all_reduce", "1 MiB", "--topology", network, "--slow", "9,9=1").err
    assert (
        "'elsewhere'"
        in resilient("net", "plan", "all_reduce", "1 MiB", "--topology", network, "--hosts", "elsewhere").err
    )


# -- what lanes do ----------------------------------------------------------------------


def report(sent: int, state: str = "open", factor: float = 1.0, failure: str | None = None) -> dict[str, Any]:
    lane = {"peer": 1, "path": 0, "state": state, "bytes": sent, "factor": factor}
    idle = {"peer": 1, "path": 1, "state": "closed", "bytes": 0, "factor": 1.0}
    return {"rank": 0, "ranks": 2, "host": "host0", "operations": 7, "failure": failure, "lanes": [lane, idle]}


def test_a_rate_is_the_difference_of_two_looks_and_idle_lanes_are_left_out() -> None:
    first = {"lanes.1.lanes.json": Look(name="lanes.1.lanes.json", at=100.0, report=report(1000))}
    second = {"lanes.1.lanes.json": Look(name="lanes.1.lanes.json", at=102.0, report=report(5000, factor=0.25))}
    (row,) = rows(second, first, at=103.0)
    assert (row.rank, row.host, row.path, row.nbytes, row.rate, row.factor, row.age_s) == (
        0,
        "host0",
        0,
        5000,
        2000.0,
        0.25,
        1.0,
    )
    assert [row.rate for row in rows(second, {}, at=103.0)] == [None]
    assert [row.rate for row in rows(second, second, at=103.0)] == [None]  # it has not been written again


def test_lanes_of_a_path_are_told_together_and_their_states_are_counted() -> None:
    content = report(10)
    content["lanes"] += [{"peer": 2, "path": 0, "state": "dead", "bytes": 5, "factor": 0.0}]
    (row,) = rows({"g.1.lanes.json": Look(name="g.1.lanes.json", at=1.0, report=content)}, {}, at=1.0)
    assert (row.peers, row.nbytes, row.factor, row.state) == (2, 15, 0.0, "1 dead, 1 open")


def test_what_ranks_write_is_read_and_a_failure_is_shown(resilient: Resilient, tmp_path: Path) -> None:
    folder = tmp_path / "status"
    status = StatusFile(str(folder), "lanes")
    status.write(report(3 << 20, failure="rank 1 (host1) is gone"))
    (folder / "torn.lanes.json").write_text("{")
    assert [one.report["rank"] for one in look(folder).values()] == [0]
    shown = resilient("net", "watch", str(folder), "--every", "0.1", "--times", "1")
    assert shown.code == 0
    assert "3.0 MiB" in shown.out
    assert "failed: rank 1 (host1) is gone" in shown.out
    (line,) = resilient("net", "watch", str(folder), "--every", "0.1", "--times", "1", "--json").json
    assert (line["rank"], line["nbytes"]) == (0, 3 << 20)
    for path in folder.glob("lanes*"):
        os.utime(path, (1.0, 1.0))
    assert "gone?" in resilient("net", "watch", str(folder), "--every", "0.1", "--times", "1").out
    status.remove()
    assert "no rank writes here" in resilient("net", "watch", str(folder), "--every", "0.1", "--times", "1").out


def test_a_folder_that_is_not_there_or_another_users_is_refused(resilient: Resilient, tmp_path: Path) -> None:
    missing = resilient("net", "watch", str(tmp_path / "absent"), "--times", "1")
    assert (missing.code, "RESILIENT_NET_STATUS=" in missing.err) == (2, True)
    if os.getuid() == 0:
        (tmp_path / "theirs").mkdir()
        os.chown(tmp_path / "theirs", 65534, 65534)
        with pytest.raises(UsageError, match="another user"):
            look(tmp_path / "theirs")


# -- topologies that are made -------------------------------------------------------------

SLURM = """
SwitchName=leaf0 Nodes=n[0-1]
SwitchName=leaf1 Nodes=n[2-3]
SwitchName=top Switches=leaf[0-1]
"""


def test_slurms_switches_become_leaves(resilient: Resilient, tmp_path: Path) -> None:
    (tmp_path / "topology.conf").write_text(SLURM)
    words = ["net", "write", "--slurm", str(tmp_path / "topology.conf"), "--paths", "4", "--rate", "50gbit"]
    (tmp_path / "network.toml").write_text(resilient(*words).out)
    topology = from_file(tmp_path / "network.toml")
    assert topology.leaves == {"n0": "leaf0", "n1": "leaf0", "n2": "leaf1", "n3": "leaf1"}
    assert (topology.known, len(topology.paths), topology.paths[0].rate) == ("hash", 4, 6.25e9)
    assert topology.interface == "eth0"
    assert "either surveys, or --slurm" in resilient("net", "write").err
    assert "either surveys, or --slurm" in resilient("net", "write", "--slurm", "x").err
    with pytest.raises(UsageError, match="line 1"):
        from_slurm("leaf0", "topology.conf", 2)
    with pytest.raises(UsageError, match="names no nodes"):
        from_slurm("SwitchName=top Switches=leaf0", "topology.conf", 2)


def test_targets_of_probes_have_names(resilient: Resilient) -> None:
    assert named(["a=127.0.0.3", "127.0.0.4"]) == {"a": "127.0.0.3", "127.0.0.4": "127.0.0.4"}
    told = resilient("net", "probe", "nobody.invalid")
    assert (told.code, "nobody.invalid" in told.err) == (2, True)


def test_hosts_that_are_this_one_share_its_leaf(resilient: Resilient) -> None:
    told = resilient("net", "probe", "other=127.0.0.3", "--from", "127.0.0.1", "--json")
    assert told.code == 0
    assert json.loads(told.out)["survey"]["ways"] == [{"target": "other", "routers": 0, "middle": {}}]


def test_a_network_of_planes_is_shown_with_its_interfaces(resilient: Resilient, tmp_path: Path) -> None:
    (tmp_path / "planes.toml").write_text(MultiPlane().topology())
    assert "eth1" in resilient("net", "show", "--topology", str(tmp_path / "planes.toml")).out
