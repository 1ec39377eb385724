"""Which process wrote something: enough to tell, later and on the same host, whether it is still alive.

Used for left-over temporary files (`files.py`) and for claims on a URL (`claim.py`). A process number alone is not
enough: numbers are used again, and containers on one host each have numbers of their own; so host, boot, number space
and start time count too.
"""

import os
import socket
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2s
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessId:
    """One process, for ever. `boot_id` names the boot of the kernel and the space of process numbers within it."""

    host: str
    boot_id: str
    pid: int
    started: int

    @property
    def host_tag(self) -> str:
        """Eight hexadecimal digits for host and number space; they outlast a reboot."""
        space = self.boot_id.partition("/")[2]
        return blake2s(f"{self.host}/{space}".encode(), digest_size=4).hexdigest()


def this_process() -> ProcessId:
    """The calling process. Reads /proc; never blocks."""
    pid = os.getpid()
    host, boot_id = _host()
    return ProcessId(host=host, boot_id=boot_id, pid=pid, started=_start_time(pid) or 0)


def is_dead(pid: int, started: int) -> bool:
    """Whether the process with this number and start time is gone from this host; in doubt it is not."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return True
    except PermissionError:
        pass  # it lives and belongs to somebody else
    now = _start_time(pid)
    return now is not None and now != started


@lru_cache(maxsize=1)
def _host() -> tuple[str, str]:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return socket.gethostname(), f"{boot}/{os.readlink('/proc/self/ns/pid')}"


def _start_time(pid: int) -> int | None:
    """Clock ticks from boot to the start of a process; -1 for one that only waits to be reaped; None if hidden."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()  # the name before it may hold spaces and brackets
    return -1 if fields[0] in "ZX" else int(fields[19])
