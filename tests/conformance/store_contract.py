"""What every store promises, as tests that each kind of store inherits.

A test module makes a subclass of `StoreContract` whose fixture `store` gives an empty store. `StoreMachine` compares
a store with MemoryStore, the model, over random sequences of operations; `machine_for` makes a test of it.
"""

import secrets
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from threading import Barrier
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from resilient.checkpoint.levels.store import MemoryStore, Store
from resilient.errors import DamagedImage

NAMES = ("claim.json", "step_00000001/a", "step_00000001/b", "step_00000002/a", "step_00000002/deep/er/c", "other/x")


class Interrupted(Exception):
    """What a caller's iterator may raise."""


def put(store: Store, name: str, data: bytes, *, exclusive: bool = False) -> None:
    store.write(name, [memoryview(data)], exclusive=exclusive)


def get(store: Store, name: str) -> bytes:
    into = bytearray(store.size(name))
    store.read(name, 0, memoryview(into))
    return bytes(into)


def broken_after(data: bytes) -> Iterator[memoryview]:
    yield memoryview(data)
    raise Interrupted


class StoreContract:
    """Inherit, and give a fixture `store`."""

    big = 6 << 20  # more than one piece, part or buffer of every store under test

    def test_what_is_written_is_read_back_byte_for_byte(self, store: Store) -> None:
        put(store, "step_00000001/a", b"some bytes")
        assert get(store, "step_00000001/a") == b"some bytes"
        assert store.size("step_00000001/a") == 10

    def test_nothing_at_all_can_be_written(self, store: Store) -> None:
        store.write("step_00000001/a", [])
        assert store.size("step_00000001/a") == 0
        assert store.list() == ["step_00000001/a"]

    def test_chunks_of_odd_sizes_are_joined_in_order(self, store: Store) -> None:
        data = secrets.token_bytes(self.big + 12345)
        bounds = [0, 1, 4096, 4097, 70_000, 3 << 20, (3 << 20) + 8192, len(data)]
        store.write("step_00000001/a", (memoryview(data)[a:b] for a, b in pairwise(bounds)))
        assert get(store, "step_00000001/a") == data

    def test_a_write_replaces_what_was_there_whether_longer_or_shorter(self, store: Store) -> None:
        put(store, "x", b"long and old")
        put(store, "x", b"new")
        assert get(store, "x") == b"new"
        data = secrets.token_bytes(self.big)
        put(store, "x", data)
        assert get(store, "x") == data

    def test_any_range_can_be_read(self, store: Store) -> None:
        data = secrets.token_bytes(self.big + 77)
        put(store, "x", data)
        for offset, length in [(0, 1), (4095, 2), (4096, 1 << 20), (1, 3 << 20), (self.big, 77), (self.big + 76, 1)]:
            into = bytearray(length)
            store.read("x", offset, memoryview(into))
            assert into == data[offset : offset + length], (offset, length)

    def test_a_read_of_nothing_reads_nothing(self, store: Store) -> None:
        put(store, "x", b"abc")
        store.read("x", 1, memoryview(bytearray()))

    @pytest.mark.parametrize(("offset", "length"), [(0, 4), (3, 1), (2, 2), (100, 5), (0, 1 << 20)])
    def test_a_read_beyond_the_end_is_damage(self, store: Store, offset: int, length: int) -> None:
        put(store, "x", b"abc")
        with pytest.raises(DamagedImage, match="x"):
            store.read("x", offset, memoryview(bytearray(length)))

    def test_a_big_read_that_runs_over_the_end_is_damage(self, store: Store) -> None:
        put(store, "x", bytes(self.big))
        for length in (self.big + 1, self.big + 4096):
            with pytest.raises(DamagedImage):
                store.read("x", 0, memoryview(bytearray(length)))

    def test_an_absent_name_is_reported_as_absent(self, store: Store) -> None:
        put(store, "step_00000001/a", b"1")
        for name in ("b", "step_00000001", "step_00000001/b", "step_00000002/a"):
            with pytest.raises(FileNotFoundError):
                store.read(name, 0, memoryview(bytearray(1)))
            with pytest.raises(FileNotFoundError):
                store.size(name)

    def test_names_are_listed_recursively_sorted_and_by_whole_folders(self, store: Store) -> None:
        assert store.list() == []
        for name in reversed(NAMES):
            put(store, name, b"1")
        put(store, "step_000000010/not-in-step-1", b"1")
        assert store.list() == sorted([*NAMES, "step_000000010/not-in-step-1"])
        assert store.list("step_00000001") == ["step_00000001/a", "step_00000001/b"]
        assert store.list("step_00000002") == ["step_00000002/a", "step_00000002/deep/er/c"]
        assert store.list("step_00000002/deep") == ["step_00000002/deep/er/c"]
        assert store.list("step_00000003") == []
        assert store.list("claim.json") == []

    def test_deleted_names_are_gone_and_deleting_again_is_fine(self, store: Store) -> None:
        for name in NAMES:
            put(store, name, b"1")
        for _ in range(2):
            store.delete(["step_00000001/a", "step_00000001/b", "never/was"])
        assert store.list() == sorted(set(NAMES) - {"step_00000001/a", "step_00000001/b"})
        put(store, "step_00000001/a", b"2")
        assert get(store, "step_00000001/a") == b"2"

    def test_an_error_of_the_iterator_passes_through_and_leaves_the_old_bytes(self, store: Store) -> None:
        for size in (3, self.big):
            with pytest.raises(Interrupted):
                store.write("step_00000001/a", broken_after(bytes(size)))
            assert store.list() == []
        put(store, "step_00000001/a", b"old")
        for size in (3, self.big):
            with pytest.raises(Interrupted):
                store.write("step_00000001/a", broken_after(bytes(size)))
            assert get(store, "step_00000001/a") == b"old"
        assert store.list() == ["step_00000001/a"]

    def test_an_unfinished_write_does_not_show(self, store: Store) -> None:
        put(store, "x", b"old")
        seen: list[tuple[list[str], bytes]] = []

        def chunks() -> Iterator[memoryview]:
            yield memoryview(bytes(self.big))
            seen.append((store.list(), get(store, "x")))
            yield memoryview(bytes(self.big))
            seen.append((store.list(), get(store, "x")))

        store.write("x", chunks())
        assert seen == [(["x"], b"old")] * 2
        assert store.size("x") == 2 * self.big

    def test_an_exclusive_write_refuses_a_name_that_is_taken(self, store: Store) -> None:
        put(store, "claim.json", b"first", exclusive=True)
        for data in (b"second", bytes(self.big)):
            with pytest.raises(FileExistsError):
                put(store, "claim.json", data, exclusive=True)
            assert get(store, "claim.json") == b"first"
        store.delete(["claim.json"])
        put(store, "claim.json", b"third", exclusive=True)
        assert get(store, "claim.json") == b"third"

    def test_of_several_exclusive_writers_one_wins(self, store: Store) -> None:
        ready = Barrier(4)

        def take(number: int) -> int | None:
            ready.wait()
            try:
                put(store, "claim.json", bytes([number]), exclusive=True)
            except FileExistsError:
                return None
            return number

        with ThreadPoolExecutor(4) as pool:
            winners = [number for number in pool.map(take, range(4)) if number is not None]
        assert len(winners) == 1
        assert get(store, "claim.json") == bytes(winners)

    def test_many_threads_write_and_read_at_once(self, store: Store) -> None:
        def work(number: int) -> bytes:
            data = bytes([number]) * (self.big + number)
            put(store, f"step_{number % 3:08d}/{number}", data)
            return get(store, f"step_{number % 3:08d}/{number}")

        with ThreadPoolExecutor(4) as pool:
            for number, data in enumerate(pool.map(work, range(6))):
                assert data == bytes([number]) * (self.big + number)
        assert len(store.list()) == 6


