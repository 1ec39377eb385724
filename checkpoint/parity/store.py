"""The parity shards that this node keeps: their memory, which blocks are there, their digests, and who uses them.

A shard is expected (its room is there), filled block by block by its row's primary, and, once its snapshot is whole,
`sealed` with the digests that the primary told. What is freed
while somebody uses it gives its memory back after the last user. Thread-safe; only `take` waits, where told to.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from resilient.checkpoint.agent.memory import available_bytes, check_room
from resilient.checkpoint.parity.layout import Key, Layout, parity_range
from resilient.checkpoint.parity.memory import Arenas
from resilient.errors import DamagedImage, LevelFailed, OverBudget

ShardId = tuple[str, int, int, int]
"""(life, step, row, parity number)."""


@dataclass(slots=True, kw_only=True, eq=False)
class _Shard:
    id: ShardId
    layout: Layout
    piece: memoryview
    there: bytearray
    users: int = 0
    freed: bool = False
    sealed: bool = False

    @property
    def is_whole(self) -> bool:
        return 0 not in self.there

    def view(self, number: int) -> memoryview:
        start = number * self.layout.stripe.block_bytes
        return self.piece[start : start + self.layout.nbytes(self.id[2], number)]


class ParityStore:
    """All parity of this node. `budget_bytes` None: what the machine has."""

    def __init__(self, node: str, budget_bytes: int | None = None) -> None:
        self._node = node
        self._budget_bytes = budget_bytes
        self._arenas = Arenas()
        self._changed = threading.Condition()
        self._held: dict[Key, dict[tuple[int, int], _Shard]] = {}

    # --- room

    def expect(self, layout: Layout, member: int) -> None:
        """Make room for the shards that a member keeps of a stripe. Raises OverBudget. Safe to repeat."""
        stripe = layout.stripe
        with self._changed:
            if stripe.key in self._held:
                return
            sizes = {pair: layout.parity_bytes(pair[0]) for pair in layout.kept_by(member)}
            self._check(sum(sizes.values()), stripe.key)
            held: dict[tuple[int, int], _Shard] = {}
            for (row, j), nbytes in sizes.items():
                held[row, j] = _Shard(
                    id=(*stripe.key, row, j),
                    layout=layout,
                    piece=self._arenas.take(nbytes),
                    there=bytearray(layout.blocks(row)),
                )
            self._held[stripe.key] = held
            self._changed.notify_all()

    def free(self, key: Key) -> None:
        """The shards of a snapshot are not needed any more. Safe to repeat."""
        with self._changed:
            for shard in self._held.pop(key, {}).values():
                shard.freed = True
                self._give_back(shard)

    def close(self) -> None:
        with self._changed:
            keys = list(self._held)
        for key in keys:
            self.free(key)
        self._arenas.clear()

    @property
    def total_bytes(self) -> int:
        return self._arenas.total_bytes

    def _check(self, nbytes: int, key: Key) -> None:
        """Raises OverBudget."""
        if self._budget_bytes is not None and self._arenas.used_bytes + nbytes > self._budget_bytes:
            raise OverBudget(
                f"node {self._node}: the parity of step {key[1]} takes {nbytes} bytes, and {self._arenas.used_bytes} "
                f"of the {self._budget_bytes} for parity are in use; raise memory_budget, or take fewer parities"
            )
        check_room(max(0, self._arenas.used_bytes + nbytes - self._arenas.total_bytes), available_bytes())

    # --- filling

    @contextmanager
    def take(self, key: Key, row: int, j: int, offset: int, nbytes: int, wait_s: float = 0.0) -> Iterator[memoryview]:
        """Where a block goes; it is there once the context ends well. Raises LevelFailed.

        A block that comes again is the same, so one that is torn then (it may come late, from a connection that was
        given up) leaves what is there. `wait_s`: how long to wait for a stripe of which the sender knew first.
        """
        with self._changed:
            self._changed.wait_for(lambda: key in self._held, wait_s)
            shard = self._find(key, row, j)
            number = self._number(shard, offset, nbytes)
            if shard.sealed:
                raise LevelFailed(f"{_name(shard)} on node {self._node} is sealed and takes no more blocks")
            shard.users += 1
        try:
            yield shard.view(number)
            shard.there[number] = 1
        except DamagedImage:
            shard.there[number] = 0
            raise
        finally:
            self._release(shard)

    def seal(self, key: Key) -> None:
        """All rows are done: nothing of this snapshot changes any more."""
        with self._changed:
            for shard in self._held.get(key, {}).values():
                shard.sealed = True

    # --- reading

    @contextmanager
    def lend(self, key: Key, row: int, j: int, offset: int, nbytes: int) -> Iterator[memoryview]:
        """One block, which stays while the context lasts. Raises LevelFailed."""
        with self._changed:
            shard = self._find(key, row, j)
            number = self._number(shard, offset, nbytes)
            if not shard.there[number]:
                raise LevelFailed(f"block {number} of {_name(shard)} is not (or no longer) on node {self._node}")
            shard.users += 1
        try:
            yield shard.view(number).toreadonly()
        finally:
            self._release(shard)

    @contextmanager
    def mend(self, key: Key, row: int, j: int, number: int) -> Iterator[memoryview]:
        """A block of a sealed shard, to be written again. Raises LevelFailed."""
        with self._changed:
            shard = self._find(key, row, j)
            shard.users += 1
        try:
            yield shard.view(number)
        finally:
            self._release(shard)

    def whole(self) -> dict[Key, list[tuple[int, int]]]:
        """The (row, parity number) of the shards whose blocks are all there."""
        with self._changed:
            return {
                key: sorted(pair for pair, shard in held.items() if shard.is_whole) for key, held in self._held.items()
            }

    def sealed(self) -> list[ShardId]:
        with self._changed:
            return [shard.id for held in self._held.values() for shard in held.values() if shard.sealed]

    # --- inside

    def _find(self, key: Key, row: int, j: int) -> _Shard:
        held = self._held.get(key)
        if held is None or (row, j) not in held:
            raise LevelFailed(f"{parity_range(*key, row, j)} is not kept on node {self._node}")
        return held[row, j]

    def _number(self, shard: _Shard, offset: int, nbytes: int) -> int:
        """The row block that starts at an offset. Raises LevelFailed unless it is exactly one."""
        number, rest = divmod(offset, shard.layout.stripe.block_bytes)
        row = shard.id[2]
        fits = not rest and 0 <= number < len(shard.there) and shard.layout.nbytes(row, number) == nbytes
        if not fits:
            raise LevelFailed(f"{_name(shard)} has no block of {nbytes} bytes at {offset}")
        return number

    def _release(self, shard: _Shard) -> None:
        with self._changed:
            shard.users -= 1
            self._give_back(shard)

    def _give_back(self, shard: _Shard) -> None:
        if shard.freed and not shard.users:
            self._arenas.give(shard.piece)
            shard.piece = memoryview(b"")


def _name(shard: _Shard) -> str:
    return parity_range(*shard.id)
