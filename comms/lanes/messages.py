"""What is asked of lanes, and what comes back: sends, receives, the operation that they belong to, a transfer."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass, field

from resilient.comms.lanes.spans import Spans
from resilient.errors import (
    CollectiveFailed,
    CollectiveMismatch,
    CollectiveTimeout,
    PeerGone,
    ReconfigureError,
    UsageError,
)

Piece = tuple[int, int, int]  # path, begin, end


POINT_TO_POINT = 1 << 62  # numbers from here on: operations of two ranks, which are in no order with the others


@dataclass(frozen=True, slots=True)
class Operation:
    """`number` counts a group's operations, from 1; `fingerprint`: what all ranks must agree on (kind, bytes, dtype).

    `expected_s`: how long each path is busy with it by the plan, for the rates; what is not planned is not measured.
    """

    number: int
    fingerprint: str
    expected_s: Mapping[int, float] = field(default_factory=dict)


Name = tuple[int, int]


def name(operation: int, tag: int) -> Name:
    """What fingerprints are known by: messages between two ranks of different tags may have one number."""
    return operation, tag if operation >= POINT_TO_POINT else 0


@dataclass(frozen=True, slots=True)
class Send:
    """All of `content` to `target`. `pieces` cover it, in order, each on a path."""

    target: int
    tag: int
    content: Spans
    pieces: Sequence[Piece]


@dataclass(frozen=True, slots=True)
class Receive:
    """Fill `into` (writable) with what `source` sends under this tag of the same operation. It need not be cut as the
    sender's content is, though what is not has to be copied."""

    source: int
    tag: int
    into: Spans


class Transfer:
    """Done when all that was to be received is there, and all that was to be sent has arrived."""

    def __init__(self) -> None:
        self._future: Future[None] = Future()

    @property
    def done(self) -> bool:
        return self._future.done()

    def wait(self, timeout_s: float | None = None) -> None:
        """Raises what the transfer failed with (CollectiveFailed, CollectiveMismatch); TimeoutError after `timeout_s`,
        which leaves it running."""
        try:
            self._future.result(timeout_s)
        except FutureTimeout:
            if self._future.done():
                raise
            raise TimeoutError(f"the transfer is not done after {timeout_s} s") from None

    def settle(self) -> None:
        """Blocks until it is done or has failed; raises nothing."""
        wait([self._future])

    def add_done_callback(self, call: Callable[[], None]) -> None:
        """Called once, from the thread of the lanes (at once where it is done): must not wait for anything."""
        self._future.add_done_callback(lambda _: call())

    def finish(self, error: Exception | None = None) -> None:
        """By the engine. Again is nothing."""
        if self._future.done():
            return
        if error is None:
            self._future.set_result(None)
        else:
            self._future.set_exception(error)


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a group has failed: the same on all ranks, as it travels. `rank`: whose fault it is, where that is known."""

    kind: str
    text: str
    rank: int | None = None
    host: str | None = None

    def error(self) -> ReconfigureError | UsageError:
        """A new exception each time, for each belongs to a thread's traceback."""
        if self.kind == "mismatch":
            return CollectiveMismatch(self.text)
        kinds = {"gone": PeerGone, "late": CollectiveTimeout}
        return kinds.get(self.kind, CollectiveFailed)(self.text, rank=self.rank, host=self.host)
