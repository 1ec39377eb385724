"""The frames that trainers and the agent exchange over a private Unix stream socket.

A frame is four bytes of length (big-endian) and that many bytes of JSON, one object; `"descriptors": n` in it says
that n file descriptors came with its first byte. A request has an `id` and gets one reply with that id,
`{"id", "ok": true, ..}` or `{"id", "error": {"kind", "message"}}`; a message without an id gets none; an `event` comes
from the agent unasked.
Nothing here waits: `FrameReader` is fed bytes. What the operations mean is said in `server.py`.
"""

import json
import os
import struct
from collections import deque
from collections.abc import Iterator
from typing import Any

import resilient.errors as errors
from resilient.errors import ResilientError

PROTOCOL = 1
FIRST_FRAME_BYTES = 256 << 10  # before the token was seen nobody may make us hold more than this
FRAME_BYTES = 64 << 20
FDS_PER_FRAME = 64

_LENGTH = struct.Struct(">I")

Message = dict[str, Any]


class ProtocolError(Exception):
    """What no correct client or agent sends; the connection is closed. Never leaves this package."""


def encode(message: Message) -> bytes:
    """The frame of a message. Raises ProtocolError when it would be too long for the other side to take."""
    body = json.dumps(message, separators=(",", ":")).encode()
    if len(body) > FRAME_BYTES:
        raise ProtocolError(f"a message of {len(body)} bytes; at most {FRAME_BYTES} are taken")
    return _LENGTH.pack(len(body)) + body


class FrameReader:
    """Puts frames together from what a socket gives. Owns descriptors until a message takes them."""

    def __init__(self, limit_bytes: int = FRAME_BYTES) -> None:
        self.limit_bytes = limit_bytes
        self._held = bytearray()
        self._fds: deque[int] = deque()

    def feed(self, data: bytes, fds: list[int] | tuple[int, ...] = ()) -> None:
        self._held += data
        self._fds.extend(fds)

    def messages(self) -> Iterator[tuple[Message, list[int]]]:
        """Whole messages with their descriptors, which are the caller's to close. Raises ProtocolError."""
        while (body := self._next_body()) is not None:
            message = parsed(body)
            count = message.pop("descriptors", 0)
            if type(count) is not int or not 0 <= count <= len(self._fds):
                raise ProtocolError(f"a frame speaks of {count!r} descriptors, {len(self._fds)} came")
            yield message, [self._fds.popleft() for _ in range(count)]

    def close(self) -> None:
        """Close descriptors that nobody took."""
        while self._fds:
            os.close(self._fds.popleft())

    def _next_body(self) -> bytes | None:
        if len(self._held) < _LENGTH.size:
            return None
        (length,) = _LENGTH.unpack_from(self._held)
        if length > self.limit_bytes:
            raise ProtocolError(f"a frame of {length} bytes; at most {self.limit_bytes} are taken")
        if len(self._held) < _LENGTH.size + length:
            return None
        body = bytes(self._held[_LENGTH.size : _LENGTH.size + length])
        del self._held[: _LENGTH.size + length]
        return body


def parsed(body: bytes, what: str = "frame") -> Message:
    """The JSON object in a frame, or in whatever it is called. Raises ProtocolError for anything else."""
    try:
        message = json.loads(body)
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, nested without end
        raise ProtocolError(f"a {what} that is not JSON: {error}") from error
    if not isinstance(message, dict):
        raise ProtocolError(f"a {what} that holds no object but {type(message).__name__}")
    return message


def whole(message: Message, key: str) -> int:
    """A whole number of at least 0 in a message. Raises ProtocolError."""
    value = message.get(key)
    if type(value) is not int or not 0 <= value < 1 << 62:
        raise ProtocolError(f"{key} = {value!r} is not a whole number of at least 0")
    return value


def text(message: Message, key: str) -> str:
    """A text in a message. Raises ProtocolError."""
    value = message.get(key)
    if not isinstance(value, str):
        raise ProtocolError(f"{key} = {value!r} is not text")
    return value


def wholes(message: Message, key: str) -> tuple[int, ...]:
    """A list of whole numbers in a message. Raises ProtocolError."""
    value = message.get(key)
    if not isinstance(value, list) or any(type(each) is not int or each < 0 for each in value):
        raise ProtocolError(f"{key} is not a list of whole numbers")
    return tuple(value)


def texts(message: Message, key: str) -> tuple[str, ...]:
    """A list of texts in a message. Raises ProtocolError."""
    value = message.get(key)
    if not isinstance(value, list) or any(not isinstance(each, str) for each in value):
        raise ProtocolError(f"{key} is not a list of texts")
    return tuple(value)


def error_reply(request_id: int, error: ResilientError) -> Message:
    return {"id": request_id, "error": {"kind": type(error).__name__, "message": str(error)}}


def error_of(reply: Message) -> ResilientError | None:
    """The error that a reply carries, as an instance of the same class; None if it carries none."""
    carried = reply.get("error")
    if not isinstance(carried, dict):
        return None
    kind = getattr(errors, str(carried.get("kind")), ResilientError)
    if not (isinstance(kind, type) and issubclass(kind, ResilientError)):
        kind = ResilientError
    return kind(str(carried.get("message")))
