"""What a rank knows of its paths: from which address and source port a flow takes which of them.

    Planes   an interface, so an address, for each path: exact, because each interface leads into its own network
    Spines   one interface; the source port decides (hashed by the switches), and `find` knows which port leads where

The receiving side listens at each of its addresses; the sender picks. A flow to a rank of the same leaf has no path.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from resilient.errors import UsageError

Address = tuple[str, int]
_EVERYWHERE = ("", "0.0.0.0", "::", "*")


class Way(NamedTuple):
    """Port 0: any. `target`: which of the peer's addresses to connect to."""

    source: str
    port: int
    target: Address


class Wiring(Protocol):
    """`addresses`: where this rank listens."""

    @property
    def paths(self) -> int: ...

    @property
    def addresses(self) -> tuple[str, ...]: ...

    def ways(self, path: int, peer: Sequence[Address], *, crosses: bool) -> Way:
        """How to connect to a peer over a path. May probe, so may take a while. Raises OSError where there is none."""
        ...


@dataclass(frozen=True, slots=True)
class Planes:
    """`addresses[path]` of this rank. Raises UsageError for an address that means everywhere."""

    addresses: tuple[str, ...]

    def __post_init__(self) -> None:
        _check(self.addresses)

    @property
    def paths(self) -> int:
        return len(self.addresses)

    def ways(self, path: int, peer: Sequence[Address], *, crosses: bool) -> Way:
        if len(peer) != len(self.addresses):
            raise UsageError(
                f"this rank has {len(self.addresses)} interfaces and its peer {len(peer)}; they must match"
            )
        return Way(self.addresses[path], 0, peer[path])


Find = Callable[[str, Address, int], int]


@dataclass(frozen=True, slots=True)
class Spines:
    """`find(address, target, path)` gives a free source port whose flow takes the path; raises OSError for none."""

    address: str
    paths: int
    find: Find

    def __post_init__(self) -> None:
        _check((self.address,))

    @property
    def addresses(self) -> tuple[str, ...]:
        return (self.address,)

    def ways(self, path: int, peer: Sequence[Address], *, crosses: bool) -> Way:
        return Way(self.address, self.find(self.address, peer[0], path) if crosses else 0, peer[0])


def _check(addresses: Sequence[str]) -> None:
    for address in addresses:
        if address in _EVERYWHERE:
            raise UsageError(f"lanes would listen at {address!r}, that is everywhere; name the interfaces' addresses")
