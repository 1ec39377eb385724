"""A cluster in one thread: the real core, row jobs, parity stores and reader on tiny images; a seed makes up the rest.

Time is a number, the network a list of events. Messages are late, lost, doubled, and overtake one another; links are
cut; nodes stall, forget their clock, start again empty, or come back after a long pause with what they held; bytes rot
in memory and are torn on their way. What must hold nevertheless is checked by `Cluster.check`.
"""

import heapq
import json
import random
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager
from itertools import count
from typing import Any

from resilient.checkpoint.digest import digest
from resilient.checkpoint.parity.actions import Action, Arrived, Expect, Failed, Free, Send, StartRow, StopRow
from resilient.checkpoint.parity.core import Core
from resilient.checkpoint.parity.encode import Hands, RowJob, Stopped
from resilient.checkpoint.parity.facts import Done, Sealed
from resilient.checkpoint.parity.gather import gather_in_turn
from resilient.checkpoint.parity.layout import Key, layout_of, parity_range, parse_range_name
from resilient.checkpoint.parity.memory import Blocks, copy
from resilient.checkpoint.parity.reader import Reader
from resilient.checkpoint.parity.recover import Decision, Inventory, Sources, decide, inventory_of, sources_of
from resilient.checkpoint.parity.snapshot import State
from resilient.checkpoint.parity.store import ParityStore
from resilient.checkpoint.peers.transport import Wanted
from resilient.errors import DamagedImage, LevelFailed, ResilientError

BLOCK = 16
ImageId = tuple[str, int, int]


def sealed_image(rank: int, data: bytes | bytearray) -> Sealed:
    blocks = "".join(digest(bytes(data[at : at + BLOCK])) for at in range(0, len(data), BLOCK))
    return Sealed(rank=rank, nbytes=len(data), blocks=blocks, pieces="pieces", head={"rank": rank})


