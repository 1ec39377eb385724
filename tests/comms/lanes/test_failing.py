"""What lanes do when something breaks: a path is worked around, a peer is an error on every rank, and nothing hangs."""

import multiprocessing
import os
import random
import signal
import time
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch.distributed as dist

from resilient.comms.fabric import multi_plane
from resilient.comms.lanes.engine import Lanes
from resilient.comms.lanes.messages import POINT_TO_POINT
from resilient.comms.lanes.opening import open_lanes
from resilient.comms.lanes.wiring import Planes
from resilient.errors import CollectiveFailed, CollectiveTimeout, PeerGone, UsageError
from tests.comms.lanes.loopback import RATE, Relayed, address, group, on_all, planes, receive, send

MIB = 1 << 20


def exchanged(one: Lanes, other: Lanes, number: int, nbytes: int, *, paths: int) -> None:
    """Send from one to the other; what arrives must be what was sent."""
    content, into = random.Random(number).randbytes(nbytes), bytearray(nbytes)
    transfers = [send(one, number, 1, content, paths=paths), receive(other, number, 0, into)]
    for transfer in transfers:
        transfer.wait(20)
    assert into == content


def test_what_a_lane_had_arrives_over_the_others_when_it_is_cut() -> None:
    wiring = Relayed(0, 3)
    with group(2, 3, wirings=[wiring, planes(1, 3)]) as (one, other):
        exchanged(one, other, 1, 3 * MIB, paths=3)
        content, into = random.Random(7).randbytes(24 * MIB), bytearray(24 * MIB)
        for relay in wiring.on(1):
            relay.rate = 4e6
        transfers = [send(one, 2, 1, content, paths=3), receive(other, 2, 0, into)]
        time.sleep(0.1)  # in the middle
        for relay in wiring.on(1):
            relay.cut()
        for transfer in transfers:
            transfer.wait(20)
        assert into == content
        for number in range(3, 6):
            exchanged(one, other, number, 3 * MIB, paths=3)
        assert one.fabric.up[0][1] == 0
        assert {lane["path"]: lane["state"] for lane in one.report()["lanes"]}[1] != "open"


def test_a_lane_that_falls_silent_is_worked_around_within_seconds() -> None:
    wiring = Relayed(0, 3)
    with group(2, 3, wirings=[wiring, planes(1, 3)]) as (one, other):
        exchanged(one, other, 1, 3 * MIB, paths=3)
        for relay in wiring.on(2):
            relay.silent = True
        began = time.monotonic()
        exchanged(one, other, 2, 12 * MIB, paths=3)
        assert time.monotonic() - began < 10
        assert one.fabric.up[0][2] == 0


def test_a_lane_that_comes_back_is_used_again(eventually: Any) -> None:
    wiring = Relayed(0, 2)
    with group(2, 2, wirings=[wiring, planes(1, 2)]) as (one, other):
        exchanged(one, other, 1, 2 * MIB, paths=2)
        for relay in wiring.on(1):
            relay.silent = True
        exchanged(one, other, 2, 6 * MIB, paths=2)
        assert one.fabric.up[0][1] == 0
        for relay in wiring.on(1):
            relay.silent = False
        eventually(lambda: one.fabric.up[0][1] > 0, "the lane is opened again")


def test_a_slow_lane_is_helped_and_then_planned_for(eventually: Any) -> None:
    wiring = Relayed(0, 2)
    with group(2, 2, wirings=[wiring, planes(1, 2)]) as (one, other):
        exchanged(one, other, 1, 2 * MIB, paths=2)
        fast, slow = wiring.on(0), wiring.on(1)
        for relay in fast:
            relay.rate = 4e7
        for relay in slow:
            relay.rate = 4e6
        before = sum(relay.carried for relay in slow)
        for number in range(2, 6):
            exchanged(one, other, number, 8 * MIB, paths=2)
        assert sum(relay.carried for relay in slow) - before < 10 * MIB  # of 16 that were sent that way
        assert one.fabric.up[0][1] < 0.5 * RATE
        eventually(lambda: other.fabric == one.fabric, "everybody plans with it")


