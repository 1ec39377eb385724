"""Blocks of several nodes, brought together position by position: what encoding and recovery have in common.

A *position* is a list of parts that are needed at once, such as the k shards of some row blocks. One thread reads from
each node, in the order of the positions, a part ahead into buffers that are used again; whoever takes the positions
gets them in order. A part that is meant for the caller's own memory goes straight there. Parts are of several blocks:
after each, the caches are full of data, and whatever is done once for it (frames, threads that wake one another) costs
as much as a good part of a block.
"""

import queue
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Protocol

from resilient.checkpoint.parity.memory import Blocks, copy
from resilient.checkpoint.peers.transport import Wanted
from resilient.errors import ResilientError

AHEAD = 2  # parts of each node that are on their way or waiting for those of others
AT_ONCE = 4  # blocks of a part

Read = Callable[[str, Iterable[Wanted]], Iterator[Wanted]]
"""`Transport.read`, or what reads from this node as well."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Part:
    """Some blocks of a named range on a node, with the digest of each; only the last may be short.

    `shard` is for the taker; `into` None: into a buffer.
    """

    node: str
    name: str
    offset: int
    nbytes: int
    digests: tuple[str, ...]
    shard: int
    into: memoryview | None = None


class SourceFailed(Exception):
    """A node did not give what the next position needs. Never leaves this package."""

    def __init__(self, node: str, error: ResilientError) -> None:
        super().__init__(f"{node}: {error}")
        self.node = node
        self.error = error


Position = Sequence[Part]
Taken = list[tuple[Part, memoryview]]
Check = Callable[[Part, memoryview], None]
"""Called on the reading threads with each part as it comes; what it raises counts as the node's failure."""
Gather = Callable[[Sequence[Position], Check], Generator[Taken, None, None]]
"""Gives the parts of each position, in order; they stay until the next is asked for. Raises SourceFailed."""


def gather_in_turn(read: Read, blocks: Blocks) -> Gather:
    """Without threads: one part after the other. For simulations."""

    def gather(positions: Sequence[Position], check: Check) -> Generator[Taken, None, None]:
        for position in positions:
            taken: Taken = []
            for part in position:
                into = part.into if part.into is not None else blocks.take()[: part.nbytes]
                try:
                    for wanted in read(part.node, [Wanted(name=part.name, offset=part.offset, into=into)]):
                        check(part, wanted.into)
                except ResilientError as error:
                    raise SourceFailed(part.node, error) from error
                taken.append((part, into))
            yield taken
            for part, view in taken:
                if part.into is None:
                    blocks.give(memoryview(view.obj)[: blocks.buffer_bytes])

    return gather


@dataclass(frozen=True, slots=True)
class Here:
    """This node: its own bytes are not read but lent, by name, offset and size."""

    node: str
    lend: Callable[[str, int, int], AbstractContextManager[memoryview]]


def gather_with_threads(read: Read, blocks: Blocks, here: Here | None = None, ahead: int = AHEAD) -> Gather:
    """A thread for each other node. Closing the iterator ends them, each after the block it is at.

    It waits for them only where they read into the caller's memory, which must not change afterwards.
    """

    def gather(positions: Sequence[Position], check: Check) -> Generator[Taken, None, None]:
        rows: list[list[_Source]] = []
        sources: dict[str, _Source] = {}
        for position in positions:
            users = []
            for part in position:
                source = sources.get(part.node)
                if source is None:
                    lent = here is not None and part.node == here.node
                    source = (
                        _Lent(here, blocks, check) if lent and here else _Reader(part.node, read, blocks, ahead, check)
                    )
                    sources[part.node] = source
                source.parts.append(part)
                users.append(source)
            rows.append(users)
        for source in sources.values():
            source.start(max((users.count(source) for users in rows), default=1))
        try:
            for users in rows:
                taken = [source.next() for source in users]
                yield [(part, view) for part, view, _ in taken]
                for source, (_, _, back) in zip(users, taken, strict=True):
                    source.give_back(back)
        finally:
            for source in sources.values():
                source.stop()
            for source in sources.values():
                source.wait()

    return gather


Back = memoryview | ExitStack | None
"""What a source wants back after its part was used: its buffer, or what it was lent."""
_Item = tuple[Part, memoryview, Back]


class _Source(Protocol):
    """Gives the parts of one node, in order."""

    parts: list[Part]

    def start(self, at_once: int) -> None: ...
    def next(self) -> _Item: ...
    def give_back(self, back: Back) -> None: ...
    def stop(self) -> None: ...
    def wait(self) -> None: ...


