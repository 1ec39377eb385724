"""Memory files in huge pages: they lie in a tmpfs of this process alone, which is mounted nowhere.

A memory file of `memfd_create` gets pages of 4 KiB unless an administrator has set `shmem_enabled`, which hardly any
does. A tmpfs says for itself what it wants (`huge=`, tmpfs(5)), and it can be had without a mount point (`fsopen`,
`fsmount`; Linux 5.2). A process that may not mount does so in a user namespace, by a child that hands over the
descriptor and ends. Copies then take no page faults and making the pages takes a tenth of the time. Where neither is
allowed (many containers), there are small pages, which costs speed and nothing else.
"""

import ctypes
import os
import socket
import subprocess
import sys
from contextlib import suppress
from functools import cache
from itertools import count

HUGE_BYTES = 1 << 21  # of a huge page on x86-64, and on arm64 with pages of 4 KiB
_FSOPEN, _FSCONFIG, _FSMOUNT = 430, 431, 432  # the same number on all machines
_CLOEXEC = 1
_SET_STRING, _CREATE = 1, 6
_NEW_USER, _NEW_MOUNTS = 0x10000000, 0x00020000
_OPTIONS = {"huge": "within_size", "size": "0"}  # 0: as much as there is; whoever asks has counted it before
_WAIT_S = 10.0
_libc = ctypes.CDLL(None, use_errno=True)
_numbers = count()


def huge_file(name: str) -> int | None:
    """A new empty file without a name, for reading and writing; None where huge pages are not to be had.

    Unlike a file of `memfd_create` it cannot be sealed: whoever has a descriptor for writing can make it shorter.
    """
    folder = _folder()
    if folder is None:
        return None
    name = f"{name}-{next(_numbers)}"
    try:
        file = os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=folder)
        os.unlink(name, dir_fd=folder)  # the name stays to be seen in /proc/PID/maps
    except OSError:
        return None
    return file


@cache
def _folder() -> int | None:
    """The root of the tmpfs. The first call may take as long as Python takes to start."""
    with suppress(OSError):
        return _mounted()
    with suppress(OSError):
        return _mounted_by_a_child()
    return None


def _mounted() -> int:
    """Raises OSError where this process may not, or the kernel cannot."""
    context = _checked(_libc.syscall(_FSOPEN, b"tmpfs", _CLOEXEC))
    try:
        for key, value in _OPTIONS.items():
            _checked(_libc.syscall(_FSCONFIG, context, _SET_STRING, key.encode(), value.encode(), 0))
        _checked(_libc.syscall(_FSCONFIG, context, _CREATE, None, None, 0))
        return _checked(_libc.syscall(_FSMOUNT, context, _CLOEXEC, 0))
    finally:
        os.close(context)


def _mounted_by_a_child() -> int:
    """This process keeps its own namespaces: only the child leaves them."""
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            words = [sys.executable, "-I", "-S", __file__, str(theirs.fileno())]
            child = subprocess.Popen(words, pass_fds=[theirs.fileno()], stderr=subprocess.DEVNULL)
        ours.settimeout(_WAIT_S)
        try:
            _, files, _, _ = socket.recv_fds(ours, 1, 1)
        finally:
            child.kill()
            child.wait()
    if not files:
        raise PermissionError("no user namespace, or none that may mount")
    os.set_inheritable(files[0], False)
    return files[0]


def _hand_over(to: int) -> None:
    """The child's life. Its user is mapped to itself, so files in the tmpfs are the parent's own."""
    user, group = os.getuid(), os.getgid()
    _checked(_libc.unshare(_NEW_USER | _NEW_MOUNTS))
    for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)
    with socket.socket(fileno=to) as sock:
        socket.send_fds(sock, [b"."], [_mounted()])


def _checked(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


if __name__ == "__main__":
    _hand_over(int(sys.argv[1]))
