"""Where the agent of one node and run is found: a private folder with its socket, its token and its locks.

    <runtime dir>/resilient-<uid>/<16 hex>/
        agent.sock   the socket          token   what a client must know; the folder is readable by its owner only
        lock         held by whoever starts an agent          alive   held by the agent as long as it lives
        agent.log    what the agent did, bounded

The 16 digits stand for (run id, URL, node), so each run on each node has its own. `address_of` is the one place that
reads the environment.
"""

import fcntl
import os
import socket
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from resilient.errors import UsageError

SUN_PATH_BYTES = 107


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """The folder of one agent. Values only; nothing is made until `make_folder`."""

    folder: Path

    @property
    def socket(self) -> Path:
        return self.folder / "agent.sock"

    @property
    def token(self) -> Path:
        return self.folder / "token"

    @property
    def lock(self) -> Path:
        return self.folder / "lock"

    @property
    def alive(self) -> Path:
        return self.folder / "alive"

    @property
    def log(self) -> Path:
        return self.folder / "agent.log"


def address_of(
    run_id: str, url: str | None, node: str | None = None, environment: Mapping[str, str] | None = None
) -> Address:
    """The address of the agent for this run on this node. `node` is RESILIENT_NODE or the host name if not given.

    Raises UsageError when the path is too long for a Unix socket.
    """
    environment = os.environ if environment is None else environment
    node = node or node_name(environment)
    key = sha256("\0".join((run_id, url or "", node)).encode()).hexdigest()[:16]
    address = Address(folder=runtime_folder(environment) / key)
    if len(os.fsencode(address.socket)) > SUN_PATH_BYTES:
        raise UsageError(
            f"{address.socket} is too long for a socket ({SUN_PATH_BYTES} bytes at most); "
            "set RESILIENT_RUNTIME_DIR to a folder with a shorter path, on this node"
        )
    return address


def node_name(environment: Mapping[str, str] | None = None) -> str:
    """This machine's name: RESILIENT_NODE, or the host name."""
    return (os.environ if environment is None else environment).get("RESILIENT_NODE") or socket.gethostname()


def runtime_folder(environment: Mapping[str, str]) -> Path:
    """Below which everything of this user lies on this node; not made here."""
    base = environment.get("RESILIENT_RUNTIME_DIR") or environment.get("XDG_RUNTIME_DIR") or "/tmp"
    return Path(base).absolute() / f"resilient-{os.getuid()}"


def make_folder(address: Address) -> None:
    """Make the folder, private to this user. Safe to repeat. Raises UsageError if another user has made it."""
    address.folder.parent.parent.mkdir(parents=True, exist_ok=True)
    for folder in (address.folder.parent, address.folder):
        try:
            folder.mkdir(mode=0o700)
        except FileExistsError:
            check_private(folder)


def make_private(folder: Path) -> None:
    """Make a folder, and those above it, private to this user. Safe to repeat. Raises UsageError as `check_private`."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    check_private(folder)


def check_private(folder: Path) -> None:
    """Raises UsageError unless the folder is this user's, and nobody else may enter it."""
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise UsageError(
            f"{folder} is not a folder private to user {os.getuid()} (it has owner {found.st_uid} and mode "
            f"{stat.S_IMODE(found.st_mode):o}); remove it, or set RESILIENT_RUNTIME_DIR to another place"
        )


def take_lock(path: Path) -> int | None:
    """An exclusive lock on a file, as a descriptor for `drop_lock`; None if another process has it. Does not block.

    Raises FileNotFoundError when the folder went away meanwhile: make it again.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        same = os.path.samestat(os.fstat(fd), os.stat(path))  # else we locked a file that was removed meanwhile
    except BlockingIOError:
        os.close(fd)
        return None
    except FileNotFoundError:
        os.close(fd)
        raise
    if not same:
        os.close(fd)
        return None
    return fd


def drop_lock(fd: int) -> None:
    """Give a lock back, also for children that were forked meanwhile and hold the descriptor."""
    fcntl.flock(fd, fcntl.LOCK_UN)
    os.close(fd)
