"""What the texts of frames say: JSON, parsed with suspicion although its sender knows the token; and errors on the way.

Shared by both sides of the TCP transport (`links.py` asks, `listener.py` serves) and by the one in memory.
"""

import json
from dataclasses import dataclass

from resilient.checkpoint.agent.protocol import ProtocolError, error_of, error_reply, parsed, text, whole
from resilient.checkpoint.peers.frames import TEXT_BYTES
from resilient.checkpoint.peers.transport import Message
from resilient.errors import DamagedImage, LevelFailed, ResilientError

ASKED_AHEAD = 3  # ranges of one `read` that are on their way at once


@dataclass(frozen=True, slots=True, kw_only=True)
class Range:
    """What a READ or PUSH is about. `digest` is that of a PUSH."""

    name: str
    offset: int
    nbytes: int
    digest: str = ""


def range_text(wanted: Range) -> bytes:
    return message_text(
        {"name": wanted.name, "offset": wanted.offset, "nbytes": wanted.nbytes, "digest": wanted.digest}
    )


def parse_range(body: bytes) -> Range:
    """Raises ProtocolError."""
    found = parse_message(body)
    return Range(
        name=text(found, "name"),
        offset=whole(found, "offset"),
        nbytes=whole(found, "nbytes"),
        digest=text(found, "digest"),
    )


def message_text(message: Message) -> bytes:
    """Raises LevelFailed where no peer would take it."""
    body = json.dumps(message, separators=(",", ":")).encode()
    if len(body) > TEXT_BYTES:
        raise LevelFailed(f"a message of {len(body)} bytes is too long for peers, which take {TEXT_BYTES}; split it")
    return body


def parse_message(body: bytes) -> Message:
    """Raises ProtocolError for all but one JSON object."""
    return parsed(body, "text")


def error_text(error: ResilientError) -> bytes:
    return message_text(error_reply(0, error))


def parse_error(body: bytes) -> ResilientError:
    """The error that a FAILED frame carries, as an instance of the same class. Raises ProtocolError."""
    found = error_of(parse_message(body))
    if found is None:
        raise ProtocolError("a failure that does not say what failed")
    return found


def told_by(peer: str, error: ResilientError) -> ResilientError:
    """A peer's error as the caller's method raises it: the same class; the message says who told it."""
    return type(error)(f"node {peer} says: {error}")


def as_failure(node: str, error: Exception) -> ResilientError:
    """What a peer is told of an error in this node's Served: it as it is, or that something unforeseen happened."""
    if isinstance(error, ResilientError):
        return error
    return LevelFailed(f"node {node} failed to serve a request: {type(error).__name__}: {error}")


def check_size(view: memoryview, nbytes: int) -> None:
    """Served may be wrong, and then its peer must not pay for it. Raises ValueError."""
    if view.nbytes != nbytes:
        raise ValueError(f"there are {view.nbytes} bytes for a range of {nbytes}")


def check_digest(found: str, expected: str, peer: str, name: str, offset: int) -> None:
    """Raises DamagedImage."""
    if found != expected:
        raise DamagedImage(
            f"{name} at offset {offset}, pushed by node {peer}: digest {found} instead of {expected}; push it again"
        )
