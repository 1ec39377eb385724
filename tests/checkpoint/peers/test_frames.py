"""Frames come out as they went in, each once, in order; anything else ends the connection before it is believed."""

import hashlib
import hmac
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resilient.checkpoint.peers.frames import REQUEST_BYTES, TEXT_BYTES, Broken, Channel, Kind
from resilient.checkpoint.peers.handshake import Keys
from resilient.checkpoint.peers.pacing import Pace

TO, FROM = b"t" * 32, b"f" * 32
HEADER_BYTES = 77
MESSAGES = [(Kind.ASK, b'{"n":1}'), (Kind.ASK, b""), (Kind.READ, b"{}"), (Kind.ASK, b'{"n":2}')]


@contextmanager
def channels(limit_s: float = 20, pace: Pace | None = None) -> Iterator[tuple[Channel, Channel]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield (
            Channel(ours, Keys(sending=TO, receiving=FROM), pace or Pace(), limit_s),
            Channel(theirs, Keys(sending=FROM, receiving=TO), Pace(), limit_s),
        )


def raw_frames() -> list[bytes]:
    """The bytes of MESSAGES, one after the other, as a client sends them."""
    with channels() as (ours, theirs):
        return [_raw(ours, theirs, kind, text) for kind, text in MESSAGES]


def _raw(ours: Channel, theirs: Channel, kind: Kind, text: bytes) -> bytes:
    ours.send(kind, text)
    return theirs.sock.recv(HEADER_BYTES + len(text), socket.MSG_WAITALL)


def believed(data: bytes) -> list[tuple[Kind, bytes]]:
    """The frames that a receiver takes from these bytes until it gives up, which it does at their end at the latest."""
    found: list[tuple[Kind, bytes]] = []

    def receive_all() -> None:
        while True:
            kind, text, _ = theirs.receive()
            found.append((kind, text))

    with channels() as (ours, theirs):
        ours.sock.sendall(data)
        ours.sock.shutdown(socket.SHUT_WR)
        with pytest.raises(Broken):
            receive_all()
    return found


def forged(kind: int, text_bytes: int, data_bytes: int, text: bytes = b"") -> bytes:
    """A first frame as only somebody with the key can make it."""
    head = struct.pack(">BIQ32s", kind, text_bytes, data_bytes, hashlib.sha256(text).digest())
    return head + hmac.digest(TO, struct.pack(">Q", 0) + head, "sha256") + text


def test_frames_arrive_as_they_were_sent() -> None:
    assert believed(b"".join(raw_frames())) == MESSAGES
    assert believed(forged(Kind.ASK, 2, 0, b"{}")) == [(Kind.ASK, b"{}")]


def test_data_follow_their_frame_and_may_be_drained() -> None:
    with channels() as (ours, theirs):
        ours.send(Kind.PUSH, b"first", memoryview(b"0123456789" * 1000))
        ours.send(Kind.PUSH, b"second", memoryview(b"abc"))
        assert theirs.receive() == (Kind.PUSH, b"first", 10_000)
        theirs.drain(10_000)
        assert theirs.receive() == (Kind.PUSH, b"second", 3)
        into = bytearray(3)
        theirs.receive_into(memoryview(into))
        assert into == b"abc"
        theirs.drain(0)


def test_a_paced_sender_asks_before_each_piece() -> None:
    waits: list[float] = []
    with channels(pace=Pace(1e6, clock=lambda: 0.0, sleep=waits.append)) as (ours, theirs):
        ours.send(Kind.DATA, data=memoryview(bytes(150_000)))
        assert theirs.receive() == (Kind.DATA, b"", 150_000)
        theirs.drain(150_000)
    assert waits == pytest.approx([0.05])  # 50,000 bytes at a time; a burst of two is free


@pytest.mark.parametrize(
    "order",
    [[0, 0], [0, 1, 1], [1], [0, 2], [0, 1, 2, 3, 3], [0, 1, 2, 0], [3, 2, 1, 0]],
)
def test_a_frame_that_is_replayed_left_out_or_in_another_place_ends_it(order: list[int]) -> None:
    frames = raw_frames()
    right = [MESSAGES[number] for place, number in enumerate(order) if order[: place + 1] == list(range(place + 1))]
    assert believed(b"".join(frames[number] for number in order)) == right


def test_a_frame_sent_back_to_its_sender_ends_it() -> None:
    with channels() as (ours, theirs):
        theirs.sock.sendall(_raw(ours, theirs, Kind.ASK, b"{}"))
        with pytest.raises(Broken, match="frame 0 is not authentic"):
            ours.receive()


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_whatever_is_changed_only_what_was_sent_is_believed(data: st.DataObject) -> None:
    frames = raw_frames()
    good = b"".join(frames)
    begin = data.draw(st.integers(0, len(good) - 1))
    end = data.draw(st.integers(begin, min(len(good), begin + 100)))
    bad = good[:begin] + data.draw(st.binary(max_size=100)) + good[end:]
    found = believed(bad)
    assert found == MESSAGES[: len(found)]
    ends = [sum(map(len, frames[: number + 1])) for number in range(len(frames))]
    untouched = sum(border <= begin for border in ends)
    assert len(found) >= untouched
    if bad[: len(good)] != good:
        assert len(found) < len(MESSAGES)


@given(noise=st.binary(max_size=300))
def test_noise_is_never_believed(noise: bytes) -> None:
    assert believed(noise) == []


@pytest.mark.parametrize(
    ("frame", "reason"),
    [
        (forged(Kind.ASK, TEXT_BYTES + 1, 0), f"{TEXT_BYTES + 1} bytes of text"),
        (forged(Kind.READ, REQUEST_BYTES + 1, 0), f"at most {REQUEST_BYTES}"),
        (forged(Kind.TAKEN, 1 << 31, 0), f"{1 << 31} bytes of text"),
        (forged(Kind.ASK, 0, 1), "ASK with 1 bytes of data"),
        (forged(99, 0, 0), "unknown kind 99"),
        (forged(Kind.ASK, 3, 0, b"abc")[:-1] + b"X", "the text of a frame is not authentic"),
    ],
)
def test_even_who_has_the_key_cannot_send_what_is_too_long_or_makes_no_sense(frame: bytes, reason: str) -> None:
    with channels() as (ours, theirs):
        ours.sock.sendall(frame)
        with pytest.raises(Broken, match=reason) as caught:
            theirs.receive()
        assert not caught.value.final


@pytest.mark.parametrize(
    "wait",
    [
        lambda channel: channel.receive(),
        lambda channel: channel.receive_into(memoryview(bytearray(1))),
        lambda channel: channel.send(Kind.DATA, data=memoryview(bytes(64 << 20))),
    ],
)
def test_a_wait_without_a_byte_ends_at_the_limit(wait: Callable[[Channel], object]) -> None:
    with channels(limit_s=0.05) as (ours, _), pytest.raises(Broken, match=r"no byte moved for 0.05 s") as caught:
        wait(ours)
    assert caught.value.final


def test_the_other_sides_end_is_noticed_when_receiving_and_when_sending() -> None:
    with channels() as (ours, theirs):
        assert ours.is_idle()
        theirs.sock.close()
        assert not ours.is_idle()
        with pytest.raises(Broken, match="closed the connection"):
            ours.receive()
        with pytest.raises(Broken, match="pipe"):
            ours.send(Kind.ASK, b"{}")
        ours.sock.close()
        assert not ours.is_idle()


def test_a_connection_with_bytes_that_nobody_asked_for_is_not_idle() -> None:
    with channels() as (ours, theirs):
        theirs.sock.sendall(b"x")
        assert not ours.is_idle()
