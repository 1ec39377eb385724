"""By which address of this machine another one reaches it: that of the interface that leads there."""

import socket
from contextlib import closing

_DISCARD = 9  # nothing is sent: a datagram socket that is connected only chooses a route


def address_towards(host: str) -> str:
    """Our address on the way to a host. May ask a name service, and block for it. Raises OSError."""
    family, kind, _, _, address = socket.getaddrinfo(host, _DISCARD, type=socket.SOCK_DGRAM)[0]
    with closing(socket.socket(family, kind)) as probe:
        probe.connect(address)
        return str(probe.getsockname()[0])