def test_a_rank_that_does_not_come_is_named_on_all_ranks() -> None:
    with group(3, timeout_s=1.5) as (one, other, third):
        into = bytearray(10)
        exchanged(one, other, 1, 100_000, paths=2)
        waiting = [receive(one, 2, 2, into), receive(other, 2, 0, bytearray(10))]
        errors = []
        for transfer in waiting:
            with pytest.raises(CollectiveTimeout) as caught:
                transfer.wait(15)
            errors.append(caught.value)
        with pytest.raises(CollectiveTimeout):
            send(third, 2, 0, bytes(10), paths=2).wait(15)
    assert {error.rank for error in errors} == {2}
    assert len({str(error) for error in errors}) == 1
    assert "rank 2 (host2) has not come" in str(errors[0])


# -- real processes ----------------------------------------------------------------------

_context = multiprocessing.get_context("forkserver")


def member(pipe: Connection, rank: int, size: int, port: int, timeout_s: float) -> None:
    """Exchange with all others for ever; tell how it ended."""
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    lanes = open_lanes(
        store,
        rank,
        size,
        name="g",
        host=f"host{rank}",
        fabric=multi_plane(hosts=size, rates=[RATE] * 2),
        wiring=planes(rank, 2),
        timeout_s=timeout_s,
    )
    number = 0
    try:
        while True:
            number += 1
            to, source = (rank + 1) % size, (rank - 1) % size
            transfers = [
                send(lanes, number, to, bytes(200_000), paths=2),
                receive(lanes, number, source, bytearray(200_000)),
            ]
            for transfer in transfers:
                transfer.wait(60)
            if number == 3:
                pipe.send("under way")
    except CollectiveFailed as error:
        pipe.send((type(error).__name__, error.rank, str(error)))
    finally:
        lanes.close()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_a_dead_rank_is_an_error_on_every_rank_within_the_timeout(number: signal.Signals) -> None:
    size, victim, timeout_s = 4, 2, 4.0
    store = dist.TCPStore("127.0.0.1", 0, is_master=True)
    rows = []
    for rank in range(size):
        ours, theirs = _context.Pipe()
        process = _context.Process(target=member, args=(theirs, rank, size, store.port, timeout_s))
        process.start()
        rows.append((process, ours))
    try:
        assert all(pipe.poll(60) and pipe.recv() == "under way" for _, pipe in rows)
        pid = rows[victim][0].pid
        assert pid is not None
        began = time.monotonic()
        os.kill(pid, number)
        said = [pipe.recv() for rank, (_, pipe) in enumerate(rows) if rank != victim and pipe.poll(30)]
        took = time.monotonic() - began
    finally:
        for process, _ in rows:
            process.kill()
            process.join()
    assert len(said) == size - 1
    assert len({text for _, _, text in said}) == 1
    assert {(kind, rank) for kind, rank, _ in said} == {(PeerGone.__name__, victim)}
    assert took < (3 if number == signal.SIGKILL else timeout_s + 4)


def test_a_group_can_be_made_again_after_one_has_failed() -> None:
    with group(3, name="first") as lanes:
        lanes[1].abort("try again")
        with pytest.raises(CollectiveFailed):
            receive(lanes[0], 1, 1, bytearray(1)).wait(20)
        on_all([one.close for one in lanes])
    with group(2, name="second") as (one, other):
        exchanged(one, other, 1, MIB, paths=2)


def test_who_has_all_may_leave_though_its_word_for_it_was_lost() -> None:
    """A chunk that was sent once more, for its lane seemed dead, is not waited for when the receiver has left."""
    wiring = Relayed(0, 2)
    with group(2, 2, wirings=[wiring, planes(1, 2)]) as (one, other):
        exchanged(one, other, 1, MIB, paths=2)
        for relay in wiring.on(1):
            relay.deaf = True  # what is sent arrives, and no answer comes back
        content, into = random.Random(3).randbytes(MIB), bytearray(MIB)
        transfers = [send(one, 2, 1, content, paths=2), receive(other, 2, 0, into)]
        transfers[1].wait(20)
        assert not transfers[0].done
        other.close()
        transfers[0].wait(20)
        assert into == content


