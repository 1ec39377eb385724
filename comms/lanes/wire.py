"""The frames of a lane: a header of 28 bytes, network order, and for some kinds a payload.

DATA       chunk of a message: operation, tag, offset, length; then the bytes. Sender to receiver only
ACK        `operation` is how many chunks have arrived on this connection so far. Receiver to sender only
OPERATION  announces what an operation is (its fingerprint), before its first chunk on a connection
PING PONG  is anybody there? A PONG's `operation` is the last that its rank has begun; `tag` 1: it waits for others
ABORT      why the group has failed, as JSON; passed on by all who get it for the first time
BYE        its rank closes the group, and has had all that operations up to `operation` were to bring it
REPORT     how quick paths have been, as JSON; passed on likewise
"""

import json
import struct
from enum import IntEnum
from typing import Any, NamedTuple

HEADER = struct.Struct("!B3xIQQI")
MOST_PAYLOAD = 1 << 16  # of anything but DATA
MOST_CHUNK = 1 << 24


class Kind(IntEnum):
    DATA = 1
    ACK = 2
    OPERATION = 3
    PING = 4
    PONG = 5
    ABORT = 6
    REPORT = 7
    BYE = 8


class Header(NamedTuple):
    kind: Kind
    tag: int
    operation: int
    offset: int
    length: int

    def pack(self) -> bytes:
        return HEADER.pack(self.kind, self.tag, self.operation, self.offset, self.length)


class Garbled(Exception):
    """What came is no frame. Never leaves this package."""


def unpack(raw: bytes | bytearray) -> Header:
    """Raises Garbled for an unknown kind and for lengths that no frame has."""
    kind, tag, operation, offset, length = HEADER.unpack(raw)
    if kind not in Kind.__members__.values() or length > (MOST_CHUNK if kind == Kind.DATA else MOST_PAYLOAD):
        raise Garbled(f"kind {kind}, {length} bytes")
    return Header(Kind(kind), tag, operation, offset, length)


def frame(kind: Kind, operation: int = 0, payload: bytes = b"", tag: int = 0) -> bytes:
    """A whole frame of any kind but DATA."""
    return Header(kind, tag, operation, 0, len(payload)).pack() + payload


def said(kind: Kind, content: dict[str, Any]) -> bytes:
    """A frame whose payload is JSON."""
    return frame(kind, payload=json.dumps(content).encode())


def heard(payload: bytes) -> dict[str, Any]:
    """Raises Garbled unless the payload is a JSON object."""
    try:
        content = json.loads(payload)
    except ValueError as error:
        raise Garbled(str(error)) from None
    if not isinstance(content, dict):
        raise Garbled(f"{content!r} is no object")
    return content
