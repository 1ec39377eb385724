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

    def view(self, numbers: range) -> memoryview:
        """Row blocks, of which only the last may be short."""
        size = self.layout.stripe.block_bytes
        return self.piece[numbers[0] * size : numbers[-1] * size + self.layout.nbytes(self.id[2], numbers[-1])]


class ParityStore:
    """All parity of this node. `budget_bytes` may change; None: what the machine has. See `_check`."""

    def __init__(self, node: str, budget_bytes: int | None = None) -> None:
        self._node = node
        self.budget_bytes = budget_bytes
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
            self._check(sum(sizes.values()), layout)
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

    def _check(self, nbytes: int, layout: Layout) -> None:
        """Raises OverBudget.

        Counted is what the policy counts, m / k of the largest node's images: that parity is of whole blocks comes on
        top. What a job of another size has left behind is not counted, as its images are not.
        """
        stripe, budget = layout.stripe, self.budget_bytes
        held = [next(iter(shards.values())).layout for shards in self._held.values() if shards]
        used = sum(_counted_bytes(one) for one in held if one.stripe.world_size == stripe.world_size)
        counted = _counted_bytes(layout)
        if budget is not None and used + counted > budget:
            raise OverBudget(
                f"node {self._node}: the parity of step {stripe.step} takes {counted} bytes, and {used} of the "
                f"{budget} that memory_budget has for parity are in use; raise memory_budget, or take fewer parities"
            )
        check_room(max(0, self._arenas.used_bytes + nbytes - self._arenas.total_bytes), available_bytes())

    # --- filling

    @contextmanager
    def take(self, key: Key, row: int, j: int, offset: int, nbytes: int, wait_s: float = 0.0) -> Iterator[memoryview]:
        """Where some blocks go; they are there once the context ends well. Raises LevelFailed.

        A block that comes again is the same, so one that is torn then (it may come late, from a connection that was
        given up) leaves what is there. `wait_s`: how long to wait for a stripe of which the sender knew first.
        """
        with self._changed:
            self._changed.wait_for(lambda: key in self._held, wait_s)
            shard = self._find(key, row, j)
            numbers = self._numbers(shard, offset, nbytes)
            if shard.sealed:
                raise LevelFailed(f"{_name(shard)} on node {self._node} is sealed and takes no more blocks")
            shard.users += 1
        there = slice(numbers.start, numbers.stop)
        try:
            yield shard.view(numbers)
            shard.there[there] = b"\1" * len(numbers)
        except DamagedImage:
            shard.there[there] = b"\0" * len(numbers)
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
        """Some blocks, which stay while the context lasts. Raises LevelFailed."""
        with self._changed:
            shard = self._find(key, row, j)
            numbers = self._numbers(shard, offset, nbytes)
            for number in numbers:
                if not shard.there[number]:
                    raise LevelFailed(f"block {number} of {_name(shard)} is not (or no longer) on node {self._node}")
            shard.users += 1
        try:
            yield shard.view(numbers).toreadonly()
        finally:
            self._release(shard)

    @contextmanager
    def mend(self, key: Key, row: int, j: int, number: int) -> Iterator[memoryview]:
        """A block of a sealed shard, to be written again. Raises LevelFailed."""
        with self._changed:
            shard = self._find(key, row, j)
            shard.users += 1
        try:
            yield shard.view(range(number, number + 1))
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

    def _numbers(self, shard: _Shard, offset: int, nbytes: int) -> range:
        """The row blocks that lie there, of which only the last may be short. Raises LevelFailed for anything else."""
        size = shard.layout.stripe.block_bytes
        first, rest = divmod(offset, size)
        numbers = range(first, first + -(-nbytes // size))
        if rest or first < 0 or not numbers or numbers.stop > len(shard.there):
            raise LevelFailed(f"{_name(shard)} has no blocks of {nbytes} bytes at {offset}")
        widths = [shard.layout.nbytes(shard.id[2], number) for number in numbers]
        if sum(widths) != nbytes or any(width != size for width in widths[:-1]):
            raise LevelFailed(f"{_name(shard)} has no whole blocks of {nbytes} bytes at {offset}")
        return numbers

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


def _counted_bytes(layout: Layout) -> int:
    stripe = layout.stripe
    return max(sum(member.image_bytes) for member in stripe.members) * stripe.m // stripe.k