class Node:
    """One agent. It is of the past as soon as the cluster has another under its name."""

    def __init__(self, cluster: "Cluster", name: str, agent: str) -> None:
        self.name, self.agent = name, agent
        self.cluster = cluster
        self.core = Core(name, agent, BLOCK)
        self.store = ParityStore(name)
        self.images: dict[ImageId, tuple[bytearray, Sealed]] = {}
        self.jobs: dict[Key, RowJob] = {}
        self.clock_offset_s = 0.0
        self.slowness = 1.0
        self._blocks = Blocks(BLOCK, kept=32, at_once=3)
        self._actions: list[Action] = []
        self._acting = False

    @property
    def lives(self) -> bool:
        return self.cluster.nodes.get(self.name) is self

    # --- what the agent's shell does

    def seal(self, life: str, step: int, world_size: int, images: dict[int, bytes]) -> None:
        sealed = {rank: sealed_image(rank, data) for rank, data in images.items()}
        for rank, data in images.items():
            self.images[life, step, rank] = bytearray(data), sealed[rank]
        self.do(self.core.sealed(life, step, world_size, sealed.values(), {"pieces": f"text of {self.agent}"}))

    def drop(self, key: Key) -> None:
        self.images = {image_id: held for image_id, held in self.images.items() if image_id[:2] != key}
        self.do(self.core.dropped(*key))

    def is_complete(self, key: Key) -> None:
        """The shell hears that a snapshot is whole on all nodes: what is older is not needed (law 4)."""
        for older in {image_id[:2] for image_id in self.images if image_id[:2] < key}:
            self.drop(older)
        newer = {each.key for each in self.core.snapshots() if each.key > key}
        self.do(self.core.keep({key} | newer))

    def inventory(self) -> Inventory:
        images = {image_id: (sealed.seal, self.cluster.world_size) for image_id, (_, sealed) in self.images.items()}
        made = inventory_of(self.name, images, self.store.whole(), self.core.snapshots())
        return Inventory.from_json(json.loads(json.dumps(made.to_json())))

    def lend(self, name: str, offset: int, nbytes: int) -> bytes:
        """Raises LevelFailed."""
        found = parse_range_name(name)
        assert found is not None
        if found.kind == "parity":
            row, j = found.numbers
            with self.store.lend((found.life, found.step), row, j, offset, nbytes) as lent:
                return bytes(lent)
        image = self.images.get((found.life, found.step, found.numbers[0]))
        if image is None or offset + nbytes > len(image[0]):
            raise LevelFailed(f"{name} is not on node {self.name}")
        return bytes(image[0][offset : offset + nbytes])

    def tick(self) -> None:
        self.do(self.core.tick(self.cluster.now + self.clock_offset_s))

    # --- what `service.py` does with threads

    def do(self, actions: Iterable[Action]) -> None:
        self._actions += actions
        if self._acting:
            return
        self._acting = True
        while self._actions:
            self._act(self._actions.pop(0))
        self._acting = False

    def _act(self, action: Action) -> None:
        match action:
            case Send():
                self.cluster.transmit(self, action.peer, json.dumps(action.message))
            case Expect():
                layout = layout_of(action.stripe)
                self.store.expect(layout, [each.node for each in action.stripe.members].index(self.name))
            case StartRow():
                self._start(action)
            case StopRow():
                self.jobs.pop(action.key).stop()
            case Arrived():
                self.store.seal(action.key)
                self.cluster.on_arrived(self, action.key)
            case Failed():
                self.cluster.failed[action.key] = action.reason
            case Free():
                self.store.free(action.key)

    def _start(self, action: StartRow) -> None:
        key, row = action.stripe.key, action.row
        job = self.jobs.get(key)
        if job is None:

            def keep(j: int, number: int, nbytes: int) -> AbstractContextManager[memoryview]:
                return self.store.take(key, row, j, number * BLOCK, nbytes)

            def push(node: str, j: int, offset: int, data: memoryview, expected: str) -> None:
                self.cluster.push(self, node, (key, row, j, offset), data, expected)

            hands = Hands(
                gather=gather_in_turn(self.cluster.reading_from(self), self._blocks),
                blocks=self._blocks,
                keep=keep,
                push=push,
                submit=at_once,
            )
            job = self.jobs[key] = RowJob(layout_of(action.stripe), row, action.images, hands)
        steps = job.steps()
        self.cluster.later(self, self.cluster.work_s(self), lambda: self._work(key, job, steps))

    def _work(self, key: Key, job: RowJob, steps: Iterator[None]) -> None:
        try:
            next(steps)
        except StopIteration:
            self.jobs.pop(key, None)
            self.do(self.core.row_done(key, job.digests()))
        except Stopped:
            return
        except ResilientError as error:
            final = isinstance(error, DamagedImage) and job.damaged_again
            self.do(self.core.row_failed(key, str(error), final=final))
        else:
            self.cluster.later(self, self.cluster.work_s(self), lambda: self._work(key, job, steps))


def at_once(call: Callable[[], None], /) -> "Future[None]":
    done: Future[None] = Future()
    try:
        call()
    except ResilientError as error:
        done.set_exception(error)
    else:
        done.set_result(None)
    return done


