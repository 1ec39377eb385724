"""Real agents on real hosts that die, are cut off and slow down at random moments: every time the bytes come back.

The hosts are network namespaces (`examples/nodes.py`) with an agent each. The trainers are this process: it speaks to
all agents through their sockets, saves images made of seeded bytes, and passes on what leaders tell one another.
"""

import os
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest

from examples.nodes import Nodes
from resilient.checkpoint.agent.address import address_of
from resilient.checkpoint.agent.client import AgentClient, Hello
from resilient.checkpoint.restore.decide import Facts, decide
from resilient.errors import AgentLost
from resilient.policy import Policy

ROUNDS = 50
WAIT_S = 40.0
POLICY = Policy(parity="2+1", agent_idle_s=60)
IMAGE_BYTES = (5 << 20) + 1234  # two blocks, so that rows have segments of different sizes
TOKEN = "a token that all of them know"

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces can be made by root only")


def image_of(rank: int, step: int) -> bytes:
    return random.Random(f"{rank} {step}").randbytes(IMAGE_BYTES - 1000 * rank)


class Rank:
    """One rank's trainer, as its node's agent sees it."""

    def __init__(self, cluster: "Cluster", rank: int, node: str) -> None:
        self.rank, self.node = rank, node
        self._cluster = cluster
        hello = Hello(
            run_id="chaos",
            url=None,
            rank=rank,
            world_size=cluster.world_size,
            node_ranks=(rank,),
            policy=POLICY,
            node=node,
        )
        os.environ["RESILIENT_RUNTIME_DIR"] = str(cluster.nodes.folder(node))
        self.client = AgentClient.connect(hello, self._on_event, lambda error: None)

    def _on_event(self, event: dict[str, Any]) -> None:
        self._cluster.hear(self.rank, event)

    def plan(self, life: str) -> None:
        self.client.register_plan(
            plan_digest="plan",
            capacity=IMAGE_BYTES,
            slots=2,
            budget_bytes=2 * IMAGE_BYTES,
            pieces_text='[{"name":"weight"}]',
            software={},
            life=life,
        )

    def save(self, step: int) -> None:
        slot = self.client.take_free_slot(WAIT_S)
        assert slot is not None, f"rank {self.rank} got no buffer for step {step}; {self._cluster.state()}"
        image = image_of(self.rank, step)
        self.client.begin(slot, step)
        slot.view[: len(image)] = image
        self.client.seal(slot, step, len(image), ["parity"])

    def facts(self) -> Facts:
        memory = tuple(sorted({image.step for image in self.client.images() if image.rank == self.rank}))
        return Facts(rank=self.rank, steps={"memory": memory, "parity": tuple(self.client.recoverable())})

    def restore(self, step: int, level: str) -> None:
        """Take the image from there, compare every byte, and go on from it."""
        slot = self.client.recover(step, WAIT_S) if level == "parity" else None
        with self.client.map_image(self.rank, step, slot_id=slot) as mapped:
            assert bytes(mapped.view) == image_of(self.rank, step), f"rank {self.rank}, step {step} from {level}"
            self.client.restored(mapped.slot_id)

    def vanish(self) -> None:
        self.client._connection.hang_up()
        self.client.close(keep=True)


