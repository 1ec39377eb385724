"""The service of several nodes: parity becomes whole, nodes are lost, and what they held comes back bit for bit."""

import ctypes
import threading
from collections.abc import Callable, Iterator
from functools import partial
from itertools import combinations

import numpy as np
import pytest

from resilient.checkpoint.digest import BLOCK_BYTES, digest
from resilient.checkpoint.peers.transport import Message, Wanted
from resilient.errors import LevelFailed
from tests.checkpoint.parity.cluster import Cluster, record_for

Eventually = Callable[..., None]
MIB = 1 << 20


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    made = Cluster()
    yield made
    made.stop()


def fetch(cluster: Cluster, name: str, rank: int, step: int) -> bytearray:
    rooms: list[bytearray] = []

    def room(nbytes: int) -> memoryview:
        rooms.append(bytearray(nbytes))
        return memoryview(rooms[-1])

    record = cluster.nodes[name].service.recover(rank, step, room)
    assert (record.rank, record.step) == (rank, step)
    assert record.pieces_text == f'[{{"rank":{rank}}}]'
    return rooms[-1]


@pytest.mark.parametrize(
    ("m", "sizes"),
    [
        (1, {"a": {0: 9 * MIB + 5}, "b": {1: 9 * MIB + 5}}),
        (1, {"a": {0: 5 * MIB, 1: 13}, "b": {2: 17 * MIB}, "c": {3: 1}}),
        (2, {"a": {0: 6 * MIB}, "b": {1: 11 * MIB}, "c": {2: 6 * MIB + 1}, "d": {3: BLOCK_BYTES}}),
        (2, {"a": {0: 6 * MIB}, "b": {1: 6 * MIB}, "c": {}, "d": {2: 2 * MIB}, "e": {3: 9 * MIB, 4: 3 * MIB}}),
    ],
)
def test_any_m_nodes_are_lost_and_their_images_come_back(
    cluster: Cluster, eventually: Eventually, m: int, sizes: dict[str, dict[int, int]]
) -> None:
    for lost in combinations(sizes, m):
        life = "life" + "".join(lost)
        for name in sizes.keys() - cluster.nodes.keys():
            cluster.start(name)
        cluster.configure(m)
        images = cluster.seal(life, 7, sizes)
        eventually(partial(cluster.all_whole, (life, 7)), "whole")
        for name in lost:
            cluster.kill(name)
        survivor = min(cluster.nodes)
        for name in lost:
            for rank in sizes[name]:
                assert (7, life) in cluster.nodes[survivor].service.recoverable([rank])[rank]
                assert fetch(cluster, survivor, rank, 7) == images[rank]


def test_an_image_that_a_node_holds_is_read_from_it(cluster: Cluster, eventually: Eventually) -> None:
    for name in ("a", "b", "spare"):
        cluster.start(name)
    for name in cluster.nodes:
        cluster.configure_one(cluster.nodes[name], ["a", "b", "spare"], 1)
    images = cluster.seal("x", 3, {"a": {0: 5 * MIB}, "b": {1: 1}})
    assert fetch(cluster, "spare", 0, 3) == images[0]
    assert cluster.nodes["spare"].service.recoverable([0, 1, 2]) == {0: [(3, "x")], 1: [(3, "x")], 2: []}


def test_a_snapshot_that_is_not_whole_fails_everywhere_when_an_agent_starts_again(
    cluster: Cluster, eventually: Eventually
) -> None:
    for name in ("a", "b", "c"):
        cluster.start(name)
    cluster.configure(1)
    cluster.nodes["a"].seal("x", 3, 3, {0: bytearray(100)})
    cluster.nodes["b"].seal("x", 3, 3, {1: bytearray(100)})
    opened = [{"life": "x", "step": 3, "waiting_for": ["c"]}]
    for status in (cluster.nodes[name].service.status for name in ("a", "c")):
        eventually(lambda status=status: status()["open"] == opened, "b's image is known")
    cluster.kill("b")
    node = cluster.start("b")
    cluster.configure_one(node, ["a", "b", "c"], 1)
    cluster.nodes["c"].seal("x", 3, 3, {2: bytearray(100)})
    eventually(lambda: len([one for one in cluster.heard(("x", 3)) if one]) >= 2, "it has failed on a and c")
    images = cluster.seal("x", 4, {"a": {0: 100}, "b": {1: 200}, "c": {2: 300}})
    eventually(lambda: cluster.all_whole(("x", 4)), "the next is whole")
    cluster.kill("b")
    assert fetch(cluster, "c", 1, 4) == images[1]


