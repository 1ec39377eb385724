"""Frames: put together from any cuts, bounded, and never trusted; errors keep their class on the way."""

import json
import os
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

import resilient.errors as errors
from resilient.checkpoint.agent.protocol import (
    FrameReader,
    ProtocolError,
    encode,
    error_of,
    error_reply,
    text,
    texts,
    whole,
    wholes,
)

Json = st.dictionaries(st.text(), st.integers() | st.text() | st.lists(st.booleans())).filter(
    lambda message: "descriptors" not in message
)


@given(messages=st.lists(Json, max_size=5), cuts=st.lists(st.integers(1, 40), min_size=1))
def test_messages_come_out_as_they_went_in_however_the_bytes_are_cut(messages: list[dict], cuts: list[int]) -> None:  # type: ignore[type-arg]
    data = b"".join(encode(message) for message in messages)
    reader, found, position = FrameReader(), [], 0
    while position < len(data):
        cut = cuts[position % len(cuts)]
        reader.feed(data[position : position + cut])
        found += [message for message, _ in reader.messages()]
        position += cut
    assert found == messages


def test_descriptors_go_to_the_message_that_speaks_of_them_and_unclaimed_ones_are_closed() -> None:
    fds = [os.open(os.devnull, os.O_RDONLY) for _ in range(3)]
    reader = FrameReader()
    reader.feed(encode({"a": 1}) + encode({"b": 2, "descriptors": 2}), fds)
    assert list(reader.messages()) == [({"a": 1}, []), ({"b": 2}, fds[:2])]
    reader.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fds[2])
    for fd in fds[:2]:
        os.close(fd)


@pytest.mark.parametrize(
    "body", [b"{", b"\xff\xfe", b"[1]", b'"text"', b"null", b"[" * 100_000, b'{"descriptors":1}', b'{"descriptors":-1}']
)
def test_a_frame_that_is_no_message_is_refused(body: bytes) -> None:
    reader = FrameReader()
    reader.feed(struct.pack(">I", len(body)) + body)
    with pytest.raises(ProtocolError):
        list(reader.messages())


def test_a_frame_that_is_too_long_is_refused_by_its_length_alone() -> None:
    reader = FrameReader(limit_bytes=100)
    reader.feed(struct.pack(">I", 101))
    with pytest.raises(ProtocolError, match="a frame of 101 bytes; at most 100"):
        list(reader.messages())


def test_every_error_of_the_library_arrives_as_its_own_class() -> None:
    kinds = [kind for name in errors.__all__ if issubclass(kind := getattr(errors, name), errors.ResilientError)]
    for kind in kinds:
        found = error_of(json.loads(json.dumps(error_reply(1, kind("what happened")))))
        assert type(found) is kind
        assert str(found) == "what happened"
    assert error_of({"id": 1, "ok": True}) is None


@pytest.mark.parametrize("kind", ["json", "__all__", "NoSuchError", None])
def test_an_unknown_kind_of_error_is_still_an_error_of_the_library(kind: object) -> None:
    assert type(error_of({"error": {"kind": kind, "message": "m"}})) is errors.ResilientError


@pytest.mark.parametrize("value", [None, "1", 1.0, True, -1, 1 << 70])
def test_a_number_is_a_whole_number(value: object) -> None:
    with pytest.raises(ProtocolError):
        whole({"step": value}, "step")


def test_fields_of_another_type_are_refused() -> None:
    with pytest.raises(ProtocolError):
        text({"reason": 1}, "reason")
    with pytest.raises(ProtocolError):
        texts({"levels": ["local", 1]}, "levels")
    with pytest.raises(ProtocolError):
        wholes({"node_ranks": [0, "1"]}, "node_ranks")
    assert wholes({"node_ranks": [0, 1]}, "node_ranks") == (0, 1)
