"""The rate that all sends share, on a clock of the test's own; and the marks of background traffic."""

import os
import socket
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resilient.checkpoint.peers.pacing import BURST_S, Pace, yield_to_others
from resilient.checkpoint.priority import run_behind


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@given(
    rate=st.floats(1e3, 1e10),
    steps=st.lists(st.tuples(st.integers(1, 1 << 20), st.floats(0, 2)), min_size=1, max_size=30),
)
def test_no_stretch_of_time_sees_more_bytes_than_the_rate_and_one_burst(
    rate: float, steps: list[tuple[int, float]]
) -> None:
    clock = Clock()
    pace = Pace(rate, clock=clock, sleep=clock.sleep)
    sent: list[tuple[float, int]] = []
    for nbytes, idle_s in steps:
        pace.wait(nbytes)
        sent.append((clock.now, nbytes))
        clock.now += idle_s
    for first in range(len(sent)):
        for last in range(first, len(sent)):
            total = sum(nbytes for _, nbytes in sent[first : last + 1])
            most = rate * (sent[last][0] - sent[first][0] + BURST_S) + sent[first][1]
            assert total <= most * (1 + 1e-6)


def test_a_sender_that_never_stops_gets_the_whole_rate() -> None:
    clock = Clock()
    pace = Pace(1e6, clock=clock, sleep=clock.sleep)
    for _ in range(1000):
        pace.wait(50_000)
    assert clock.now - 1000 == pytest.approx(50, abs=2 * BURST_S)


def test_threads_share_one_rate() -> None:
    lock, slept = threading.Lock(), []

    def sleep(seconds: float) -> None:
        with lock:
            slept.append(seconds)

    pace = Pace(1e6, clock=lambda: 0.0, sleep=sleep)
    threads = [threading.Thread(target=pace.wait, args=(1_000_000,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(slept) == pytest.approx([1 - BURST_S, 2 - BURST_S, 3 - BURST_S, 4 - BURST_S])


def test_without_a_rate_nobody_waits_and_a_rate_may_come_and_go() -> None:
    clock = Clock()
    pace = Pace(clock=clock, sleep=clock.sleep)
    pace.wait(1 << 50)
    assert (clock.now, pace.piece_bytes()) == (1000, None)
    pace.bytes_per_s = 1000
    pace.wait(10_000)
    assert clock.now == pytest.approx(1010 - BURST_S)
    pace.bytes_per_s = None
    pace.wait(1 << 50)
    assert clock.now == pytest.approx(1010 - BURST_S)


@pytest.mark.parametrize(("rate", "piece"), [(1e3, 16 << 10), (2e6, 100_000), (1e12, 1 << 20)])
def test_pieces_are_small_where_the_rate_is_and_bounded(rate: float, piece: int) -> None:
    assert Pace(rate).piece_bytes() == piece


@pytest.mark.parametrize(
    ("family", "level", "option"),
    [
        (socket.AF_INET, socket.IPPROTO_IP, socket.IP_TOS),
        (socket.AF_INET6, socket.IPPROTO_IPV6, socket.IPV6_TCLASS),
    ],
)
def test_packets_are_marked_as_background_traffic(family: int, level: int, option: int) -> None:
    with socket.socket(family, socket.SOCK_STREAM) as sock:
        yield_to_others(sock)
        assert sock.getsockopt(level, option) == 0x20


def test_a_socket_that_cannot_be_marked_is_used_as_it_is() -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        yield_to_others(sock)


def test_a_thread_gets_out_of_the_way_of_others_and_never_back_in() -> None:
    found = []

    def work() -> None:
        for nice in (7, 3):
            run_behind(nice)
            found.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    own = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    assert found == [max(7, own)] * 2