class Cluster:
    """`newest` is the newest snapshot that all members have reported whole; `lost` whose data of a snapshot are gone.

    In `rotten` are the snapshots of which a byte flipped; its node counts as lost. `agents` says who sealed what.
    """

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.now = 0.0
        self.nodes: dict[str, Node] = {}
        self.names = [f"n{number}" for number in range(self.random.randint(2, 5))]
        self.m = self.random.randint(1, min(2, len(self.names) - 1))
        self.ranks: dict[str, list[int]] = {}
        self._deal_ranks()
        self.truth: dict[ImageId, bytes] = {}
        self.agents: dict[Key, dict[str, str]] = {}
        self.arrived: dict[Key, set[str]] = {}
        self.failed: dict[Key, str] = {}
        self.lost: dict[Key, set[str]] = {}
        self.rotten: set[Key] = set()
        self.newest: Key | None = None
        self.cuts: set[frozenset[str]] = set()
        self.paused: set[str] = set()
        self.lossy = self.random.choice((0.0, 0.02, 0.15))
        self.reads_fail = self.random.choice((0.0, 0.0, 0.05))
        self._events: list[tuple[float, int, Node | None, Callable[[], None]]] = []
        self._numbers = count()
        self._starts = count(1)

    def _deal_ranks(self) -> None:
        rank = 0
        for name in self.names:
            held = self.random.choice((1, 1, 1, 2, 0))
            self.ranks[name] = list(range(rank, rank + held))
            rank += held
        if not rank:
            self.ranks[self.names[0]] = [0]
        self.world_size = max(rank, 1)

    # --- nodes

    def start(self, name: str) -> None:
        self.nodes[name] = Node(self, name, f"agent{next(self._starts)}")

    def configure(self) -> None:
        for node in self.nodes.values():
            node.do(node.core.configure(self.names, self.m))
            self._keep_ticking(node)

    def crash(self, name: str) -> None:
        """The node and all it held are gone."""
        node = self.nodes.pop(name)
        self.paused.discard(name)
        for key, agents in self.agents.items():
            if agents.get(name) == node.agent:
                self.lost.setdefault(key, set()).add(name)
                if self.newest is None or key > self.newest:
                    self.arrived.get(key, set()).discard(name)

    def rot(self, name: str) -> None:
        """A byte of an image or of parity flips in a node's memory. It counts as that node's loss."""
        node = self.nodes[name]
        if node.images and self.random.random() < 0.6:
            image_id = self.random.choice(sorted(node.images))
            data, key = node.images[image_id][0], image_id[:2]
            if data:
                data[self.random.randrange(len(data))] ^= 1 << self.random.randrange(8)
        elif sealed := node.store.sealed():
            life, step, row, j = self.random.choice(sealed)
            key = life, step
            snapshot = node.core.get(key)
            assert snapshot is not None
            assert snapshot.stripe is not None
            if layout_of(snapshot.stripe).blocks(row):
                with node.store.mend(key, row, j, 0) as block:
                    block[self.random.randrange(len(block))] ^= 1 << self.random.randrange(8)
        else:
            return
        self.rotten.add(key)
        self.lost.setdefault(key, set()).add(name)

    def reaches(self, sender: str, receiver: str) -> bool:
        apart = frozenset((sender, receiver)) in self.cuts
        return receiver in self.nodes and receiver not in self.paused and not apart

    # --- time

    def later(self, node: Node | None, delay_s: float, call: Callable[[], None]) -> None:
        """Run a call, unless the node is of the past by then."""
        heapq.heappush(self._events, (self.now + delay_s, next(self._numbers), node, call))

    def run(self, seconds: float, until: Callable[[], bool] = lambda: False) -> None:
        end = self.now + seconds
        while self._events and self._events[0][0] <= end and not until():
            at, _, node, call = heapq.heappop(self._events)
            self.now = max(self.now, at)
            if node is None or (node.lives and node.name not in self.paused):
                call()
            elif node.lives:
                self.later(node, 0.2, call)
        self.now = max(self.now, end) if not until() else self.now

    def delay_s(self, *nodes: Node) -> float:
        slowest = max((node.slowness for node in nodes), default=1.0)
        return self.random.choice((0.001, 0.002, 0.005, 0.03)) * slowest

    def work_s(self, node: Node) -> float:
        return self.random.uniform(0.0005, 0.01) * node.slowness

    def _keep_ticking(self, node: Node) -> None:
        def tick() -> None:
            node.tick()
            self.later(node, 0.1, tick)

        self.later(node, self.random.uniform(0, 0.1), tick)

    # --- the network

    def transmit(self, sender: Node, peer: str, text: str) -> None:
        """A message, and its answer; or, after a while, the news that there is none."""
        give_up_s = 0.3
        if self.random.random() < self.lossy or not self.reaches(sender.name, peer):
            self.later(sender, give_up_s, lambda: sender.do(sender.core.unanswered(peer)))
            return
        if self.random.random() < 0.05:  # it comes again, long after
            self.later(None, self.random.uniform(0.1, 4.0), lambda: self._deliver(sender.name, peer, text))

        def deliver() -> None:
            answer = self._deliver(sender.name, peer, text) if self.reaches(sender.name, peer) else None
            torn = self.random.random() < self.lossy or not self.reaches(peer, sender.name)
            if answer is None or torn:
                self.later(sender, give_up_s, lambda: sender.do(sender.core.unanswered(peer)))
            else:
                self.later(sender, self.delay_s(sender), lambda: sender.do(sender.core.answered(peer, answer)))

        self.later(None, self.delay_s(sender), deliver)

    def _deliver(self, sender: str, peer: str, text: str) -> Any:
        receiver = self.nodes.get(peer)
        if receiver is None or peer in self.paused:
            return None
        try:
            answer, actions = receiver.core.heard(sender, json.loads(text))
        except LevelFailed:
            return None
        receiver.do(actions)
        return json.loads(json.dumps(answer))

    def reading_from(
        self, reader: Node, away: Callable[[str], bool] = lambda _: False, lying: frozenset[str] = frozenset()
    ) -> Callable[[str, Iterable[Wanted]], Iterator[Wanted]]:
        """`Transport.read` for a node. While it encodes, reads fail by chance; with `away` or `lying` as those say."""

        def read(peer: str, wanted: Iterable[Wanted]) -> Iterator[Wanted]:
            for one in wanted:
                chance = not lying and self.random.random() < self.reads_fail
                if away(peer) or chance or (peer != reader.name and not self.reaches(reader.name, peer)):
                    raise LevelFailed(f"node {peer} is out of reach")
                got = bytearray(self.nodes[peer].lend(one.name, one.offset, one.into.nbytes))
                if got and (peer in lying and self.random.random() < 0.5):
                    got[self.random.randrange(len(got))] ^= 1 << self.random.randrange(8)
                copy(one.into, memoryview(bytes(got)))
                yield one

        return read

    def push(self, sender: Node, peer: str, where: tuple[Key, int, int, int], data: memoryview, expected: str) -> None:
        key, row, j, offset = where
        if self.random.random() < self.reads_fail or not self.reaches(sender.name, peer):
            raise LevelFailed(f"node {peer} is out of reach")
        with self.nodes[peer].store.take(key, row, j, offset, data.nbytes) as into:
            torn = self.random.random() < self.reads_fail
            copy(into[: data.nbytes // 2] if torn else into, data[: data.nbytes // 2] if torn else data)
            if torn or digest(into) != expected:
                raise LevelFailed(f"{parity_range(*key, row, j)} was torn on its way to node {peer}")
        if self.random.random() < self.reads_fail:
            raise LevelFailed(f"node {peer} took it, and the news was lost")

    # --- what is known from above

    def seal(self, name: str, life: str, step: int) -> None:
        node = self.nodes.get(name)
        if node is None:
            return
        images = {rank: self.truth[life, step, rank] for rank in self.ranks[name]}
        self.agents.setdefault((life, step), {})[name] = node.agent
        if (life, step) not in self.rotten and (self.newest is None or (life, step) > self.newest):
            self.lost.get((life, step), set()).discard(name)  # once more, by a new agent
        node.seal(life, step, self.world_size, images)

    def on_arrived(self, node: Node, key: Key) -> None:
        assert self.agents[key].get(node.name) == node.agent, f"{node.name} reports {key}, which it has lost"
        self.arrived.setdefault(key, set()).add(node.name)
        if len(self.arrived[key]) < len(self.names):
            return
        if self.newest is None or key > self.newest:
            self.newest = key
            for each in self.nodes.values():
                self.later(each, self.delay_s(), lambda each=each: each.is_complete(key))  # type: ignore[misc]

    def check(self, fault: bool) -> Key | None:
        """Recover everything on one node, as it can be done now; with `fault` more is lost, or lies, meanwhile.

        While at most m members of the newest whole snapshot are lost or away: it, or a newer one, is chosen, and every
        image of it comes back bit for bit. In any case no wrong byte is given out.
        """
        reader = self.nodes[self.random.choice(sorted(self.nodes))]
        reachable = {name for name in self.nodes if name == reader.name or self.reaches(reader.name, name)}
        inventories = [self.nodes[name].inventory() for name in sorted(reachable)]
        decision = decide(inventories, self.world_size)
        promised, missing = self.newest, set(self.names) - reachable
        if promised is not None:
            missing |= self.lost.get(promised, set())
        bearable = promised is not None and len(missing) <= self.m
        if bearable:
            assert decision.action == "recover", f"{promised} cannot be had: {decision.reason}; missing {missing}"
            assert promised is not None
            assert decision.key >= promised, f"{decision.key} was chosen, {promised} was whole: {decision.reason}"
        if decision.action != "recover":
            return None
        failing: set[str] = set()
        if fault:
            others = sorted(reachable - missing - {reader.name})
            failing = set(self.random.sample(others, min(len(others), max(0, self.m - len(missing)))))
        try:
            self._recover_all(reader, inventories, decision, failing)
        except (LevelFailed, DamagedImage) as error:
            what = f"{decision.key} could not be recovered: {error}; missing {missing}, failing {failing}"
            if bearable and decision.key == promised:
                raise AssertionError(what) from error
            if not failing and decision.key not in self.rotten:
                raise AssertionError(f"{what}; {decision.reason}") from error
            return None
        return decision.key

    def _recover_all(self, reader: Node, inventories: list[Inventory], decision: Decision, failing: set[str]) -> None:
        """Raises LevelFailed or DamagedImage; AssertionError for a wrong byte."""
        dead = {name for name in failing if self.random.random() < 0.5}
        left = self.random.randint(0, 20)

        def away(peer: str) -> bool:
            nonlocal left
            left -= 1
            return peer in dead and left < 0

        read = self.reading_from(reader, away, frozenset(failing - dead) or frozenset({"nobody"}))
        for rank, found in decision.images.items():
            image = bytearray(len(self.truth[(*decision.key, rank)]))
            made = self._reader(reader, inventories, found.key, rank, read)
            made.read(rank, 0, -(-len(image) // BLOCK), memoryview(image))
            assert bytes(image) == self.truth[(*decision.key, rank)], f"wrong bytes of rank {rank} of {decision.key}"

    def _reader(
        self, reader: Node, inventories: list[Inventory], key: Key, rank: int, read: Callable[..., Any]
    ) -> Reader:
        blocks = Blocks(BLOCK, kept=32, at_once=3)
        gather = gather_in_turn(read, blocks)
        knowing = [each for each in inventories if key in each.known]
        if not knowing:
            holders = [each.node for each in inventories if (*key, rank) in each.images]
            sealed = self.nodes[holders[0]].images[(*key, rank)][1]
            return Reader(key, BLOCK, {rank: sealed}, Sources(images={rank: holders}, parity={}), gather, blocks)
        snapshot = self.nodes[knowing[0].node].core.get(key)
        assert snapshot is not None
        assert snapshot.state is State.WHOLE
        assert snapshot.stripe is not None
        images = {each.rank: each for each in (Sealed.from_json(one.to_json()) for one in snapshot.sealed().values())}
        done = {each.row: each for each in (Done.from_json(one.to_json()) for one in snapshot.done.values())}
        sources = sources_of(inventories, knowing[0].known[key])
        return Reader(key, BLOCK, images, sources, gather, blocks, layout=layout_of(snapshot.stripe), done=done)
