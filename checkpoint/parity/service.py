"""The parity level of one node: the shell around `core.py`, with threads, memory and the transport.

The agent tells it what is sealed, dropped and needed, and hears when the parity of a snapshot is whole. Peers reach it
through the transport (`Served`). Encoding has a thread for each row and one for each node it reads from; telling, one
for each peer. What those find goes to the core under a lock, which is never held while anything waits.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Protocol

from resilient.checkpoint.digest import BLOCK_BYTES
from resilient.checkpoint.parity.actions import Action, Arrived, Expect, Failed, Free, Send, StartRow, StopRow
from resilient.checkpoint.parity.core import Core
from resilient.checkpoint.parity.encode import Hands, RowJob, Stopped
from resilient.checkpoint.parity.errands import Errands
from resilient.checkpoint.parity.facts import sealed_of
from resilient.checkpoint.parity.gather import AHEAD, AT_ONCE, gather_with_threads
from resilient.checkpoint.parity.layout import Key, layout_of, parity_range, parse_range_name
from resilient.checkpoint.parity.memory import Blocks
from resilient.checkpoint.parity.recovery import Here, Recovery
from resilient.checkpoint.parity.scrub import Finding, Scrub, Whole, run
from resilient.checkpoint.parity.snapshot import Snapshot, State
from resilient.checkpoint.parity.store import ParityStore
from resilient.checkpoint.peers.pacing import Pace
from resilient.checkpoint.peers.transport import Message, Transport
from resilient.checkpoint.priority import run_behind
from resilient.checkpoint.record import Record
from resilient.errors import DamagedImage, LevelFailed, OverBudget, ResilientError

log = logging.getLogger(__name__)
TICK_S = 0.05
NICE = 10
SCRUB_IDLE_S = 1.0
_STRIPE_S = 2.0  # how long a push waits for a stripe that its sender knew of first
_PUSHERS = 8


class Images(Protocol):
    """What the agent does for its parity level."""

    @property
    def agent_id(self) -> str:
        """New whenever the agent starts."""
        ...

    def lend_image(self, life: str, step: int, rank: int) -> AbstractContextManager[memoryview]:
        """A whole sealed image, which stays while the context lasts. Any thread. Raises LevelFailed."""
        ...

    def mend_image(self, life: str, step: int, rank: int, offset: int, block: memoryview) -> None:
        """Put a block right that was damaged in memory. Any thread. Raises LevelFailed."""
        ...

    def inventory(self) -> list[Record]:
        """The records of all sealed images in memory. Any thread."""
        ...

    def post(self, call: Callable[[], None]) -> None:
        """Run a call on the agent's loop. Any thread."""
        ...

    def on_parity(self, life: str, step: int, error: str | None) -> None:
        """The parity of a snapshot is whole in this node's group, or has failed. On the loop."""
        ...


