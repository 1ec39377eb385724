"""How many bytes a lane may have on its way: enough to keep its path busy, too few to fill switches' buffers.

TCP fills the buffers until they overflow, and a collective then waits for what was lost, 200 ms for the last bytes of a
message (RFC 6298). A lane's share is planned, so it need not probe: its send buffer is small (what its path carries in
the few milliseconds in which a busy machine may not wake the lanes' thread), and grows only while the
round trip shows that nothing queues. Linux tells the round trips (`TCP_INFO`, tcp(7)).
"""

import socket
import struct
from dataclasses import dataclass

LEAST = 1 << 16
MOST_AT_FIRST = 1 << 18
MOST = 1 << 22
_UNTENDED_S = 0.005
_QUEUEING = 2.0  # a round trip so many times the shortest one waits in buffers
_FULL = 4.0
_INFO = struct.Struct("@8B24I4Q4I")  # struct tcp_info as far as tcpi_min_rtt
_RTT, _REPEATED, _ACKNOWLEDGED, _LEAST_RTT = 8 + 15, 8 + 23, 8 + 24 + 2, 8 + 24 + 4 + 3


@dataclass(frozen=True, slots=True)
class Seen:
    """Of a connection: round trips in microseconds, smoothed and the shortest; segments that were sent again, and bytes
    that the peer's kernel has acknowledged, so far."""

    rtt_us: int
    least_us: int
    repeated: int
    acknowledged: int = 0


UNSEEN = Seen(1, 1, 0)


def seen(sock: socket.socket) -> Seen:
    """Raises OSError for a socket that is closed."""
    raw = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 512)
    if len(raw) < _INFO.size:  # a kernel that does not tell
        return UNSEEN
    fields = _INFO.unpack_from(raw)
    return Seen(fields[_RTT], fields[_LEAST_RTT], fields[_REPEATED], fields[_ACKNOWLEDGED])


def first(rate: float) -> int:
    """The window of a new lane over a path of so many bytes a second; infinite: there is no buffer to spare."""
    if rate == float("inf"):
        return MOST
    return round(min(MOST_AT_FIRST, max(LEAST, rate * _UNTENDED_S)))


def resized(window: int, before: Seen, now: Seen) -> int:
    """The window of a lane that was busy between two looks at it."""
    if now.repeated > before.repeated and now.rtt_us > _FULL * now.least_us:
        return max(LEAST, window // 2)
    if now.rtt_us < _QUEUEING * now.least_us:
        return min(MOST, window * 2)
    return window


def apply(sock: socket.socket, window: int) -> None:
    """The kernel counts its own overhead as well, and doubles the number to make up for it (socket(7))."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, window)
