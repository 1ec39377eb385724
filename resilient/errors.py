"""Every error of the library, split by what the caller does about it.

    ResilientError
    ├── RetryError                    it is being tried again, or the next save will; training goes on
    │   ├── SnapshotSkipped           this snapshot was not taken: not due, or no buffer was free
    │   ├── LevelFailed (OSError)     a level could not take or give an image
    │   └── AgentLost                 the node's agent is gone; another is being started
    ├── ReconfigureError              a peer is gone: rebuild the group
    │   ├── RankFailed                another rank could not keep its part of a snapshot
    │   └── CollectiveFailed (RuntimeError)  a collective could not be completed; the same on all ranks
    │       ├── PeerGone              a rank is dead, or cannot be reached over any path
    │       └── CollectiveTimeout (TimeoutError)  a rank has not come to the collective in time
    ├── RestoreError                  stored bytes cannot be used as they are
    │   ├── DamagedImage              bytes differ from the digest that was taken when they were sealed
    │   ├── NotACheckpoint            there is something else at that place
    │   ├── NewerFormat               written by a later version of this library
    │   └── LayoutMismatch            the snapshot does not fit the job that asks for it
    └── UsageError                    fix the program or its configuration
        ├── PolicyError (ValueError)  a policy that contradicts itself, or an unknown key
        ├── StateError (TypeError)    a part of the state that cannot be saved
        ├── TornCapture               a tensor changed while it was being copied
        ├── CollectiveMismatch        ranks called different collectives, or the same with other sizes or types
        ├── UrlInUse                  another job is writing to this URL
        └── OverBudget (MemoryError)  an image does not fit the memory budget

A message says what happened, where (rank, step, tensor, path), and what to do.

`Preempted` is no error: it ends the program after a save, with an exit code that launchers know.
"""

__all__ = [
    "AgentLost",
    "CollectiveFailed",
    "CollectiveMismatch",
    "CollectiveTimeout",
    "DamagedImage",
    "LayoutMismatch",
    "LevelFailed",
    "NewerFormat",
    "NotACheckpoint",
    "OverBudget",
    "PeerGone",
    "PolicyError",
    "Preempted",
    "RankFailed",
    "ReconfigureError",
    "ResilientError",
    "RestoreError",
    "RetryError",
    "SnapshotSkipped",
    "StateError",
    "TornCapture",
    "UrlInUse",
    "UsageError",
]


class ResilientError(Exception):
    """Base of all errors that this library raises on purpose."""


class RetryError(ResilientError):
    """Nothing to do: it is tried again by itself, or the next save will do."""


class SnapshotSkipped(RetryError):
    """The snapshot was not taken at this level: not due at this step, or no buffer was free."""


class LevelFailed(RetryError, OSError):
    """A level could not take or give an image (full disk, store out of reach, writer that hangs)."""


class AgentLost(RetryError):
    """The node's agent is gone, and what it held in memory with it; another one is being started."""


class ReconfigureError(ResilientError):
    """A peer is gone: the group has to be rebuilt."""


class RankFailed(ReconfigureError):
    """Another rank could not keep its part of a snapshot, so the snapshot cannot become complete."""


class CollectiveFailed(ReconfigureError, RuntimeError):
    """A collective could not be completed. `rank` and `host` say where the cause is, as far as that is known.

    A RuntimeError as well, which is what torch.distributed raises.
    """

    def __init__(self, message: str, *, rank: int | None = None, host: str | None = None) -> None:
        super().__init__(message)
        self.rank = rank
        self.host = host


class PeerGone(CollectiveFailed):
    """A rank is dead, or cannot be reached over any path."""


class CollectiveTimeout(CollectiveFailed, TimeoutError):
    """A rank is there, but has not come to the collective within the group's timeout."""


class RestoreError(ResilientError):
    """Stored bytes cannot be used as they are."""


class DamagedImage(RestoreError):
    """Bytes differ from the digest that was taken when they were sealed."""


class NotACheckpoint(RestoreError):
    """The place holds something that this library did not write."""


class NewerFormat(RestoreError):
    """The checkpoint was written by a later version of this library."""


class LayoutMismatch(RestoreError):
    """The snapshot does not fit the job that asks for it (world size, tensors, shapes)."""


class UsageError(ResilientError):
    """Fix the program or its configuration."""


class PolicyError(UsageError, ValueError):
    """A policy that contradicts itself, or an unknown key."""


class StateError(UsageError, TypeError):
    """A part of the state that cannot be saved; the message names it."""


class TornCapture(UsageError):
    """A tensor changed while it was being copied; the message names it, `tensors` names all of them."""

    def __init__(self, message: str, tensors: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.tensors = tensors


class CollectiveMismatch(UsageError):
    """Ranks called different collectives, or the same one with other sizes or types. All of them get this error."""


class UrlInUse(UsageError):
    """Another job is writing to this URL."""


class OverBudget(UsageError, MemoryError):
    """An image does not fit the memory budget."""


class Preempted(SystemExit):
    """All ranks have stopped after the same save, as somebody asked them to: `step` is where the job goes on.

    Its `code` is `SAFE` (75, "try again later" in sysexits.h) when the step is durable, or could not be made so and the
    log and `problems` say why: the machines may go. It is `REGROUP` (76) when the step is in memory, for a job that
    starts anew on the same machines.
    """

    SAFE = 75
    REGROUP = 76

    def __init__(self, step: int, code: int, problems: tuple[str, ...] = ()) -> None:
        super().__init__(code)
        self.step = step
        self.problems = problems
