"""What the core wants done. Values; `core.py` decides them, `service.py` acts."""

from collections.abc import Mapping
from dataclasses import dataclass

from resilient.checkpoint.parity.facts import Json, Sealed
from resilient.checkpoint.parity.layout import Key, Stripe


@dataclass(frozen=True, slots=True)
class Send:
    """Ask a peer; then call `answered` or `unanswered`."""

    peer: str
    message: Json


@dataclass(frozen=True, slots=True)
class Expect:
    """Make room for the parity that this node keeps of the stripe."""

    stripe: Stripe


@dataclass(frozen=True, slots=True)
class StartRow:
    """Encode a row from the images of these agents; then call `row_done` or `row_failed`."""

    stripe: Stripe
    row: int
    images: Mapping[int, Sealed]


@dataclass(frozen=True, slots=True)
class StopRow:
    """What becomes of the row's job does not matter any more."""

    key: Key


@dataclass(frozen=True, slots=True)
class Arrived:
    """Any m members may be lost now."""

    key: Key


@dataclass(frozen=True, slots=True)
class Failed:
    key: Key
    reason: str


@dataclass(frozen=True, slots=True)
class Free:
    """The parity of the snapshot is not needed any more."""

    key: Key


Action = Send | Expect | StartRow | StopRow | Arrived | Failed | Free
