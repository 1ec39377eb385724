"""`resilient net` on hosts of an emulated network: what it says is what was built, and what goes on."""

import json
import subprocess
import sys
import time
import tomllib
from pathlib import Path

from examples.fabric import LeafSpine
from resilient.comms.topology import parse
from tests.fabric.test_execution import WORKER, Up, environment

NET = [sys.executable, "-P", "-m", "resilient.launch.cli", "net"]


def test_a_host_finds_the_paths_and_who_shares_its_leaf(up: Up) -> None:
    fabric = up(LeafSpine(hosts=4, spines=3))
    targets = [f"host{host}={fabric.address(host)}" for host in range(1, 4)]
    outcome = fabric.run([*NET, "probe", *targets, "--write"], hosts=[0], bare=True).check()
    found = parse(tomllib.loads(outcome.outputs["0"]), "found")
    wanted = parse(tomllib.loads(fabric.topology()), "built")
    assert [path.hops[0] for path in found.paths] == [path.hops[0] for path in wanted.paths]
    names = [f"host{host}" for host in range(4)]
    assert found.fabric(names).leaf_of == wanted.fabric(names).leaf_of


def test_what_several_hosts_found_becomes_one_file(up: Up, tmp_path: Path) -> None:
    fabric = up(LeafSpine(hosts=4, spines=3))
    targets = [f"host{host}={fabric.address(host)}" for host in range(4)]
    outputs = fabric.run([*NET, "probe", *targets, "--json"]).check().outputs
    for host, output in outputs.items():
        (tmp_path / f"{host}.json").write_text(output)
    surveys = [str(tmp_path / f"{host}.json") for host in range(4)]
    done = subprocess.run([*NET, "write", *surveys, "--rate", "100mbit"], capture_output=True, text=True, check=True)
    found = parse(tomllib.loads(done.stdout), "found")
    wanted = parse(tomllib.loads(fabric.topology()), "built")
    assert [(path.hops, path.rate) for path in found.paths] == [(path.hops, path.rate) for path in wanted.paths]
    assert found.addresses == wanted.addresses
    assert "probes tell" in done.stderr


def test_paths_that_remain_unknown_are_an_exit_code(up: Up) -> None:
    fabric = up(LeafSpine(answering=False))
    outcome = fabric.run([*NET, "probe", f"host1={fabric.address(1)}"], hosts=[0])
    assert outcome.code == 1
    assert "do not answer probes" in outcome.outputs["0"]


def test_lanes_at_work_are_watched(up: Up, tmp_path: Path) -> None:
    fabric = up(LeafSpine())
    folder = tmp_path / "status"
    env = {**environment(fabric, tmp_path), "RESILIENT_NET_STATUS": str(folder)}
    progress = tmp_path / "progress"
    with fabric.launch([*WORKER, "trains", "resilient", "400", str(progress)], env=env) as job:
        end = time.monotonic() + 60
        while not (progress.exists() and int(progress.read_text() or 0) >= 1):
            assert time.monotonic() < end, job.output("0")
            time.sleep(0.02)
        outcome = fabric.run([*NET, "watch", str(folder), "--every", "3", "--times", "1", "--json"], hosts=[0]).check()
    rows = json.loads(outcome.outputs["0"].splitlines()[-1])
    assert {(row["rank"], row["host"], row["path"]) for row in rows} == {
        (rank, f"host{rank}", path) for rank in range(2) for path in range(4)
    }
    assert all(row["rate"] > 1e5 for row in rows)
