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
import select
import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from resilient.errors import CollectiveMismatch, CollectiveTimeout, OverBudget, PeerGone, UsageError
from resilient.kernels.symmetric.memory import Cause

_HEAD_BYTES = 4096
_NONCE_BYTES = 32
_POLL_S = 0.002


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
    prefix = f"resilient/symmetric/{name}"
    me = Member(place=_place(), host=socket.gethostname(), pid=os.getpid(), fd=own.fd, nonce=own.nonce, sizes=sizes)
    store.set(f"{prefix}/{rank}", json.dumps(asdict(me)))
    end = time.monotonic() + timeout_s
    members = [_read(store, f"{prefix}/{other}", other, name, end, timeout_s, waiting) for other in range(size)]
    _check(members)
    return members


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
    except OSError as error:
        raise PeerGone(f"rank {rank} (process {member.pid}) is gone", rank=rank, host=member.host) from error
    try:
        found = Segment(fd, len(own.bytes), member.nonce)
    except ValueError as error:  # shorter than what it should be: another file
        os.close(fd)
        raise PeerGone(f"rank {rank} (process {member.pid}) is gone", rank=rank, host=member.host) from error
    found.close()
    if not hmac.compare_digest(found.head, bytes.fromhex(member.nonce)):
        raise PeerGone(f"process {member.pid} is not rank {rank} any more", rank=rank, host=member.host)
    return found


def _read(
    store: Store, key: str, rank: int, name: str, end: float, timeout_s: float, waiting: Callable[[], None]
) -> Member:
    while not store.check([key]):
        waiting()
        if time.monotonic() > end:
            raise CollectiveTimeout(
                f"rank {rank} has not opened symmetric memory {name!r} within {timeout_s:g} s", rank=rank
            )
        time.sleep(_POLL_S)
    said = json.loads(store.get(key))
    return Member(**{**said, "sizes": tuple(said["sizes"])})


def _check(members: Sequence[Member]) -> None:
    for rank, member in enumerate(members):
        if member.place != members[0].place:
            raise UsageError(
                f"symmetric memory needs all ranks on one host and in one PID namespace: rank {rank} is on "
                f"{member.host}, rank 0 on {members[0].host}"
            )
        if member.sizes != members[0].sizes:
            raise CollectiveMismatch(
                f"ranks want symmetric memory of different sizes: rank {rank} of {member.sizes} (bytes, words), "
                f"rank 0 of {members[0].sizes}; their calls or shapes differ"
            )


def _place() -> str:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {os.stat('/proc/self/ns/pid').st_ino}"


class Watch:
    """Notices the end of other ranks' processes at once. `start` gives the thread its callback."""

    def __init__(self, members: Sequence[Member], rank: int) -> None:
        """Raises PeerGone for a process that is not there."""
        self._ranks: dict[int, int] = {}
        self._wake, self._end = os.pipe2(os.O_CLOEXEC)
        self._fds = [self._wake, self._end]
        self._thread: threading.Thread | None = None
        for other, member in enumerate(members):
            if other != rank:
                self._add(other, member)

    def _add(self, rank: int, member: Member) -> None:
        try:
            self._fds.append(os.pidfd_open(member.pid))
        except ProcessLookupError as error:
            self._close()
            raise PeerGone(f"rank {rank} (process {member.pid}) is gone", rank=rank, host=member.host) from error
        self._ranks[self._fds[-1]] = rank

    def start(self, gone: Callable[[int], None]) -> None:
        """`gone(word)` is called from a thread when a process has ended, with the failure word for it."""
        self._thread = threading.Thread(target=self._run, args=(gone,), name="resilient-symmetric", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread. Safe to repeat."""
        thread, self._thread = self._thread, None
        if thread is not None:
            with suppress(OSError):
                os.write(self._end, b"x")
            thread.join()
        self._close()

    def _run(self, gone: Callable[[int], None]) -> None:
        poll = select.poll()
        for fd in (self._wake, *self._ranks):
            poll.register(fd, select.POLLIN)
        while True:
            ready = [fd for fd, _ in poll.poll()]
            if self._wake in ready:
                break
            for fd in ready:
                poll.unregister(fd)
                gone(Cause.GONE.word(self._ranks[fd]))

    def _close(self) -> None:
        fds, self._fds = self._fds, []
        for fd in fds:
            os.close(fd)
