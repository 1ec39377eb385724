"""Anonymous shared memory that the agent owns and trainers map: one memory file for each slot.

In huge pages where they are to be had (`huge_pages.py`). Else the file is sealed against resizing, so that no trainer
can take pages away from under the agent; in huge pages one that means to can, and ends the agent by it, which it may do
by a signal as well: they are of one user. First touch of a page is slow, so `prefault` walks over new memory in the
background. Freed by dropping the last reference: a mapping cannot be closed while a reader or a stuck writer still
looks at it.
"""

import ctypes
import fcntl
import mmap
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

from resilient.checkpoint.agent.huge_pages import HUGE_BYTES, huge_file
from resilient.errors import OverBudget

PAGE_BYTES = mmap.PAGESIZE
_PREFAULT_BYTES = 8 << 20
_MADV_POPULATE_WRITE = 23  # Linux 5.14; older kernels refuse it and pages are made on first touch
_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def whole_pages(size_bytes: int) -> int:
    return -(-size_bytes // PAGE_BYTES) * PAGE_BYTES


def check_room(wanted_bytes: int, available_bytes: int) -> None:
    """Raise OverBudget for memory that the node does not have: the kernel gives it now and kills somebody later."""
    if wanted_bytes > available_bytes:
        raise OverBudget(
            f"{wanted_bytes} bytes of memory are wanted for images and this node has {available_bytes} left; "
            "lower memory_budget, run fewer ranks on the node, or raise the container's memory limit"
        )


def available_bytes(meminfo: Path = Path("/proc/meminfo"), group: Path = Path("/sys/fs/cgroup")) -> int:
    """What can still be had, of the machine's memory and of the container's limit if there is one."""
    found = re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text())
    left = int(found[1]) << 10 if found else sys.maxsize
    try:
        limit, used = ((group / name).read_text().strip() for name in ("memory.max", "memory.current"))
        reclaimable = re.search(r"^inactive_file (\d+)$", (group / "memory.stat").read_text(), re.MULTILINE)
    except OSError:
        return left  # no container, or an older kind of control group
    if limit == "max":
        return left
    return min(left, int(limit) - int(used) + (int(reclaimable[1]) if reclaimable else 0))


class Memory:
    """One piece of shared memory. `view` is writable and page-aligned; `fd` is the memory file."""

    def __init__(self, capacity: int, name: str) -> None:
        """Blocks only shortly: pages come later. Raises OverBudget when the system has no room for it."""
        self.fd, sealed = _memory_file(capacity, name)
        try:
            os.ftruncate(self.fd, capacity)
            if sealed:
                seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
                fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, seals)
            mapping = mmap.mmap(self.fd, capacity)
        except OSError as error:
            os.close(self.fd)
            raise OverBudget(
                f"the system has no room for {capacity} bytes of shared memory ({error.strerror}); "
                "lower memory_budget, or raise the container's memory limit"
            ) from error
        advise_huge_pages(mapping)
        self.capacity = capacity
        self.view = memoryview(mapping)

    def read_only_fd(self) -> int:
        """A new descriptor that can be mapped for reading only."""
        return os.open(f"/proc/self/fd/{self.fd}", os.O_RDONLY | os.O_CLOEXEC)

    def missing_bytes(self) -> int:
        """How much of it has no pages yet."""
        return max(0, self.capacity - os.fstat(self.fd).st_blocks * 512)

    def drop(self) -> None:
        """Give the memory back as soon as nobody looks at it any more. Safe to repeat."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
        self.view = memoryview(b"")


def _memory_file(capacity: int, name: str) -> tuple[int, bool]:
    """An empty file in memory, and whether it can be sealed."""
    file = huge_file(f"resilient-{name}") if capacity >= HUGE_BYTES else None
    if file is not None:
        return file, False
    try:
        return os.memfd_create(f"resilient-{name}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING), True
    except OSError as error:
        raise OverBudget(
            f"the system gives no memory file ({error.strerror}); raise its limit of open files"
        ) from error


def private_memory(nbytes: int) -> memoryview:
    """Page-aligned memory of this process alone, all zeros, in huge pages where they are to be had."""
    mapping = mmap.mmap(-1, max(1, nbytes), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    advise_huge_pages(mapping)
    return memoryview(mapping)[:nbytes]


def advise_huge_pages(mapping: mmap.mmap) -> None:
    """Ask for huge pages; most systems decline for shared memory, which costs speed and nothing else."""
    try:
        mapping.madvise(mmap.MADV_HUGEPAGE)
    except OSError:
        return


def address_of_view(view: memoryview) -> int:
    """The address of the first byte of a writable view."""
    return ctypes.addressof(ctypes.c_char.from_buffer(view))


def prefault(view: memoryview, stopped: Callable[[], bool]) -> None:
    """Make the pages of a mapping present, without changing a byte. Blocks; releases the interpreter lock.

    From the end to the beginning: who fills it meanwhile begins at the beginning, and two threads that make the same
    pages are slower than one. Stops early when `stopped()` says so, or when the kernel will not: pages are then made on
    first touch.
    """
    base = address_of_view(view)
    for start in reversed(range(0, len(view), _PREFAULT_BYTES)):
        size = min(_PREFAULT_BYTES, len(view) - start)
        if stopped() or _libc.madvise(base + start, size, _MADV_POPULATE_WRITE) != 0:
            return
