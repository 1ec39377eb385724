"""Bytes from rank to rank over several lanes, on loopback: all there, once, in whatever order things happen."""

import os
import random
import socket
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch.distributed as dist

from resilient.comms.fabric import multi_plane
from resilient.comms.lanes.engine import Lanes
from resilient.comms.lanes.messages import Operation, Receive, Send, Transfer
from resilient.comms.lanes.opening import open_lanes
from resilient.comms.lanes.spans import Spans
from resilient.comms.lanes.wiring import Planes, Spines
from resilient.errors import CollectiveFailed, CollectiveMismatch, UsageError
from tests.comms.lanes.loopback import Relayed, address, even, group, on_all, planes, receive, send

SIZES = [0, 1, 17, 1 << 18, (1 << 20) + 3, 5 << 20]


@pytest.mark.parametrize("nbytes", SIZES)
@pytest.mark.parametrize("paths", [1, 3])
def test_what_is_sent_arrives(nbytes: int, paths: int) -> None:
    content, into = random.Random(nbytes).randbytes(nbytes), bytearray(nbytes)
    with group(2, paths) as (one, other):
        transfers = [send(one, 1, 1, content, paths=paths), receive(other, 1, 0, into)]
        for transfer in transfers:
            transfer.wait(20)
    assert into == content


def test_all_send_to_all_at_once_again_and_again() -> None:
    size, paths, nbytes = 4, 2, 300_001
    whole = {(i, j): random.Random(10 * i + j).randbytes(nbytes) for i in range(size) for j in range(size)}

    def rank(lanes: Lanes) -> None:
        others = [other for other in range(size) if other != lanes.rank]
        for number in range(1, 6):
            into = {other: bytearray(nbytes) for other in others}
            sends = [Send(o, 0, Spans(memoryview(whole[lanes.rank, o])), even(nbytes, paths)) for o in others]
            receives = [Receive(o, 0, Spans(memoryview(into[o]))) for o in others]
            lanes.post(Operation(number, "all"), sends, receives).wait(20)
            assert all(into[other] == whole[other, lanes.rank] for other in others)

    with group(size, paths) as lanes:
        on_all([partial(rank, one) for one in lanes])


def test_who_is_ahead_waits_and_what_comes_early_is_kept() -> None:
    parts = [random.Random(number).randbytes(400_000) for number in range(6)]
    with group(2) as (one, other):
        sent = [send(one, number + 1, 1, part, paths=2, what=f"part {number}") for number, part in enumerate(parts)]
        sent[0].add_done_callback(lambda: None)
        for number in reversed(range(6)):  # the receiver asks for the last one first
            into = bytearray(400_000)
            receive(other, number + 1, 0, into, what=f"part {number}").wait(20)
            assert into == parts[number]
        for transfer in sent:
            transfer.wait(20)


def test_a_sender_that_is_far_ahead_is_stopped_until_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resilient.comms.lanes.receiving.MOST_EARLY", 1 << 20)
    content = random.Random(5).randbytes(8 << 20)
    with group(2) as (one, other):
        sent = send(one, 1, 1, content, paths=2)
        with pytest.raises(TimeoutError):
            sent.wait(0.5)
        into = bytearray(len(content))
        receive(other, 1, 0, into).wait(20)
        sent.wait(20)
    assert into == content


def test_many_threads_may_post() -> None:
    def both(one: Lanes, other: Lanes, tag: int) -> None:
        content, into = random.Random(tag).randbytes(70_000), bytearray(70_000)
        pair = [send(one, 1, 1, content, paths=2, tag=tag), receive(other, 1, 0, into, tag=tag)]
        for transfer in pair:
            transfer.wait(20)
        assert into == content

    with group(2) as (one, other):
        on_all([partial(both, one, other, tag) for tag in range(8)])


def test_the_sender_decides_which_path_each_byte_takes() -> None:
    content, into = bytes(4 << 20), bytearray(4 << 20)
    with group(2, 4) as (one, other):
        pieces = [(3, 0, 3 << 20), (1, 3 << 20, 4 << 20)]
        sent = one.post(Operation(1, "x", {3: 3.0, 1: 1.0}), [Send(1, 0, Spans(memoryview(content)), pieces)], [])
        receive(other, 1, 0, into, what="x").wait(20)
        sent.wait(20)
        carried = {lane["path"]: lane["bytes"] for lane in one.report()["lanes"]}
    assert carried[0] == carried[2] == 0
    assert carried[3] + carried[1] == 4 << 20
    assert carried[3] >= 2 << 20  # on a busy machine a lane may seem late, and be helped


