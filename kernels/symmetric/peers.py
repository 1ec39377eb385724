"""How processes of a host come to map one another's memory files, and notice when one of them ends.

Each says in the store which process it is and under which descriptor its file is open; the others open it through
/proc/<pid>/fd, which the kernel allows to the same user only. The file begins with random bytes that the store holds as
well, so no other process that got the number can be taken for it. Nothing listens.
"""

import hmac
import json
import mmap
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from resilient.errors import CollectiveFailed, CollectiveMismatch, CollectiveTimeout, OverBudget, PeerGone, UsageError

_HEAD_BYTES = 4096
_NONCE_BYTES = 32
_POLL_S = 0.002
_PREFIX = "resilient/symmetric"


class Store(Protocol):
    """What is asked of a torch.distributed store."""

    def set(self, key: str, value: str, /) -> Any: ...

    def get(self, key: str, /) -> bytes: ...

    def check(self, keys: list[str], /) -> bool: ...


class Segment:
    """A mapped memory file: its `bytes` (uint8, after the head) and, for the own one, the descriptor."""

    def __init__(self, fd: int, nbytes: int, nonce: str) -> None:
        self.fd, self.nonce = fd, nonce
        mapping = mmap.mmap(fd, _HEAD_BYTES + nbytes)
        self.head = mapping[:_NONCE_BYTES]
        self.bytes: Tensor = torch.frombuffer(mapping, dtype=torch.uint8)[_HEAD_BYTES:]  # keeps the mapping

    def close(self) -> None:
        """Nobody can open it any more; who has mapped it keeps it."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """What a rank says of itself. `place` tells machines and process namespaces apart."""

    place: str
    host: str
    pid: int
    fd: int
    nonce: str
    sizes: tuple[int, ...]


def make_segment(nbytes: int, name: str) -> Segment:
    """New memory, all zero and really there. Raises OverBudget when the system has no room for it."""
    fd = os.memfd_create(f"resilient-{name}"[:200], os.MFD_CLOEXEC)
    try:
        os.posix_fallocate(fd, 0, _HEAD_BYTES + nbytes)
        nonce = secrets.token_bytes(_NONCE_BYTES)
        os.pwrite(fd, nonce, 0)
        return Segment(fd, nbytes, nonce.hex())
    except OSError as error:
        os.close(fd)
        raise OverBudget(
            f"the system has no room for {nbytes} bytes of memory shared among ranks ({error.strerror}); "
            "use smaller operands, or raise the container's memory limit"
        ) from error


def meet(
    store: Store,
    rank: int,
    size: int,
    own: Segment,
    *,
    name: str,
    sizes: tuple[int, ...],
    timeout_s: float,
    waiting: Callable[[], None],
) -> list[Member]:
    """All ranks' words about themselves. Blocks; `waiting` is called now and then and may raise.

    Raises CollectiveTimeout; CollectiveMismatch and UsageError, these on all ranks.
    """
    prefix = f"{_PREFIX}/{name}"
    me = Member(place=_place(), host=socket.gethostname(), pid=os.getpid(), fd=own.fd, nonce=own.nonce, sizes=sizes)
    store.set(f"{prefix}/{rank}", json.dumps(asdict(me)))
    end = time.monotonic() + timeout_s
    members = [_read(store, f"{prefix}/{other}", other, name, end, timeout_s, waiting) for other in range(size)]
    _check_places(members)
    check_sizes([member.sizes for member in members])
    return members


def meet_on_devices(
    store: Store,
    rank: int,
    size: int,
    *,
    name: str,
    sizes: tuple[int, ...],
    timeout_s: float,
    waiting: Callable[[], None],
) -> None:
    """As `meet`, where ranks do not map files of one another and may be on other hosts."""
    store.set(f"{_PREFIX}/{name}/{rank}", json.dumps(sizes))
    end = time.monotonic() + timeout_s
    keys = [f"{_PREFIX}/{name}/{other}" for other in range(size)]
    said = [_get(store, key, other, name, end, timeout_s, waiting) for other, key in enumerate(keys)]
    check_sizes([tuple(json.loads(one)) for one in said])


def open_segments(members: Sequence[Member], rank: int, own: Segment) -> list[Segment]:
    """All ranks' memory, mapped. Raises PeerGone for one that has ended meanwhile."""
    return [own if other == rank else _open(member, other, own) for other, member in enumerate(members)]


