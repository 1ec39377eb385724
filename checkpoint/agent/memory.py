"""Anonymous shared memory that the agent owns and trainers map: one memory file for each slot.

The file is sealed against resizing, so that no trainer can take pages away from under the agent. First touch of a page
is slow, so `prefault` walks over new memory in the background. Freed by dropping the last reference: a mapping cannot
be closed while a reader or a stuck writer still looks at it.
"""

import ctypes
import fcntl
import mmap
import os
from collections.abc import Callable

from resilient.errors import OverBudget

PAGE_BYTES = mmap.PAGESIZE
_PREFAULT_BYTES = 64 << 20
_MADV_POPULATE_WRITE = 23  # Linux 5.14; older kernels refuse it and pages are made on first touch
_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def whole_pages(size_bytes: int) -> int:
    return -(-size_bytes // PAGE_BYTES) * PAGE_BYTES


class Memory:
    """One piece of shared memory. `view` is writable and page-aligned; `fd` is the memory file."""

    def __init__(self, capacity: int, name: str) -> None:
        """Blocks only shortly: pages come later. Raises OverBudget when the system has no room for it."""
        try:
            self.fd = os.memfd_create(f"resilient-{name}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        except OSError as error:
            raise OverBudget(
                f"the system gives no memory file ({error.strerror}); raise its limit of open files"
            ) from error
        try:
            os.ftruncate(self.fd, capacity)
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
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

    def drop(self) -> None:
        """Give the memory back as soon as nobody looks at it any more. Safe to repeat."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
        self.view = memoryview(b"")


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

    Stops early when `stopped()` says so, or when the kernel will not: pages are then made on first touch.
    """
    base = address_of_view(view)
    for start in range(0, len(view), _PREFAULT_BYTES):
        size = min(_PREFAULT_BYTES, len(view) - start)
        if stopped() or _libc.madvise(base + start, size, _MADV_POPULATE_WRITE) != 0:
            return
