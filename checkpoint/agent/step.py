"""What an agent step is asked, and how: one frame each way over its private Unix socket (`protocol.py` has the frames).

An agent step (`launch/agent_step.py`, the command `resilient agent`) starts agents on behalf of trainers, so that they
live outside the trainers' process tree. Trainers find its socket in RESILIENT_AGENT_STEP.

    {"op": "start", "folder", "executable", "environment", "patience_s"}   start an agent; answers when it serves
    {"op": "finish"}    agents end once their trainers have left and their writes are done; answers when they have
    {"op": "status"}    the agents that live: folder, pid
"""

import contextlib
import os
import socket
import struct
from pathlib import Path

from resilient.checkpoint.agent.protocol import FrameReader, Message, ProtocolError, encode, error_of
from resilient.errors import LevelFailed

VARIABLE = "RESILIENT_AGENT_STEP"
REQUEST_BYTES = 4 << 20  # the kernel lets an environment have 2 MiB or so
_RECEIVE_BYTES = 64 << 10


def ask(path: Path, message: Message, within_s: float | None) -> Message:
    """The answer of the agent step at `path`. Blocks, at most `within_s`.

    Raises OSError when nobody answers there (TimeoutError is one), the error that the step replies, and LevelFailed
    when another user's process listens or the answer makes no sense.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(within_s)
        sock.connect(str(path))
        if peer_uid(sock) not in (os.getuid(), 0):
            raise LevelFailed(f"{path} is served by user {peer_uid(sock)}, not by this one; correct {VARIABLE}")
        try:
            with contextlib.suppress(BrokenPipeError):  # it refused before it had read all, and said why
                sock.sendall(encode({**message, "id": 0}))
            answer = receive(sock)
        except ProtocolError as error:
            raise LevelFailed(f"the agent step at {path} gave an answer without sense: {error}") from error
    if answer is None:
        raise ConnectionError(f"the agent step at {path} closed the connection")
    refusal = error_of(answer)
    if refusal is not None:
        raise refusal
    return answer


def receive(sock: socket.socket) -> Message | None:
    """The next frame; None when the other side has hung up. Blocks like the socket. Raises ProtocolError, OSError."""
    reader = FrameReader(REQUEST_BYTES)
    try:
        while data := sock.recv(_RECEIVE_BYTES):
            reader.feed(data)
            for message, _ in reader.messages():
                return message
    finally:
        reader.close()
    return None


def peer_uid(sock: socket.socket) -> int:
    """The user whose process is at the other end of a Unix socket."""
    found = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    uid: int = struct.unpack("3i", found)[1]
    return uid