def test_a_peer_that_is_out_of_reach_holds_parity_up_and_no_more(cluster: Cluster, eventually: Eventually) -> None:
    for name in ("a", "b", "c"):
        cluster.start(name)
    cluster.configure(1)
    cluster.network.cut("b")
    images = cluster.seal("x", 3, {"a": {0: 5 * MIB}, "b": {1: 5 * MIB}, "c": {2: 5 * MIB}})
    assert cluster.heard(("x", 3)) == []
    cluster.network.mend("b")
    eventually(lambda: cluster.all_whole(("x", 3)), "whole")
    cluster.kill("c")
    assert fetch(cluster, "b", 2, 3) == images[2]


def test_a_snapshot_whose_parity_is_beyond_the_budget_has_none_until_older_parity_is_let_go(
    cluster: Cluster, eventually: Eventually
) -> None:
    sizes = {"a": {0: 6 * MIB}, "b": {1: 6 * MIB}, "c": {2: 6 * MIB}}
    for name in sizes:
        cluster.start(name)
    cluster.configure(1, budget_bytes=2 * 3 * MIB)  # of two snapshots
    for step in (1, 2):
        cluster.seal("x", step, sizes)
        eventually(partial(cluster.all_whole, ("x", step)), "whole")
    cluster.seal("x", 3, sizes)
    eventually(lambda: all(("x", 3) in node.heard for node in cluster.nodes.values()), "all have heard")
    assert all("raise memory_budget" in str(node.heard["x", 3]) for node in cluster.nodes.values())
    for node in cluster.nodes.values():
        node.call(partial(node.service.keep, {("x", 2)}))
    cluster.seal("x", 4, sizes)
    eventually(partial(cluster.all_whole, ("x", 4)), "whole")


def test_what_one_node_drops_fails_on_the_others(cluster: Cluster, eventually: Eventually) -> None:
    for name in ("a", "b"):
        cluster.start(name)
    cluster.configure(1)
    cluster.nodes["a"].seal("x", 3, 2, {0: bytearray(100)})
    cluster.nodes["b"].drop("x", 3)
    eventually(lambda: ("x", 3) in cluster.nodes["a"].heard, "a has heard")
    assert "node b does not have step 3" in str(cluster.nodes["a"].heard["x", 3])


def test_parity_that_is_not_needed_gives_its_memory_to_the_next(cluster: Cluster, eventually: Eventually) -> None:
    sizes = {"a": {0: 6 * MIB}, "b": {1: 6 * MIB}, "c": {2: 6 * MIB}}
    for name in sizes:
        cluster.start(name)
    cluster.configure(1)
    most = 0
    for step in range(1, 9):
        cluster.seal("x", step, sizes)
        eventually(partial(cluster.all_whole, ("x", step)), "whole")
        for node in cluster.nodes.values():
            node.call(partial(node.service.keep, {("x", step)}))
            node.drop("x", step - 1)
        if step == 3:
            most = max(node.service.status()["bytes"] for node in cluster.nodes.values())
    assert all(node.service.status()["bytes"] <= most for node in cluster.nodes.values())
    assert all(node.service.status()["whole"] == [["x", 8]] for node in cluster.nodes.values())


def test_damage_in_memory_is_never_encoded(cluster: Cluster, eventually: Eventually) -> None:
    for name in ("a", "b"):
        cluster.start(name)
    cluster.configure(1)
    cluster.network.cut("a")
    cluster.seal("x", 3, {"a": {0: 5 * MIB}, "b": {1: 5 * MIB}})
    cluster.nodes["a"].images["x", 3, 0][0][17] ^= 1
    cluster.network.mend("a")
    eventually(lambda: len(cluster.heard(("x", 3))) == 2, "both have heard")
    assert any("image/x/3/0 at offset 0 on node a is damaged" in str(error) for error in cluster.heard(("x", 3)))


def test_a_damaged_source_is_replaced_during_recovery(cluster: Cluster, eventually: Eventually) -> None:
    sizes = {"a": {0: 9 * MIB}, "b": {1: 9 * MIB}, "c": {2: 9 * MIB}, "d": {3: 9 * MIB}}
    for name in sizes:
        cluster.start(name)
    cluster.configure(2)
    images = cluster.seal("x", 3, sizes)
    eventually(lambda: cluster.all_whole(("x", 3)), "whole")
    cluster.kill("a")
    for offset in range(100, 9 * MIB, BLOCK_BYTES):
        cluster.nodes["b"].images["x", 3, 1][0][offset] ^= 64
    assert fetch(cluster, "c", 0, 3) == images[0]
    assert fetch(cluster, "c", 1, 3) == images[1]
    cluster.kill("d")
    with pytest.raises(LevelFailed, match="use another step or level"):
        fetch(cluster, "c", 0, 4)


