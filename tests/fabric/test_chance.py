"""Networks that a job finds out by itself, or that tell nothing: collectives are right, and no more is claimed."""

from pathlib import Path

from examples.fabric import LeafSpine
from tests.fabric.test_execution import ROOT, WORKER, Up, environment, loads, said


def test_a_job_that_discovers_its_network_loads_links_equally(up: Up) -> None:
    fabric = up(LeafSpine(hosts=4, rate="200mbit"))
    before = fabric.counters()
    env = {"RESILIENT_TOPOLOGY": "discover:eth0", "RESILIENT_STRIPE_FROM": "64k", "PYTHONPATH": str(ROOT)}
    fabric.run([*WORKER, "collectives", "8", "2"], env=env, timeout_s=90).check()
    for carried in loads(fabric, before).values():
        assert max(carried) <= 1.10 * sum(carried) / 4


def test_an_interface_that_one_rank_lacks_is_the_same_error_on_all(up: Up) -> None:
    fabric = up(LeafSpine())
    fabric.spaces.ip("host0", ["link add eth7 type veth peer name eth8", "addr add 10.77.0.2/24 dev eth7"])
    env = {"RESILIENT_TOPOLOGY": "discover:eth7", "PYTHONPATH": str(ROOT)}
    with fabric.launch([*WORKER, "collectives", "1", "1"], env=env) as job:
        outcome = job.wait(90, grace_s=30)
    assert outcome.code == 1
    for output in outcome.outputs.values():
        assert "rank 1 (host1): interface 'eth7': No such device; there are lo, eth0" in output


def test_where_switches_do_not_answer_flows_are_spread_by_chance_and_that_is_said(up: Up, tmp_path: Path) -> None:
    fabric = up(LeafSpine(rate="200mbit", answering=False))
    outcome = fabric.run([*WORKER, "collectives", "4", "1"], env=environment(fabric, tmp_path), timeout_s=90).check()
    assert all("flows are spread by chance" in output for output in outcome.outputs.values())
    assert all(row["report"]["failure"] is None for row in said(dict(outcome.outputs)))