class ParityService:
    """See the module. Does nothing before `configure`; `close` at the end."""

    def __init__(
        self,
        node: str,
        images: Images,
        transport: Transport,
        *,
        scrub_bytes_per_s: float | None = None,
        on_damage: Callable[[Finding], None] = lambda _: None,
        block_bytes: int = BLOCK_BYTES,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._node = node
        self._images = images
        self._transport = transport
        self._clock = clock
        self._lock = threading.Lock()
        self._core = Core(node, images.agent_id, block_bytes)
        self._store = ParityStore(node)
        self._blocks = Blocks(block_bytes, kept=2 * AHEAD, at_once=AT_ONCE)
        self._errands = Errands(transport.call, self._told)
        self._jobs: dict[Key, RowJob] = {}
        self._pushers = ThreadPoolExecutor(_PUSHERS, thread_name_prefix="resilient-push")
        self._nodes: tuple[str, ...] = ()
        self._poked = threading.Event()
        self._closed = False
        self._ended = threading.Event()
        self._started = False
        here = Here(
            node=node,
            records=images.inventory,
            shards=self._store.whole,
            whole=self._whole,
            snapshot=self._snapshot,
            pieces=lambda name: self._core.pieces.get(name),
            lend=self._lend,
        )
        self._recovery = Recovery(here, transport, lambda: self._nodes, self._blocks, block_bytes)
        self._on_damage = on_damage
        self._findings = {"mended": 0, "damaged": 0}
        self._scrub: Scrub | None = None
        if scrub_bytes_per_s is not None:
            pace = Pace(scrub_bytes_per_s, sleep=self._ended.wait)
            reader = self._recovery.reader
            self._scrub = Scrub(node, images, self._store, self._find_whole, reader, pace, block_bytes, self._found)

    # --- what the agent tells; on its loop, nothing blocks

    def configure(
        self, group: Sequence[str], m: int, nodes: Iterable[str] | None = None, budget_bytes: int | None = None
    ) -> None:
        """The nodes of this node's group, in an order that is the same on all of them; empty: no parity.

        `nodes` are all nodes of the job, whom `recover` asks (None: those of the group); `budget_bytes` is for the
        parity kept here, beyond which a snapshot has none. Raises UsageError.
        """
        with self._lock:
            self._store.budget_bytes = budget_bytes
            self._do(self._core.configure(group, m))
            self._nodes = tuple(group if nodes is None else nodes)
            self._blocks.kept = AHEAD * (len(group) + m)
        self._errands.only(group)
        self._start_threads()

    def sealed(self, life: str, step: int, world_size: int, records: Mapping[int, Record]) -> None:
        """All images of this node's ranks are sealed."""
        images = [sealed_of(record) for record in records.values()]
        pieces = {one.pieces: records[one.rank].pieces_text for one in images}
        with self._lock:
            self._do(self._core.sealed(life, step, world_size, images, pieces))

    def dropped(self, life: str, step: int) -> None:
        """This node's images of a snapshot are gone, or will not come: its parity is not waited for any more."""
        with self._lock:
            self._do(self._core.dropped(life, step))

    def keep(self, needed: Iterable[Key]) -> None:
        """The snapshots whose parity must stay; that of others goes once it is whole. What is in the making stays."""
        with self._lock:
            self._do(self._core.keep(needed))

    def close(self) -> None:
        """Give all parity back. Threads end by themselves, at once where the transport is closed first."""
        with self._lock:
            self._closed = True
            self._ended.set()
            jobs = list(self._jobs.values())
        for job in jobs:
            job.stop()
        self._errands.close()
        self._poked.set()
        self._pushers.shutdown(wait=False, cancel_futures=True)
        self._store.close()

    # --- any thread, blocking

    def recoverable(self, ranks: Iterable[int]) -> dict[int, list[tuple[int, str]]]:
        """(step, life) of all images that can be had of each rank from this or other nodes, the newest first."""
        found = self._recovery.recoverable(ranks)
        return {rank: [(one.key[1], one.key[0]) for one in images] for rank, images in found.items()}

    def images_of_others(self, world_size: int) -> list[tuple[int, int, int]]:
        """(step, world size, rank) of all images that can be had of jobs of another size."""
        return self._recovery.images_of_others(world_size)

    def recover(
        self,
        rank: int,
        step: int,
        room: Callable[[int], memoryview],
        life: str | None = None,
        world_size: int | None = None,
    ) -> Record:
        """Fetch the image of a rank into `room(its size)`; every byte is verified.

        `life` None: the latest that has the step; `world_size`: of a job of that size, if it matters. `room` may be
        called twice. Raises LevelFailed or DamagedImage.
        """
        record, reason = self._recovery.recover(rank, step, room, life, world_size)
        log.info("step %d was fetched from the other nodes; %s", step, reason)
        return record

    def status(self) -> Message:
        with self._lock:
            snapshots = self._core.snapshots()
            return {
                "group": list(self._core.group),
                "m": self._core.m,
                "peers": self._core.peers(),
                "bytes": self._store.total_bytes,
                "scrubbed_bytes": self._scrub.seen_bytes if self._scrub is not None else 0,
                **self._findings,
                "buffer_bytes": self._blocks.idle_bytes,
                "whole": [list(each.key) for each in snapshots if each.state is State.WHOLE],
                "open": [each.progress() for each in snapshots if each.state is State.OPEN],
            }

    # --- what peers ask: Served

    def answer(self, peer: str, message: Message) -> Message:
        if message.get("op") == "parity":
            with self._lock:
                answer, actions = self._core.heard(peer, message)
                self._do(actions)
            return answer
        found = self._recovery.answer(message)
        if found is None:
            raise LevelFailed(f"node {self._node} does not know what {message.get('op')!r} is")
        return found

    def lend(self, peer: str, name: str, offset: int, nbytes: int) -> AbstractContextManager[memoryview]:
        return self._lend(name, offset, nbytes)

    def take(self, peer: str, name: str, offset: int, nbytes: int) -> AbstractContextManager[memoryview]:
        found = parse_range_name(name)
        if found is None or found.kind != "parity":
            raise LevelFailed(f"node {self._node} takes no {name!r}")
        row, j = found.numbers
        return self._store.take((found.life, found.step), row, j, offset, nbytes, wait_s=_STRIPE_S)

    @contextmanager
    def _lend(self, name: str, offset: int, nbytes: int) -> Iterator[memoryview]:
        found = parse_range_name(name)
        if found is None:
            raise LevelFailed(f"node {self._node} has no {name!r}")
        if found.kind == "parity":
            row, j = found.numbers
            with self._store.lend((found.life, found.step), row, j, offset, nbytes) as lent:
                yield lent
            return
        with self._images.lend_image(found.life, found.step, found.numbers[0]) as image:
            if offset < 0 or offset + nbytes > image.nbytes:
                raise LevelFailed(f"{name} on node {self._node} has no {nbytes} bytes at {offset}")
            yield image[offset : offset + nbytes]

    # --- inside: doing what the core decides; the lock is held

    def _do(self, actions: Iterable[Action]) -> None:
        todo = list(actions)
        while todo:
            action = todo.pop(0)
            if self._closed:
                return
            match action:
                case Send():
                    self._errands.send(action.peer, action.message)
                case Expect():
                    todo = self._expect(action) + todo
                case StartRow():
                    self._start_row(action)
                case StopRow():
                    if job := self._jobs.pop(action.key, None):
                        job.stop()
                case Arrived():
                    self._store.seal(action.key)
                    self._post(action.key, None)
                case Failed():
                    log.warning("step %d has no parity: %s", action.key[1], action.reason)
                    self._post(action.key, action.reason)
                case Free():
                    self._store.free(action.key)
        self._poked.set()

    def _post(self, key: Key, error: str | None) -> None:
        self._images.post(lambda: self._images.on_parity(*key, error))

    def _expect(self, action: Expect) -> list[Action]:
        layout = layout_of(action.stripe)
        member = next(at for at, one in enumerate(action.stripe.members) if one.node == self._node)
        try:
            self._store.expect(layout, member)
        except OverBudget as error:
            return self._core.refuse(action.stripe.key, str(error))
        return []

    def _start_row(self, action: StartRow) -> None:
        key = action.stripe.key
        job = self._jobs.get(key)
        if job is None:
            hands = Hands(
                gather=gather_with_threads(self._transport.read, self._blocks),
                blocks=self._blocks,
                keep=partial(self._keep, key, action.row),
                push=partial(self._push, key, action.row),
                submit=self._submit,
            )
            job = self._jobs[key] = RowJob(layout_of(action.stripe), action.row, action.images, hands)
        name = f"resilient-encode-{key[1]}"
        threading.Thread(target=self._run_row, args=(key, job), name=name, daemon=True).start()

    # --- inside: threads

    def _run_row(self, key: Key, job: RowJob) -> None:
        run_behind(NICE)
        try:
            for _ in job.steps():
                pass
        except Stopped:
            return
        except ResilientError as error:
            final = isinstance(error, DamagedImage) and job.damaged_again
            log.info("row %d of step %d: %s", job.row, key[1], error)
            self._report(partial(self._core.row_failed, key, str(error), final=final))
        except Exception as error:
            log.exception("row %d of step %d", job.row, key[1])
            reason = f"row {job.row} could not be encoded: {type(error).__name__}: {error}"
            self._report(partial(self._core.row_failed, key, reason, final=True))
        else:
            with self._lock:
                self._jobs.pop(key, None)
            self._report(lambda: self._core.row_done(key, job.digests()))

    def _report(self, call: Callable[[], list[Action]]) -> None:
        with self._lock:
            self._do(call())

    def _keep(self, key: Key, row: int, j: int, number: int, nbytes: int) -> AbstractContextManager[memoryview]:
        return self._store.take(key, row, j, number * self._blocks.block_bytes, nbytes)

    def _push(self, key: Key, row: int, node: str, j: int, offset: int, data: memoryview, digest: str) -> None:
        self._transport.push(node, parity_range(*key, row, j), offset, data, digest)

    def _submit(self, call: Callable[[], None], /) -> "Future[None]":
        try:
            return self._pushers.submit(call)
        except RuntimeError as error:
            raise LevelFailed(f"the parity of node {self._node} is closed") from error

    def _told(self, peer: str, answer: Message | ResilientError) -> None:
        if isinstance(answer, ResilientError):
            log.debug("node %s was not told: %s", peer, answer)
            self._report(lambda: self._core.unanswered(peer))
        else:
            self._report(lambda: self._core.answered(peer, answer))

    def _start_threads(self) -> None:
        if self._started:
            return
        self._started = True
        threading.Thread(target=self._keep_time, name="resilient-parity-clock", daemon=True).start()
        if self._scrub is not None:
            threading.Thread(
                target=self._keep_scrubbing, args=(self._scrub,), name="resilient-scrub", daemon=True
            ).start()

    def _keep_scrubbing(self, scrub: Scrub) -> None:
        run_behind(NICE)
        run(scrub.walk, self._ended.wait, SCRUB_IDLE_S)

    def _found(self, finding: Finding) -> None:
        log.error("%s", finding)
        self._findings["damaged" if finding.error else "mended"] += 1
        self._on_damage(finding)

    def _find_whole(self, key: Key) -> Whole | None:
        found = self._snapshot(key)
        if found is None or found.state is not State.WHOLE or found.stripe is None:
            return None
        return Whole(layout=layout_of(found.stripe), done=found.done)

    def _keep_time(self) -> None:
        """Tick as long as there is something that waits for time to pass."""
        while not self._closed:
            with self._lock:
                self._poked.clear()
                busy = self._core.is_busy
                if busy:
                    self._do(self._core.tick(self._clock()))
                    self._poked.clear()
            if busy:
                self._ended.wait(TICK_S)
            else:
                self._poked.wait()

    def _whole(self) -> list[Snapshot]:
        with self._lock:
            return [each.copy() for each in self._core.snapshots() if each.state is State.WHOLE]

    def _snapshot(self, key: Key) -> Snapshot | None:
        with self._lock:
            found = self._core.get(key)
            return found.copy() if found is not None else None