def test_a_node_lost_in_the_middle_of_a_recovery_is_replaced(cluster: Cluster, eventually: Eventually) -> None:
    sizes = {"a": {0: 25 * MIB}, "b": {1: 25 * MIB}, "c": {2: 25 * MIB}, "d": {3: 25 * MIB}}
    for name in sizes:
        cluster.start(name)
    cluster.configure(2)
    images = cluster.seal("x", 3, sizes)
    eventually(lambda: cluster.all_whole(("x", 3)), "whole")
    cluster.kill("a")
    reads = []

    def fault(passage: object) -> None:
        if getattr(passage, "what", "") == "read":
            reads.append(passage)
            if len(reads) == 5:
                cluster.network.cut("b")

    cluster.network.fault = fault
    assert fetch(cluster, "c", 0, 3) == images[0]
    assert len(reads) > 5


def test_the_scrub_puts_damage_right_from_the_group(cluster: Cluster, eventually: Eventually) -> None:
    sizes = {"a": {0: 9 * MIB + 3}, "b": {1: 5 * MIB}, "c": {2: 6 * MIB}}
    for name in sizes:
        cluster.start(name, scrub_bytes_per_s=1e12)
    cluster.configure(1)
    images = cluster.seal("x", 3, sizes)
    eventually(lambda: cluster.all_whole(("x", 3)), "whole")
    node = cluster.nodes["a"]
    node.images["x", 3, 0][0][9 * MIB] ^= 1
    eventually(lambda: node.images["x", 3, 0][0] == images[0], "the image is as it was")
    row, j = 0, 0
    with node.service.lend("", f"parity/x/3/{row}/{j}", 0, BLOCK_BYTES) as lent:
        before = bytes(lent)
        ctypes.memset(int(np.frombuffer(lent, dtype=np.uint8).ctypes.data), before[0] ^ 255, 1)
        eventually(lambda: bytes(lent) == before, "the parity is as it was")
    eventually(lambda: node.service.status()["mended"] == 2, "both were reported")
    assert [finding.error for finding in node.findings] == [None, None]


def test_damage_that_nobody_can_put_right_is_reported_once(cluster: Cluster, eventually: Eventually) -> None:
    cluster.start("a", scrub_bytes_per_s=1e12)
    cluster.start("b")
    cluster.configure(1)
    node = cluster.nodes["a"]
    node.images["x", 3, 0] = bytearray(100), record_for("x", 3, 0, 2, bytearray(b"?" * 100))
    eventually(lambda: node.findings, "it was found")
    seen = node.service.status()["scrubbed_bytes"]
    eventually(lambda: node.service.status()["scrubbed_bytes"] > seen + 300, "it was looked at again")
    assert len(node.findings) == 1
    assert "image/x/3/0 at offset 0 was damaged" in str(node.findings[0])


def test_nothing_is_left_of_a_service_that_was_closed(cluster: Cluster, eventually: Eventually) -> None:
    before = set(threading.enumerate())
    sizes = {"a": {0: 9 * MIB}, "b": {1: 9 * MIB}, "c": {2: 9 * MIB}}
    for name in sizes:
        cluster.start(name, scrub_bytes_per_s=1e6)
    cluster.configure(2)
    cluster.seal("x", 3, sizes)
    eventually(lambda: cluster.all_whole(("x", 3)), "whole")
    for name in sizes:
        cluster.kill(name)
    eventually(lambda: set(threading.enumerate()) <= before, "all threads have ended")


def test_foreign_questions_and_names_are_refused(cluster: Cluster) -> None:
    cluster.start("a")
    cluster.start("b")
    cluster.configure(1)
    transport = cluster.nodes["a"].transport
    group = {"op": "parity", "agent": "agent1", "group": ["a", "b"], "m": 1}
    messages: tuple[Message, ...] = (
        {"op": "?"},
        {"op": "record", "life": "x", "step": 1, "rank": "y"},
        {"op": "record", "life": "x", "step": 1, "rank": 0},
        {"op": "snapshot", "life": "x", "step": 1},
        {"op": "parity"},
        {**group, "facts": [{"kind": "images"}]},
        {**group, "facts": [{"kind": "?", "life": "", "step": 1}]},
    )
    for message in messages:
        with pytest.raises(LevelFailed):
            transport.call("b", message)
    for name in ("?", "image/x/1/0", "parity/x/1/0/0"):
        with pytest.raises(LevelFailed):
            list(transport.read("b", [Wanted(name=name, offset=0, into=memoryview(bytearray(8)))]))
    for name in ("?", "image/x/1/0"):
        with pytest.raises(LevelFailed):
            transport.push("b", name, 0, memoryview(b"8 bytes!"), digest(b"8 bytes!"))


def test_a_range_beyond_an_image_is_refused(cluster: Cluster) -> None:
    cluster.start("a")
    cluster.start("b")
    cluster.configure(1)
    cluster.seal("x", 3, {"a": {0: 10}, "b": {1: 10}})
    wanted = Wanted(name="image/x/3/1", offset=8, into=memoryview(bytearray(4)))
    with pytest.raises(LevelFailed, match="has no 4 bytes at 8"):
        list(cluster.nodes["a"].transport.read("b", [wanted]))
