"""What the network in memory offers to tests and simulations beyond the contract: cuts and faults."""

import random
from collections.abc import Callable

import pytest

from resilient.checkpoint.peers.memory import MemoryTransport, Network, Passage
from resilient.errors import DamagedImage, LevelFailed
from tests.conformance.transport_contract import Shelf, get, put


def join(network: Network, *names: str) -> tuple[dict[str, MemoryTransport], dict[str, Shelf]]:
    shelves = {name: Shelf() for name in names}
    found = {name: network.join(name, shelf) for name, shelf in shelves.items()}
    for transport in found.values():
        transport.set_peers({name: other.address for name, other in found.items()})
    for shelf in shelves.values():
        shelf.held["image"] = bytearray(b"0123456789")
    return found, shelves


def test_a_cut_between_two_nodes_leaves_the_others_alone_until_it_is_mended() -> None:
    network = Network()
    nodes, _ = join(network, "a", "b", "c")
    network.cut("a", "b")
    for one, other in (("a", "b"), ("b", "a")):
        with pytest.raises(LevelFailed, match=f"node {one} cannot reach node {other}: the network is cut"):
            nodes[one].call(other, {})
    nodes["a"].call("c", {})
    nodes["c"].call("b", {})
    network.mend("a", "b")
    nodes["a"].call("b", {})


def test_a_node_that_is_cut_off_reaches_nobody_and_nobody_reaches_it() -> None:
    network = Network()
    nodes, shelves = join(network, "a", "b", "c")
    network.cut("a")
    for attempt in (
        lambda: nodes["a"].call("b", {}),
        lambda: get(nodes["b"], "a", "image", 0, 1),
        lambda: put(nodes["c"], "a", "image", 0, b"x"),
    ):
        with pytest.raises(LevelFailed, match="the network is cut"):
            attempt()
    nodes["b"].call("c", {})
    network.mend("a")
    nodes["a"].call("b", {})
    assert shelves["a"].most_out == 0


def test_a_fault_sees_all_that_passes_in_both_directions() -> None:
    seen: list[tuple[str, str, str, str, bytes | None]] = []

    def note(passage: Passage) -> None:
        data = None if passage.data is None else bytes(passage.data)
        seen.append((passage.sender, passage.receiver, passage.what, passage.phase, data))

    nodes, _ = join(Network(note), "a", "b")
    nodes["a"].call("b", {})
    get(nodes["a"], "b", "image", 2, 3)
    put(nodes["a"], "b", "image", 0, b"xy")
    assert seen == [
        ("a", "b", "call", "request", None),
        ("b", "a", "call", "reply", None),
        ("a", "b", "read", "request", None),
        ("b", "a", "read", "reply", b"234"),
        ("a", "b", "push", "request", b"xy"),
        ("b", "a", "push", "reply", None),
    ]


@pytest.mark.parametrize(("phase", "done"), [("request", False), ("reply", True)])
def test_what_is_lost_on_the_way_there_was_not_done_and_what_is_lost_on_the_way_back_was(
    phase: str, done: bool
) -> None:
    def lose(passage: Passage) -> None:
        if passage.phase == phase:
            raise LevelFailed("lost")

    nodes, shelves = join(Network(lose), "a", "b")
    with pytest.raises(LevelFailed, match="^lost$"):
        nodes["a"].call("b", {})
    with pytest.raises(LevelFailed, match="^lost$"):
        put(nodes["a"], "b", "image", 0, b"xy")
    assert bool(shelves["b"].asked) == done
    assert shelves["b"].held["image"].startswith(b"xy") == done


def test_bytes_damaged_on_the_way_are_found_by_a_push_and_left_to_the_reader_of_a_read() -> None:
    def damage(passage: Passage) -> None:
        if passage.data is not None:
            passage.data[0] ^= 1

    nodes, shelves = join(Network(damage), "a", "b")
    data = b"xy"
    with pytest.raises(DamagedImage):
        put(nodes["a"], "b", "image", 0, data)
    assert data == b"xy"
    shelves["b"].held["image"][:] = b"0123456789"
    assert get(nodes["a"], "b", "image", 0, 3) == b"112"
    assert shelves["b"].held["image"] == b"0123456789"


def test_the_same_seed_gives_the_same_run() -> None:
    def run(seed: int) -> list[bool]:
        chance = random.Random(seed)

        def lose(_: Passage) -> None:
            if chance.random() < 0.3:
                raise LevelFailed("lost")

        nodes, _ = join(Network(lose), "a", "b")
        return [_works(lambda: nodes["a"].call("b", {})) for _ in range(50)]

    assert run(1) == run(1)
    assert run(1) != run(2)


def _works(attempt: Callable[[], object]) -> bool:
    try:
        attempt()
    except LevelFailed:
        return False
    return True


def test_a_node_that_was_replaced_takes_nothing_from_its_successor_when_it_leaves() -> None:
    network = Network()
    nodes, _ = join(network, "a", "b")
    network.join("b", later := Shelf())
    nodes["b"].close()
    nodes["a"].call("b", {"n": 1})
    assert later.asked == [("a", {"n": 1})]