def test_a_buffer_is_its_owners_again_once_the_transfer_has_failed() -> None:
    """Half of a chunk is on its way when the group fails; the other half must not reach memory that is in use again."""
    wiring = Relayed(0, 1)
    with group(2, 1, wirings=[wiring, planes(1, 1)]) as (one, other):
        exchanged(one, other, 1, 1000, paths=1)
        for relay in wiring.on(0):
            relay.rate = 2e5
        into = bytearray(4 * MIB)
        transfers = [send(one, 2, 1, b"x" * len(into), paths=1), receive(other, 2, 0, into)]
        time.sleep(0.5)  # in the middle
        other.abort("enough")
        for transfer in transfers:
            with pytest.raises(CollectiveFailed):
                transfer.wait(20)
        into[:] = bytes(len(into))
        for relay in wiring.on(0):
            relay.rate = None
        time.sleep(0.5)
        assert not any(into)


def test_who_is_late_is_neither_dead_nor_are_its_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resilient.comms.lanes.receiving.MOST_EARLY", MIB)
    content, into = random.Random(1).randbytes(16 * MIB), bytearray(16 * MIB)
    with group(2, 2) as (one, other):
        exchanged(one, other, 1, MIB, paths=2)
        sent = send(one, 2, 1, content, paths=2)
        time.sleep(4)
        assert [lane["state"] for lane in one.report()["lanes"]] == ["open", "open"]
        assert one.fabric.up[0] == (RATE, RATE)
        receive(other, 2, 0, into).wait(20)
        sent.wait(20)
    assert into == content


def test_a_late_rank_is_told_from_a_dead_one_when_the_time_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resilient.comms.lanes.receiving.MOST_EARLY", MIB)
    said = r"rank 1 \(host1\) has not come to operation 1"
    with group(2, 2, timeout_s=4.0) as (one, _), pytest.raises(CollectiveTimeout, match=said):
        send(one, 1, 1, bytes(16 * MIB), paths=2).wait(20)


def test_a_large_message_that_nobody_asks_for_yet_is_in_nobodys_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resilient.comms.lanes.receiving.MOST_EARLY", MIB)
    content, into = random.Random(2).randbytes(8 * MIB), bytearray(8 * MIB)
    with group(2, 2) as (one, other):
        message = send(one, POINT_TO_POINT + 1, 1, content, paths=2)
        exchanged(one, other, 1, MIB, paths=2)
        receive(other, POINT_TO_POINT + 1, 0, into).wait(20)
        message.wait(20)
    assert into == content


def test_what_waits_for_a_dead_path_goes_over_the_first_that_is_there_again() -> None:
    wirings = [Relayed(rank, 2) for rank in range(2)]
    with group(2, 2, timeout_s=60, wirings=wirings) as (one, other):
        exchanged(one, other, 1, MIB, paths=2)
        relays = [[relay for wiring in wirings for relay in wiring.on(path)] for path in range(2)]
        for relay in (*relays[0], *relays[1]):
            relay.silent = True
        content, into = random.Random(4).randbytes(2 * MIB), bytearray(2 * MIB)
        transfers = [send(one, 2, 1, content, paths=2), receive(other, 2, 0, into)]
        time.sleep(5)
        for relay in relays[0]:
            relay.silent = False
        began = time.monotonic()
        for transfer in transfers:
            transfer.wait(30)
        assert time.monotonic() - began < 12
        assert into == content


def test_a_reason_of_any_length_is_heard() -> None:
    with group(2) as (one, other):
        exchanged(one, other, 1, 1000, paths=2)
        pending = receive(other, 2, 0, bytearray(1))
        one.abort("é" * 100_000)
        with pytest.raises(CollectiveFailed, match="has aborted: éé"):
            pending.wait(10)


def test_an_address_that_one_rank_cannot_listen_at_is_an_error_on_all() -> None:
    store = dist.HashStore()

    def opened(rank: int) -> str:
        addresses = ("192.0.2.1",) if rank == 1 else (address(0, 0),)
        with pytest.raises(UsageError) as caught:
            open_lanes(
                store,
                rank,
                2,
                name="g",
                host=f"host{rank}",
                fabric=multi_plane(hosts=2, rates=[RATE]),
                wiring=Planes(addresses),
                timeout_s=5,
            )
        return str(caught.value)

    texts = on_all([lambda: opened(0), lambda: opened(1)])
    assert texts[0] == texts[1]
    assert "rank 1 (host1) cannot open lanes" in texts[0]
    assert "192.0.2.1" in texts[0]