class _Lent:
    """The parts of this node, where they lie; short ones in buffers, so that there is room behind them."""

    def __init__(self, here: Here, blocks: Blocks, check: Check) -> None:
        self.parts: list[Part] = []
        self._here = here
        self._blocks = blocks
        self._check = check
        self._next = 0
        self._lent: set[ExitStack] = set()

    def start(self, at_once: int) -> None:
        """There is nothing to start."""

    def next(self) -> _Item:
        part = self.parts[self._next]
        self._next += 1
        lending = ExitStack()
        try:
            view = lending.enter_context(self._here.lend(part.name, part.offset, part.nbytes))
            if part.into is not None or part.nbytes % self._blocks.block_bytes:
                buffer = self._blocks.take() if part.into is None else None
                into = part.into if buffer is None else buffer[: part.nbytes]
                assert into is not None
                copy(into, view)
                lending.close()
                self._check(part, into)
                return part, into, buffer
            self._check(part, view)
        except ResilientError as error:
            lending.close()
            raise SourceFailed(part.node, error) from error
        self._lent.add(lending)
        return part, view, lending

    def give_back(self, back: Back) -> None:
        if isinstance(back, ExitStack):
            self._lent.discard(back)
            back.close()
        elif back is not None:
            self._blocks.give(back)

    def stop(self) -> None:
        for lending in self._lent:
            lending.close()
        self._lent.clear()

    def wait(self) -> None:
        """Nothing goes on by itself."""


class _Reader:
    """Reads the parts of one node in order; `next` gives them in that order."""

    def __init__(self, node: str, read: Read, blocks: Blocks, ahead: int, check: Check) -> None:
        self.node = node
        self.parts: list[Part] = []
        self._read = read
        self._blocks = blocks
        self._ahead = ahead
        self._check = check
        self._there: queue.SimpleQueue[_Item | SourceFailed] = queue.SimpleQueue()
        self._room = threading.Semaphore(0)
        self._thread: threading.Thread | None = None
        self._stopped = False
        self._reading = 0  # the next part to ask for
        self._buffers: list[memoryview | None] = []  # of the parts that are asked for, in order

    def start(self, at_once: int) -> None:
        """`at_once`: how many parts the taker needs together."""
        for _ in range(max(self._ahead, 2 * at_once)):
            self._room.release()
        self._thread = threading.Thread(target=self._run, name=f"resilient-gather-{self.node}", daemon=True)
        self._thread.start()

    def next(self) -> _Item:
        """Waits for the next part. Raises SourceFailed."""
        item = self._there.get()
        if isinstance(item, SourceFailed):
            self._there.put(item)
            raise item
        return item

    def give_back(self, back: Back) -> None:
        """The taker does not look at a part any more."""
        if isinstance(back, memoryview):
            self._blocks.give(back)
        self._room.release()

    def stop(self) -> None:
        self._stopped = True
        self._room.release()

    def wait(self) -> None:
        """Until nothing can change in the caller's memory any more."""
        if self._thread is not None and any(part.into is not None for part in self.parts):
            self._thread.join()

    def _run(self) -> None:
        try:
            while not self._stopped and self._reading < len(self.parts):
                self._room.acquire()
                self._read_some()
        except ResilientError as error:
            self._there.put(SourceFailed(self.node, error))
        except Exception as error:  # whoever waits for the next part has to hear of it
            self._there.put(SourceFailed(self.node, ResilientError(f"{type(error).__name__}: {error}")))
        finally:
            # Only now nothing more can arrive in what was asked for.
            for buffer in self._buffers:
                if buffer is not None:
                    self._blocks.give(buffer)
            while self._stopped and not self._there.empty():
                item = self._there.get()
                if not isinstance(item, SourceFailed) and isinstance(item[2], memoryview):
                    self._blocks.give(item[2])

    def _read_some(self) -> None:
        """Read as long as there is room. One place has been acquired."""
        for number, wanted in enumerate(self._read(self.node, self._wanted()), self._reading):
            part = self.parts[number]
            self._check(part, wanted.into)
            self._there.put((part, wanted.into, self._buffers.pop(0)))
            if self._stopped:
                return

    def _wanted(self) -> Iterator[Wanted]:
        """The next parts, until there is no room: to wait for it here would keep back what has arrived already."""
        while True:
            part = self.parts[self._reading]
            buffer = self._blocks.take() if part.into is None else None
            self._buffers.append(buffer)
            self._reading += 1
            into = part.into if buffer is None else buffer[: part.nbytes]
            assert into is not None
            yield Wanted(name=part.name, offset=part.offset, into=into)
            if self._stopped or self._reading >= len(self.parts) or not self._room.acquire(blocking=False):
                return
