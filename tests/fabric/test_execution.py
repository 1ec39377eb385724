"""Collectives in the emulated networks: links carry what was planned, and training goes on when one slows or fails."""

import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from examples.fabric import Fabric, LeafSpine, MultiPlane
from tests.fabric.worker import Net, batch_of

Up = Callable[[Any], Any]
ROOT = Path(__file__).resolve().parents[2]
WORKER = [sys.executable, "-P", "-m", "tests.fabric.worker"]


def environment(fabric: Fabric, folder: Path) -> dict[str, str]:
    path = folder / "topology.toml"
    path.write_text(fabric.topology())
    return {"RESILIENT_TOPOLOGY": str(path), "RESILIENT_STRIPE_FROM": "0", "PYTHONPATH": str(ROOT)}


def said(outputs: Mapping[str, str]) -> list[dict[str, Any]]:
    """What ranks have said, in their order."""
    lines = [line for rank in sorted(outputs, key=int) for line in outputs[rank].splitlines() if line.startswith("{")]
    return [json.loads(line) for line in lines]


def loads(fabric: Fabric, before: dict[Any, int]) -> dict[tuple[str, int], list[int]]:
    """Bytes on each leaf's links, each way."""
    after = fabric.counters()
    carried = {link: count - before[link] for link, count in after.items()}
    return {
        (way, leaf): [carried[way, leaf, path] for path in range(fabric.paths)]
        for way in ("up", "down")
        for leaf in range(fabric.leaves)
    }


@pytest.mark.parametrize("hosts", [2, 4])
def test_links_carry_equal_loads_and_results_are_right(hosts: int, up: Up, tmp_path: Path) -> None:
    fabric = up(LeafSpine(hosts=hosts, rate="200mbit"))
    before = fabric.counters()
    fabric.run([*WORKER, "collectives", "8", "2"], env=environment(fabric, tmp_path), timeout_s=90).check()
    for carried in loads(fabric, before).values():
        assert max(carried) <= 1.06 * statistics.mean(carried)  # with what else is on the network


def test_unequal_planes_carry_shares_by_their_rates(up: Up, tmp_path: Path) -> None:
    fabric = up(MultiPlane(hosts=2, rates=["200mbit", "100mbit"]))
    before = fabric.counters()
    fabric.run([*WORKER, "collectives", "8", "2"], env=environment(fabric, tmp_path), timeout_s=90).check()
    for carried in loads(fabric, before).values():
        assert carried[0] / carried[1] == pytest.approx(2.0, rel=0.12)


def alone(steps: int, ranks: int = 2) -> float:
    """The loss of the last step, added up over ranks, when one process does what all of them should do together."""
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    losses = [torch.zeros(())]
    for step in range(steps):
        losses = [model(batch_of(step, rank)).square().mean() for rank in range(ranks)]
        optimizer.zero_grad()
        (torch.stack(losses).sum() / ranks).backward()
        optimizer.step()
    return float(torch.stack(losses).detach().sum())


def trained(fabric: Fabric, folder: Path, steps: int, fault: Callable[[], None] | None = None) -> list[dict[str, Any]]:
    progress = folder / "progress"
    words = [*WORKER, "trains", "resilient", str(steps), str(progress)]
    with fabric.launch(words, env=environment(fabric, folder)) as job:
        end = time.monotonic() + 60
        while not (progress.exists() and int(progress.read_text() or 0) >= steps // 3):
            assert time.monotonic() < end, job.output("0")
            assert all(process.poll() in (None, 0) for process in job.processes.values()), job.output("0")
            time.sleep(0.02)
        if fault is not None:
            fault()
        return said(job.wait(90).check().outputs)


@pytest.mark.parametrize("kind", ["slow", "silence", "down"])
def test_training_goes_on_to_the_same_loss_when_a_link_fails(kind: str, up: Up, tmp_path: Path) -> None:
    fabric = up(LeafSpine(rate="100mbit"))
    steps = 15
    link = fabric.link(1, 2)
    faults = {"slow": lambda: link.slow("20mbit"), "silence": link.silence, "down": link.down}
    rows = trained(fabric, tmp_path, steps, faults[kind])
    assert [row["loss"] for row in rows] == [pytest.approx(alone(steps), rel=1e-4)] * 2
    assert max(rows[0]["took"]) < 10  # nothing waits for a timeout


def test_shares_are_planned_anew_when_a_link_slows_and_steps_are_quick_again(up: Up, tmp_path: Path) -> None:
    fabric = up(LeafSpine(rate="100mbit"))
    rows = trained(fabric, tmp_path, 24, lambda: fabric.link(1, 2).slow("25mbit"))
    took = rows[0]["took"]
    healthy, last = statistics.median(took[3:8]), statistics.median(took[-6:])
    # 3.25 of 4 links are left; equal shares would take four times as long
    assert last < 2.2 * healthy
