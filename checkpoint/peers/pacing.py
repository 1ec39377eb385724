"""How an agent's traffic makes way for the training: a rate that all its sends share, and low priority in the network.

The rate is kept by virtual scheduling (a token bucket without a counter: ITU-T I.371, GCRA): one number says when the
bytes let through so far would all have left at the rate. Who comes before that time waits.
"""

import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress

BURST_S = 0.1  # an idle sender may be this much ahead of its rate
PIECE_BYTES = 1 << 20
_LEAST_PIECE_BYTES = 16 << 10
_PIECES_PER_S = 20
_CLASS_SELECTOR_1 = 0x20  # DSCP CS1, "background"; in kernels and switches that know it, behind all other traffic


class Pace:
    """A bound on the bytes that all threads together send. `bytes_per_s` may be changed at any time; None: no bound.

    In any t seconds at most `bytes_per_s * (t + BURST_S)` bytes are let through, and one piece per waiting thread.
    """

    def __init__(
        self,
        bytes_per_s: float | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        self.bytes_per_s = bytes_per_s
        self._clock = clock
        self._sleep = sleep
        self._lock = threading.Lock()
        self._free_at = float("-inf")

    def piece_bytes(self) -> int | None:
        """How many bytes to ask for at once, so that nobody waits long; None: as many as there are."""
        rate = self.bytes_per_s
        return None if rate is None else max(_LEAST_PIECE_BYTES, min(PIECE_BYTES, int(rate / _PIECES_PER_S)))

    def wait(self, nbytes: int) -> None:
        """Return when so many bytes may be sent. Any thread; threads are let through in the order they came."""
        rate = self.bytes_per_s
        if rate is None:
            return
        with self._lock:
            now = self._clock()
            self._free_at = max(self._free_at, now - BURST_S) + nbytes / rate
            pause_s = self._free_at - now
        if pause_s > 0:
            self._sleep(pause_s)


def yield_to_others(sock: socket.socket) -> None:
    """Mark a connection's packets as background traffic."""
    with suppress(OSError):  # a system that does not let us: it is a courtesy, no promise
        if sock.family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_TCLASS, _CLASS_SELECTOR_1)
        else:
            sock.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, _CLASS_SELECTOR_1)