def _open(member: Member, rank: int, own: Segment) -> Segment:
    try:
        fd = os.open(f"/proc/{member.pid}/fd/{member.fd}", os.O_RDWR | os.O_CLOEXEC)
    except PermissionError as error:
        raise UsageError(
            f"the memory of rank {rank} (process {member.pid}) cannot be opened: run all ranks as one user"
        ) from error
    except (FileNotFoundError, ProcessLookupError) as error:
        raise PeerGone(f"rank {rank} (process {member.pid}) is gone", rank=rank, host=member.host) from error
    except OSError as error:
        raise OverBudget(
            f"the memory of rank {rank} cannot be opened ({error.strerror}); raise the limit of open files"
        ) from error
    try:
        found = Segment(fd, len(own.bytes), member.nonce)
    except ValueError as error:  # shorter than what it should be: another file
        raise PeerGone(f"rank {rank} (process {member.pid}) is gone", rank=rank, host=member.host) from error
    except OSError as error:
        raise OverBudget(
            f"the system does not map {len(own.bytes)} bytes of rank {rank}'s memory ({error.strerror}); use smaller "
            "operands, or raise the limit of address space or mappings"
        ) from error
    finally:
        os.close(fd)
    found.fd = -1
    if not hmac.compare_digest(found.head, bytes.fromhex(member.nonce)):
        raise PeerGone(f"process {member.pid} is not rank {rank} any more", rank=rank, host=member.host)
    return found


@contextmanager
def outcome_told(store: Store, rank: int, name: str) -> Iterator[None]:
    """Tells the other ranks what is raised inside, or that nothing is."""
    said = ""
    try:
        yield
    except Exception as error:
        said = str(error)
        raise
    finally:
        store.set(f"{_PREFIX}/{name}/{rank}/opened", said)


def await_outcomes(
    store: Store,
    size: int,
    *,
    name: str,
    timeout_s: float,
    waiting: Callable[[], None],
    ended: Callable[[int], bool] = lambda rank: False,
) -> None:
    """Waits for all ranks. Raises CollectiveFailed when one could not open it; PeerGone, CollectiveTimeout."""
    end = time.monotonic() + timeout_s
    found = []
    for rank in range(size):
        key = f"{_PREFIX}/{name}/{rank}/opened"

        def check(rank: int = rank, key: str = key) -> None:
            waiting()
            if ended(rank) and not store.check([key]):
                raise PeerGone(f"rank {rank} is gone: it ended before all had opened {name!r}", rank=rank)

        found.append(_get(store, key, rank, name, end, timeout_s, check).decode())
    for rank, said in enumerate(found):
        if said:
            raise CollectiveFailed(f"rank {rank} cannot open symmetric memory {name!r}: {said}", rank=rank)


def _read(
    store: Store, key: str, rank: int, name: str, end: float, timeout_s: float, waiting: Callable[[], None]
) -> Member:
    said = json.loads(_get(store, key, rank, name, end, timeout_s, waiting))
    return Member(**{**said, "sizes": tuple(said["sizes"])})


def _get(
    store: Store, key: str, rank: int, name: str, end: float, timeout_s: float, waiting: Callable[[], None]
) -> bytes:
    while not store.check([key]):
        waiting()
        if time.monotonic() > end:
            raise CollectiveTimeout(
                f"rank {rank} has not opened symmetric memory {name!r} within {timeout_s:g} s", rank=rank
            )
        time.sleep(_POLL_S)
    return store.get(key)


def _check_places(members: Sequence[Member]) -> None:
    for rank, member in enumerate(members):
        if member.place != members[0].place:
            raise UsageError(
                f"symmetric memory needs all ranks on one host and in one PID namespace: rank {rank} is on "
                f"{member.host}, rank 0 on {members[0].host}"
            )


def check_sizes(sizes: Sequence[tuple[int, ...]]) -> None:
    """Raises CollectiveMismatch when ranks want different ones."""
    for rank, wanted in enumerate(sizes):
        if wanted != sizes[0]:
            raise CollectiveMismatch(
                f"ranks want symmetric memory of different sizes: rank {rank} of {wanted} (bytes, words), "
                f"rank 0 of {sizes[0]}; their calls or shapes differ"
            )


def _place() -> str:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {os.stat('/proc/self/ns/pid').st_ino}"
