"""One authenticated connection: frames of a header, a text and data, over a blocking socket.

    header   kind, bytes of text, bytes of data, SHA-256 of the text, and an HMAC-SHA256 of all that and of the
             frame's number in its direction, with the key that the handshake gave
    text     JSON, or nothing; what the header's digest says
    data     image or parity bytes, as they lie in memory

A header is checked before anything else is believed, so a frame that was replayed, left out, put in another place, made
too long or made up ends the connection before a byte of it is held. The data are not covered: they have block digests,
which whoever asked for them compares (law 5), and a MAC would cost another pass over them.

No copies of data are made here, and no timer is set for each call: the socket's own limits (SO_RCVTIMEO, SO_SNDTIMEO)
end a wait in which no byte moves, while the interpreter lock is free.
"""

import enum
import errno
import hashlib
import hmac
import socket
import struct
from collections.abc import Sequence

from resilient.checkpoint.peers.handshake import Keys
from resilient.checkpoint.peers.pacing import Pace

TEXT_BYTES = 64 << 20  # records of very many tensors are long
REQUEST_BYTES = 64 << 10  # the text of a READ or PUSH

_HEAD = struct.Struct(">BIQ32s")
_NUMBER = struct.Struct(">Q")
_MAC_BYTES = 32
_DRAIN_BYTES = 256 << 10


class Kind(enum.IntEnum):
    """What a frame is; each request gets one reply, in order."""

    ASK = 1  # text: a message; replied to with ANSWER or FAILED
    READ = 2  # text: name, offset, nbytes; replied to with DATA or FAILED
    PUSH = 3  # text: name, offset, digest; data; replied to with TAKEN or FAILED
    ANSWER = 4  # text: a message
    DATA = 5  # data
    TAKEN = 6
    FAILED = 7  # text: kind of error, message


_WITH_LONG_TEXT = (Kind.ASK, Kind.ANSWER, Kind.FAILED)
_WITH_DATA = (Kind.PUSH, Kind.DATA)


class Broken(Exception):
    """A connection is of no use any more, or could not be made. Never leaves this package.

    `final`: another try would end, or wait, the same way.
    """

    def __init__(self, reason: str, *, final: bool = False) -> None:
        super().__init__(reason)
        self.final = final


class Channel:
    """One side of a connection whose handshake is done. One thread at a time may send, and one receive."""

    def __init__(self, sock: socket.socket, keys: Keys, pace: Pace, limit_s: float) -> None:
        """No wait lasts longer than `limit_s` without a byte moving. The caller closes the socket."""
        self.sock = sock
        self._keys = keys
        self._pace = pace
        self._limit_s = limit_s
        self._sent = 0
        self._received = 0
        sock.settimeout(None)
        limit = struct.pack("ll", int(limit_s), int(limit_s % 1 * 1e6))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)

    def send(self, kind: Kind, text: bytes = b"", data: memoryview | None = None) -> None:
        """Blocks until the system has taken everything. Raises Broken."""
        nbytes = 0 if data is None else data.nbytes
        head = _HEAD.pack(kind, len(text), nbytes, hashlib.sha256(text).digest())
        first = head + _mac(self._keys.sending, self._sent, head) + text
        self._sent += 1
        piece_bytes = self._pace.piece_bytes()
        if data is None or not nbytes:
            self._send([memoryview(first)])
        elif piece_bytes is None:
            self._send([memoryview(first), data])
        else:
            self._send([memoryview(first)])
            for begin in range(0, nbytes, piece_bytes):
                piece = data[begin : begin + piece_bytes]
                self._pace.wait(piece.nbytes)
                self._send([piece])

    def receive(self) -> tuple[Kind, bytes, int]:
        """The next frame's kind, its text, and how many bytes of data follow: take them before the next call.

        Raises Broken: also when it is not the frame that comes next from who knows the key.
        """
        header = bytearray(_HEAD.size + _MAC_BYTES)
        self.receive_into(memoryview(header))
        head = header[: _HEAD.size]
        if not hmac.compare_digest(header[_HEAD.size :], _mac(self._keys.receiving, self._received, head)):
            raise Broken(f"frame {self._received} is not authentic")
        self._received += 1
        number, text_bytes, data_bytes, text_digest = _HEAD.unpack(head)
        kind = _checked(number, text_bytes, data_bytes)
        text = bytearray(text_bytes)
        self.receive_into(memoryview(text))
        if hashlib.sha256(text).digest() != text_digest:
            raise Broken("the text of a frame is not authentic")
        return kind, bytes(text), data_bytes

    def receive_into(self, into: memoryview) -> None:
        """Fill `into` with the bytes that come next. Raises Broken."""
        while into.nbytes:
            try:
                count = self.sock.recv_into(into, 0, socket.MSG_WAITALL)
            except OSError as error:
                raise self._broken(error) from error
            if not count:
                raise Broken("it closed the connection")
            into = into[count:]

    def drain(self, nbytes: int) -> None:
        """Take data off the connection that nobody wants. Raises Broken."""
        scratch = memoryview(bytearray(min(nbytes, _DRAIN_BYTES)))
        while nbytes:
            self.receive_into(scratch[:nbytes])
            nbytes -= min(nbytes, len(scratch))

    def is_idle(self) -> bool:
        """Whether the connection still stands, as far as can be seen, with nothing to be received."""
        try:
            self.sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False  # its end, or bytes that nobody asked for

    def _send(self, parts: Sequence[memoryview]) -> None:
        """All of the parts, in order."""
        left = list(parts)
        while left:
            try:
                count = self.sock.sendmsg(left)
            except OSError as error:
                raise self._broken(error) from error
            while left and count >= left[0].nbytes:
                count -= left.pop(0).nbytes
            if left:
                left[0] = left[0][count:]

    def _broken(self, error: OSError) -> Broken:
        if error.errno == errno.EAGAIN:
            return Broken(f"no byte moved for {self._limit_s:g} s", final=True)
        return Broken(error.strerror or str(error))


def _mac(key: bytes, number: int, head: bytes | bytearray) -> bytes:
    return hmac.digest(key, _NUMBER.pack(number) + head, "sha256")


def _checked(number: int, text_bytes: int, data_bytes: int) -> Kind:
    """The kind of a frame. Raises Broken for what no correct peer sends."""
    try:
        kind = Kind(number)
    except ValueError:
        raise Broken(f"a frame of unknown kind {number}") from None
    longest = TEXT_BYTES if kind in _WITH_LONG_TEXT else REQUEST_BYTES
    if text_bytes > longest:
        raise Broken(f"a frame with {text_bytes} bytes of text; at most {longest} are taken")
    if data_bytes and kind not in _WITH_DATA:
        raise Broken(f"a frame of kind {kind.name} with {data_bytes} bytes of data")
    return kind