@pytest.mark.parametrize("early", [True, False])
def test_messages_need_not_lie_together_nor_be_cut_alike_at_both_ends(early: bool) -> None:
    content = random.Random(3).randbytes(3_000_000)
    out = [memoryview(content[begin:end]) for begin, end in pairwise([0, 1_000_001, 1_000_002, 2_400_000, 3_000_000])]
    into = [bytearray(size) for size in (700_003, 1_300_000, 999_997)]
    pieces = [(0, 0, 1_234_567), (1, 1_234_567, 3_000_000)]
    with group(2) as (one, other):

        def sent() -> Transfer:
            return one.post(Operation(1, "x"), [Send(1, 0, Spans(*out), pieces)], [])

        def received() -> Transfer:
            return other.post(Operation(1, "x"), [], [Receive(0, 0, Spans(*[memoryview(part) for part in into]))])

        for transfer in [sent(), received()] if early else [received(), sent()]:
            transfer.wait(20)
    assert b"".join(into) == content


def test_lanes_that_serve_several_operations_are_not_taken_for_slow() -> None:
    """Small messages over both lanes stand behind large ones that one of the lanes has."""
    wiring, rate = Relayed(0, 2), 1e7

    def exchanged(one: Lanes, other: Lanes, number: int, pieces: list[tuple[int, int, int]]) -> list[Transfer]:
        content = bytes(pieces[-1][2])
        expected = {path: (end - begin) / rate for path, begin, end in pieces}
        sent = one.post(Operation(number, "x", expected), [Send(1, 0, Spans(memoryview(content)), pieces)], [])
        return [sent, receive(other, number, 0, bytearray(len(content)), what="x")]

    with group(2, 2, wirings=[wiring, planes(1, 2)]) as (one, other):
        for turn in range(6):
            large = exchanged(one, other, 2 * turn + 1, [(0, 0, 1_600_000)])
            small = exchanged(one, other, 2 * turn + 2, even(800_000, 2))
            for transfer in [*large, *small]:
                transfer.wait(30)
            for relay in (*wiring.on(0), *wiring.on(1)):  # now they are there
                relay.rate = rate
        assert [lane["factor"] for lane in one.report()["lanes"]] == [1.0, 1.0]


def failed(transfers: list[Transfer], kind: type[Exception]) -> list[str]:
    """The text of the error that each failed with."""
    texts = []
    for transfer in transfers:
        with pytest.raises(kind) as caught:
            transfer.wait(20)
        texts.append(str(caught.value))
    return texts


def test_ranks_that_call_different_things_all_get_the_same_error() -> None:
    with group(3) as (one, other, third):
        transfers = [
            send(one, 1, 1, bytes(1000), paths=2, what="all_reduce of 250 float32"),
            receive(other, 1, 0, bytearray(1000), what="all_reduce of 500 float16"),
            receive(third, 1, 0, bytearray(1000), what="all_reduce of 250 float32"),
        ]
        texts = failed(transfers, CollectiveMismatch)
        later = failed([send(one, 2, 2, bytes(10), paths=2)], CollectiveMismatch)
    assert len({*texts, *later}) == 1
    assert "250 float32" in texts[0]
    assert "500 float16" in texts[0]


def test_a_message_that_is_longer_than_expected_is_an_error_on_all_ranks() -> None:
    with group(2) as (one, other):
        transfers = [send(one, 1, 1, bytes(2_000_000), paths=2), receive(other, 1, 0, bytearray(1000))]
        assert len(set(failed(transfers, CollectiveMismatch))) == 1


def test_a_rank_that_aborts_takes_all_with_it() -> None:
    with group(4) as lanes:
        pending = [receive(one, 1, (one.rank + 1) % 4, bytearray(10)) for one in lanes]
        lanes[2].abort("the optimizer has failed")
        texts = failed(pending, CollectiveFailed)
    assert set(texts) == {"rank 2 (host2) has aborted: the optimizer has failed"}