class Cluster:
    """A job with a rank on each node. `safe` is the newest step that was reported to survive the loss of a node."""

    def __init__(self, nodes: Nodes, chance: random.Random) -> None:
        self.nodes = nodes
        self.chance = chance
        self.places = list(nodes.names)
        self.world_size = len(self.places)
        self.ranks: list[Rank] = []
        self.safe = self.step = 0
        self.life = ""
        self.levels: Counter[str] = Counter()
        self._changed = threading.Condition()
        self._said: list[tuple[int, dict[str, Any]]] = []
        self._answered: set[tuple[str, int, str]] = set()
        for node in self.places:
            self._start_agent(node)

    def _start_agent(self, node: str) -> None:
        environment = {"RESILIENT_RUNTIME_DIR": str(self.nodes.folder(node))}
        folder = address_of("chaos", None, node, environment).folder
        command = [sys.executable, "-m", "resilient.checkpoint.agent", str(folder)]
        assert self.nodes.start(node, command).wait(WAIT_S) == 0, f"the agent of {node} did not start"

    # --- what agents say

    def hear(self, rank: int, event: dict[str, Any]) -> None:
        if event.get("superseded"):
            return  # of an earlier attempt at the step
        with self._changed:
            self._said.append((rank, event))
            if event["event"] == "node":
                self._pass_on()
            self._changed.notify_all()

    def _pass_on(self) -> None:
        """Do what the board does: a step is complete when every node has said that it has it."""
        have = Counter(
            (event["level"], event["step"], event["life"]) for _, event in self._said if event["event"] == "node"
        )
        for (level, step, life), count in have.items():
            if count < self.world_size or (level, step, life) in self._answered:
                continue
            self._answered.add((level, step, life))
            for rank in self.ranks:
                with suppress(AgentLost):
                    rank.client.complete(level, step, life)

    def _heard(self, kind: str, step: int) -> set[int]:
        """The ranks that were told so of the parity of a step, in this life."""
        return {
            rank
            for rank, event in self._said
            if (event["event"], event.get("level"), event["step"]) == (kind, "parity", step)
        }

    def wait_until_safe(self, step: int) -> None:
        deadline = time.monotonic() + WAIT_S
        with self._changed:
            while len(self._heard("complete", step)) < self.world_size:
                failed = [event for _, event in self._said if event["event"] == "failed"]
                assert not failed, [event["error"] for event in failed]
                assert time.monotonic() < deadline, f"step {step} is not safe; {self.state()}"
                self._changed.wait(0.05)
        self.safe = step

    def look(self) -> None:
        """Note what has become safe meanwhile: what was said counts, whatever happens next."""
        with self._changed:
            done = [
                event["step"]
                for _, event in self._said
                if (event["event"], event.get("level")) == ("complete", "parity")
            ]
            self.safe = max([self.safe, *done])

    def state(self) -> str:
        """What the agents hold, for a test that failed."""
        lines = [f"life {self.life}, safe {self.safe}, said: {self._said[-12:]}"]
        for rank in self.ranks:
            status = rank.client.status()
            lines.append(f"{rank.node}: {status['slots']} {status['parity']}")
        return "\n".join(lines)

    # --- lives

    def begin_life(self, number: int) -> None:
        """All trainers start: they meet, agree on the newest step that all can have, compare it, and go on."""
        self.life = f"{number:06d}"
        self.ranks = [Rank(self, rank, node) for rank, node in enumerate(self.places)]
        with self._changed:  # what agents were still to be told of the life before
            self._answered.clear()
            self._pass_on()
        members = []
        for rank in self.ranks:
            host, port = rank.client.listen(rank.node, TOKEN, self.nodes.address(rank.node))
            members.append((rank.node, host, port))
        for rank in self.ranks:
            rank.client.join(members, [list(range(self.world_size))], 1)
        if self.safe:
            decision = decide([rank.facts() for rank in self.ranks])
            assert decision.action == "restore", decision
            assert decision.step >= self.safe, decision
            for rank, level in zip(self.ranks, decision.levels, strict=True):
                rank.restore(decision.step, level)
                self.levels[level] += 1
            self.step = decision.step
        self._said = []  # what was said of steps of earlier lives
        for rank in self.ranks:
            rank.plan(self.life)

    def end_life(self) -> None:
        self.look()
        for rank in self.ranks:
            rank.vanish()

    def save(self, ranks: int | None = None) -> None:
        """The next step; only the first `ranks` come so far."""
        self.step += 1
        for rank in self.ranks[:ranks]:
            rank.save(self.step)

    def random_moment(self) -> None:
        time.sleep(self.chance.random() ** 2 * 0.08)  # not a wait: the moment is what is random here


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    seed = int(os.environ.get("CHAOS_SEED", "0")) or random.SystemRandom().randrange(1, 1 << 30)
    print(f"CHAOS_SEED={seed}")  # shown when the test fails
    monkeypatch.setenv("RESILIENT_RUNTIME_DIR", "/")
    with Nodes(3, isolated=True) as nodes:
        made = Cluster(nodes, random.Random(seed))
        yield made
        for rank in made.ranks:
            rank.vanish()


def lose_a_node(cluster: Cluster, *, silent: bool) -> None:
    """Kill all of a node in mid-save; a spare, or the node itself after a reboot, takes its place in the next life."""
    cluster.save()
    cluster.wait_until_safe(cluster.step)
    for _ in range(cluster.chance.randrange(3)):
        cluster.save()
    lost = cluster.chance.randrange(cluster.world_size)
    if cluster.chance.random() < 0.5:
        cluster.save(cluster.chance.randrange(cluster.world_size))  # ranks are up to one step apart
    cluster.random_moment()
    cluster.look()
    node = cluster.places[lost]
    cluster.nodes.kill(node, silent=silent)
    cluster.end_life()
    again = node if cluster.chance.random() < 0.3 else None
    cluster.places[lost] = cluster.nodes.add(again)
    cluster._start_agent(cluster.places[lost])


def lose_a_trainer(cluster: Cluster) -> None:
    """No agent is lost: whatever was sealed on all ranks is there."""
    cluster.save()
    cluster.random_moment()
    if cluster.chance.random() < 0.5:
        cluster.save(cluster.chance.randrange(cluster.world_size))
    cluster.end_life()


def disturb_a_cable(cluster: Cluster, *, state: str) -> None:
    """A link that is down or slow for a while holds parity up, and nothing else; the job goes on with it."""
    node = cluster.chance.choice(cluster.places)
    cluster.nodes.link(node, state)
    cluster.save()
    cluster.random_moment()
    cluster.nodes.link(node, "up")
    cluster.wait_until_safe(cluster.step)
    cluster.end_life()


@pytest.mark.timeout(600)
def test_after_any_fault_at_any_moment_every_image_comes_back_bit_for_bit(cluster: Cluster) -> None:
    lives = 0
    cluster.begin_life(lives)
    cluster.save()
    cluster.wait_until_safe(cluster.step)
    for _ in range(ROUNDS):
        kind = cluster.chance.choice(["killed", "killed", "silent", "trainer", "down", "slow"])
        try:
            if kind in ("killed", "silent"):
                lose_a_node(cluster, silent=kind == "silent")
            elif kind == "trainer":
                lose_a_trainer(cluster)
            else:
                disturb_a_cable(cluster, state={"down": "down", "slow": "20mbit"}[kind])
        except AgentLost:
            cluster.end_life()
        lives += 1
        cluster.begin_life(lives)
    assert cluster.levels["parity"] > 0, "no image was ever fetched from other nodes"
    assert cluster.levels["memory"] > 0
