"""Two agents prove to each other that they know the token, without showing it, and agree on the keys of a connection.

    client → server   hello: protocol version, a nonce, who it is and whom it means to talk to
    server → client   a nonce
    client → server   HMAC(token, "client", transcript)       whoever has no token learns nothing but a random number
    server → client   HMAC(token, "server", transcript)

The transcript is the first two messages, so a proof is good for one connection, one pair of nodes and one side of it: a
recorded or reflected one is worthless. Each direction's frames have a key of their own (`frames.py`). HMAC-SHA256:
RFC 2104. This is authentication, not encryption: who can read the network can read images.

All messages have fixed sizes, and the whole of it has a deadline: a stranger makes us hold less than a KiB, and not for
long.
"""

import hashlib
import hmac
import secrets
import socket
import struct
import time
from dataclasses import dataclass

VERSION = 1
NAME_BYTES = 255
LEAST_TOKEN_BYTES = 16

_MAGIC = b"RESILPEER"
_NONCE_BYTES = 32
_PROOF_BYTES = hashlib.sha256().digest_size
_HELLO = struct.Struct(f">{len(_MAGIC)}sH{_NONCE_BYTES}s{NAME_BYTES + 1}p{NAME_BYTES + 1}p")


class HandshakeFailed(Exception):
    """The other side did not prove what it had to. Never leaves this package."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Keys:
    """What a connection's frames are authenticated with, seen from one side."""

    sending: bytes
    receiving: bytes


def as_client(sock: socket.socket, token: bytes, node: str, peer: str, deadline: float) -> Keys:
    """Prove ourselves to `peer`, and have it prove itself. `deadline`: by `time.monotonic()`.

    Raises HandshakeFailed, OSError (TimeoutError at the deadline), EOFError when the other side hangs up, as it does
    when it has another token, another name or another version.
    """
    hello = _HELLO.pack(_MAGIC, VERSION, secrets.token_bytes(_NONCE_BYTES), node.encode(), peer.encode())
    _send(sock, hello, deadline)
    transcript = hello + _receive(sock, _NONCE_BYTES, deadline)
    _send(sock, _mac(token, b"client", transcript), deadline)
    if not hmac.compare_digest(_receive(sock, _PROOF_BYTES, deadline), _mac(token, b"server", transcript)):
        raise HandshakeFailed("it does not know this job's token")
    return Keys(sending=_mac(token, b"to server", transcript), receiving=_mac(token, b"to client", transcript))


def as_server(sock: socket.socket, token: bytes, node: str, deadline: float) -> tuple[str, Keys]:
    """The name of the client and the keys, once it has proved itself; it is told nothing of why it failed.

    Raises HandshakeFailed, OSError (TimeoutError at the deadline), EOFError.
    """
    hello = _receive(sock, _HELLO.size, deadline)
    magic, version, _, client, server = _HELLO.unpack(hello)
    if (magic, version, server) != (_MAGIC, VERSION, node.encode()):
        raise HandshakeFailed(f"it speaks {magic!r} version {version} and looks for node {server!r}")
    nonce = secrets.token_bytes(_NONCE_BYTES)
    _send(sock, nonce, deadline)
    transcript = hello + nonce
    if not hmac.compare_digest(_receive(sock, _PROOF_BYTES, deadline), _mac(token, b"client", transcript)):
        raise HandshakeFailed("it does not know this job's token")
    keys = Keys(sending=_mac(token, b"to client", transcript), receiving=_mac(token, b"to server", transcript))
    try:
        name: str = client.decode()
    except UnicodeDecodeError as error:
        raise HandshakeFailed(f"its name is no text: {error}") from error
    _send(sock, _mac(token, b"server", transcript), deadline)
    return name, keys


def _mac(token: bytes, purpose: bytes, transcript: bytes) -> bytes:
    return hmac.digest(token, b"resilient peers\0" + purpose + b"\0" + transcript, "sha256")


def _send(sock: socket.socket, data: bytes, deadline: float) -> None:
    _allow_until(sock, deadline)
    sock.sendall(data)


def _receive(sock: socket.socket, nbytes: int, deadline: float) -> bytes:
    held = b""
    while len(held) < nbytes:
        _allow_until(sock, deadline)
        more = sock.recv(nbytes - len(held))
        if not more:
            raise EOFError("it closed the connection in the handshake")
        held += more
    return held


def _allow_until(sock: socket.socket, deadline: float) -> None:
    left_s = deadline - time.monotonic()
    if left_s <= 0:
        raise TimeoutError("it did not finish the handshake in time")
    sock.settimeout(left_s)