class StoreMachine(RuleBasedStateMachine):
    """Random operations on a store and on the model; both must give the same answers."""

    make: Callable[[], Store]

    @initialize()
    def begin(self) -> None:
        machine: Any = type(self)
        self.store = machine.make()
        self.model = MemoryStore()

    @rule(name=st.sampled_from(NAMES), chunks=st.lists(st.binary(max_size=9000), max_size=3), exclusive=st.booleans())
    def write(self, name: str, chunks: list[bytes], exclusive: bool) -> None:
        def attempt(store: Store) -> Any:
            return store.write(name, map(memoryview, chunks), exclusive=exclusive)

        self._same(attempt)

    @rule(name=st.sampled_from(NAMES), data=st.binary(max_size=5000))
    def write_and_break_off(self, name: str, data: bytes) -> None:
        self._same(lambda store: store.write(name, broken_after(data)))

    @rule(name=st.sampled_from(NAMES), offset=st.integers(0, 12000), length=st.integers(1, 12000))
    def read(self, name: str, offset: int, length: int) -> None:
        def attempt(store: Store) -> bytes:
            into = bytearray(length)
            store.read(name, offset, memoryview(into))
            return bytes(into)

        self._same(attempt)

    @rule(name=st.sampled_from(NAMES))
    def size(self, name: str) -> None:
        self._same(lambda store: store.size(name))

    @rule(folder=st.sampled_from(["", "step_00000001", "step_00000002", "step_00000002/deep", "absent"]))
    def list(self, folder: str) -> None:
        self._same(lambda store: store.list(folder))

    @rule(names=st.lists(st.sampled_from(NAMES), max_size=3))
    def delete(self, names: Iterable[str]) -> None:
        self._same(lambda store: store.delete(names))

    @invariant()
    def same_names(self) -> None:
        if hasattr(self, "store"):
            assert self.store.list() == self.model.list()

    def _same(self, attempt: Callable[[Store], Any]) -> None:
        assert _outcome(attempt, self.store) == _outcome(attempt, self.model)


def _outcome(attempt: Callable[[Store], Any], store: Store) -> Any:
    try:
        return attempt(store)
    except (FileNotFoundError, FileExistsError, DamagedImage, Interrupted) as error:
        return type(error)


def machine_for(make: Callable[[], Store], *, examples: int, steps: int) -> None:
    """Run the machine on stores that `make` makes, each empty."""
    machine = type("Machine", (StoreMachine,), {"make": staticmethod(make)})
    limits = settings(
        max_examples=examples,
        stateful_step_count=steps,
        deadline=None,
        suppress_health_check=list(HealthCheck),  # pyright: ignore[reportArgumentType],
    )
    run_state_machine_as_test(machine, settings=limits)
