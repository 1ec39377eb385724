"""Thousands of made-up lives of a cluster: what was reported to survive m losses does, and no wrong byte is given out.

A failure names its seed: `run_seed(seed)` is the same life again.
"""

import random

import pytest

from tests.simulation.parity_cluster import Cluster

SEEDS_PER_TEST = 300


@pytest.mark.parametrize("first", range(0, 10 * SEEDS_PER_TEST, SEEDS_PER_TEST))
def test_what_was_reported_to_survive_survives(first: int) -> None:
    for seed in range(first, first + SEEDS_PER_TEST):
        try:
            run_seed(seed)
        except Exception as error:
            raise AssertionError(f"seed {seed}: {error}") from error


def run_seed(seed: int) -> Cluster:
    """Some lives of a job, each ended by losses, and a last one without faults, which has to become whole."""
    cluster = Cluster(seed)
    chance = cluster.random
    step = 0
    for life in range(chance.randint(1, 3)):
        for name in cluster.names:
            if name not in cluster.nodes:
                cluster.start(name)
        cluster.configure()
        live(cluster, f"life{life}", step, chance)
        step = end_life(cluster, step, chance)
    heal(cluster)
    last = "life9", step + 1
    give_truth(cluster, *last)
    for name in cluster.names:
        cluster.seal(name, *last)
    cluster.run(60.0, until=lambda: cluster.newest == last)
    assert cluster.newest == last, f"{last} does not become whole: {cluster.failed.get(last)}, {cluster.arrived}"
    cluster.run(2.0)
    cluster.check(fault=False)
    return cluster


def live(cluster: Cluster, life: str, step: int, chance: random.Random) -> None:
    """Steps are sealed, a node at a time; links, nodes and bytes go wrong meanwhile."""
    interval_s = chance.choice((0.05, 0.3, 1.0))
    steps = chance.randint(1, 4)
    for number in range(1, steps + 1):
        give_truth(cluster, life, step + number)
        for name in cluster.names:
            at = (number + chance.random()) * interval_s
            if chance.random() < 0.97:  # else its image tore, and its agent is told to drop the step
                cluster.later(None, at, lambda name=name, at=step + number: cluster.seal(name, life, at))  # type: ignore[misc]
            else:
                node = cluster.nodes[name]
                cluster.later(node, at, lambda node=node, at=step + number: node.drop((life, at)))  # type: ignore[misc]
    length_s = steps * interval_s + chance.choice((0.0, 0.1, 2.0))
    for _ in range(chance.randint(0, 4)):
        cluster.later(None, chance.random() * length_s, lambda: go_wrong(cluster, chance))
    for _ in range(2):
        cluster.run(length_s / 2)
        if cluster.nodes and chance.random() < 0.5:
            cluster.check(fault=False)


def go_wrong(cluster: Cluster, chance: random.Random) -> None:
    if not cluster.nodes:
        return
    name = chance.choice(sorted(cluster.nodes))
    node = cluster.nodes[name]
    duration_s = chance.choice((0.1, 1.0, 5.0))
    match chance.choice(("cut", "pause", "slow", "clock", "rot", "restart")):
        case "cut":
            link = frozenset(chance.sample(cluster.names, 2))
            cluster.cuts.add(link)
            cluster.later(None, duration_s, lambda: cluster.cuts.discard(link))
        case "pause":
            cluster.paused.add(name)
            cluster.later(None, duration_s, lambda: cluster.paused.discard(name))
        case "slow":
            node.slowness = 20.0
        case "clock":
            node.clock_offset_s += chance.choice((-100.0, 3.0, 1000.0))
        case "rot":
            cluster.rot(name)
        case "restart":  # the agent alone: the job goes on, and seals further steps with the new one
            last = max((key for key, agents in cluster.agents.items() if agents.get(name) == node.agent), default=None)
            cluster.crash(name)
            cluster.start(name)
            cluster.configure()
            if last is not None and chance.random() < 0.5:  # its trainers give it once more what it lost
                cluster.later(None, chance.random() * 0.2, lambda: cluster.seal(name, *last))


def end_life(cluster: Cluster, step: int, chance: random.Random) -> int:
    """Some nodes are lost, and the job goes back to what can be recovered. The step that it goes on from."""
    count = chance.choice((0, 1, cluster.m, cluster.m, len(cluster.names) - 1))
    for name in chance.sample(cluster.names, count):
        if name in cluster.nodes:
            cluster.crash(name)
    cluster.run(chance.choice((0.0, 0.05, 1.0)))
    if not cluster.nodes:
        return step
    found = cluster.check(fault=chance.random() < 0.7)
    for node in list(cluster.nodes.values()):  # the run went back: what was not whole is of an earlier attempt
        for snapshot in node.core.snapshots():
            if snapshot.state.value == "open":
                node.drop(snapshot.key)
    return found[1] if found is not None else max(step - 1, 0)


def heal(cluster: Cluster) -> None:
    cluster.cuts.clear()
    cluster.paused.clear()
    cluster.lossy = cluster.reads_fail = 0.0
    for name in cluster.names:
        if name not in cluster.nodes:
            cluster.start(name)
    cluster.configure()
    for node in cluster.nodes.values():
        node.slowness = 1.0


def give_truth(cluster: Cluster, life: str, step: int) -> None:
    for ranks in cluster.ranks.values():
        for rank in ranks:
            cluster.truth[life, step, rank] = cluster.random.randbytes(cluster.random.choice((0, 1, 16, 40, 100, 150)))