def test_what_is_pending_fails_when_a_group_is_closed() -> None:
    with group(2) as (one, _):
        pending = receive(one, 1, 1, bytearray(10))
        one.close()
        one.close()
        assert "closed" in failed([pending], CollectiveFailed)[0]
        assert "closed" in failed([receive(one, 2, 1, bytearray(10))], CollectiveFailed)[0]


@pytest.mark.parametrize("everywhere", ["", "0.0.0.0", "::"])
def test_nothing_listens_everywhere(everywhere: str) -> None:
    with pytest.raises(UsageError, match="everywhere"):
        Planes((address(0, 0), everywhere))
    with pytest.raises(UsageError, match="everywhere"):
        Spines(everywhere, 2, lambda source, target, path: 0)


def listening() -> set[tuple[str, int]]:
    """Where this process listens on TCP over IPv4."""
    inodes = {
        os.readlink(f"/proc/self/fd/{name}")
        for name in os.listdir("/proc/self/fd")
        if os.path.exists(f"/proc/self/fd/{name}")
    }
    found = set()
    for line in Path("/proc/self/net/tcp").read_text().splitlines()[1:]:
        words = line.split()
        if words[3] == "0A" and f"socket:[{words[9]}]" in inodes:
            host, port = words[1].split(":")
            found.add((socket.inet_ntoa(bytes.fromhex(host)[::-1]), int(port, 16)))
    return found


def test_only_the_addresses_that_are_named_are_listened_at_and_no_longer_than_needed() -> None:
    before = listening()
    with group(2, 2):
        hosts = sorted(host for host, _ in listening() - before)
        assert hosts == sorted(address(rank, path) for rank in range(2) for path in range(2))
    assert listening() <= before


def test_a_stranger_gets_nothing_and_disturbs_nobody(eventually: Callable[..., None]) -> None:
    before = listening()
    with group(2, 1) as (one, other):
        for place in listening() - before:
            with socket.create_connection(place, timeout=5) as stranger:
                stranger.sendall(bytes(4096))
                stranger.settimeout(10)
                got = b""
                try:
                    while part := stranger.recv(4096):
                        got += part
                except ConnectionResetError:
                    pass
                assert len(got) == 32  # a random number
        into = bytearray(1000)
        sent = send(one, 1, 1, b"x" * 1000, paths=1)
        receive(other, 1, 0, into).wait(20)
        sent.wait(20)
        assert into == b"x" * 1000


def test_ranks_with_different_numbers_of_paths_are_told_so_before_anything_is_sent() -> None:
    store = dist.HashStore()

    def opened(rank: int) -> str:
        paths = 1 + rank
        fabric = multi_plane(hosts=2, rates=[1.0] * paths)
        with pytest.raises(UsageError) as caught:
            open_lanes(
                store, rank, 2, name="g", host=f"h{rank}", fabric=fabric, wiring=planes(rank, paths), timeout_s=5
            )
        return str(caught.value)

    one, other = on_all([lambda: opened(0), lambda: opened(1)])
    assert one == other
    assert "rank 0 (h0) has 1" in one
    assert "rank 1 (h1) has 2" in one


def test_a_fabric_that_does_not_fit_the_group_is_refused() -> None:
    with pytest.raises(UsageError, match="3 ranks and 2 paths"):
        open_lanes(
            dist.HashStore(),
            0,
            2,
            name="g",
            host="h",
            fabric=multi_plane(hosts=3, rates=[1.0, 1.0]),
            wiring=planes(0, 2),
            timeout_s=5,
        )


def test_groups_of_one_store_do_not_mix() -> None:
    with group(2, name="a") as (one, other), group(2, name="b") as (third, fourth):
        into, also = bytearray(100), bytearray(100)
        transfers = [send(one, 1, 1, b"a" * 100, paths=2), send(third, 1, 1, b"b" * 100, paths=2)]
        transfers += [receive(other, 1, 0, into), receive(fourth, 1, 0, also)]
        for transfer in transfers:
            transfer.wait(20)
    assert into == b"a" * 100
    assert also == b"b" * 100
