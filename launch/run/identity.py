"""The name that a run keeps over its restarts, and the claim of a launcher on that name on its node.

The name finds the memory again (an agent serves one run), so the same command must get the same name the next time it
is started: not torchrun's random one, and not "none", which all jobs would share.
"""

import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path

from resilient.checkpoint.agent.address import address_of, drop_lock, make_folder, take_lock
from resilient.errors import LevelFailed, UsageError

_TOKEN = "RESILIENT_TOKEN"
_LOCK = "launcher"


def run_id_of(given: str | None, command: Sequence[str], folder: str, environment: Mapping[str, str]) -> str:
    """The first of these that there is: `given` (--rdzv-id, unless "none"); SLURM's job, which a requeued one keeps;
    one made from the command (script and its arguments) and the folder it is run in.
    """
    if given and given != "none":
        return given
    if job := environment.get("SLURM_JOB_ID"):
        return job
    return f"run-{digest_of(command, folder)}"


def digest_of(command: Sequence[str], folder: str) -> str:
    """16 digits that stand for a script with its arguments, run in a folder."""
    return sha256("\0".join((folder, *command)).encode()).hexdigest()[:16]


def token_of(file: str | None, environment: Mapping[str, str]) -> str | None:
    """The secret that the job's agents share: from the file, which must be private, or RESILIENT_TOKEN; else None.

    Raises UsageError for a file that others can read, or that holds nothing.
    """
    if file is None:
        return environment.get(_TOKEN) or None
    try:
        mode = os.stat(file).st_mode
        token = Path(file).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--token-file {file} cannot be read: {error}") from error
    if mode & 0o077:
        raise UsageError(f"--token-file {file} can be read by others; chmod 600 {file}")
    if not token:
        raise UsageError(f"--token-file {file} is empty; put a long random text into it")
    return token


def new_token() -> str:
    """A secret that nobody can guess."""
    return secrets.token_hex(32)


@contextmanager
def claimed(run_id: str, environment: Mapping[str, str]) -> Iterator[None]:
    """Be the one launcher of this run on this node.

    Raises UsageError, which names the other's process, when there is one already.
    """
    address = address_of(run_id, _LOCK, environment=environment)
    path = address.folder / _LOCK
    lock = None
    for _ in range(10):  # one that ends removes the folder, perhaps just now
        with suppress(FileNotFoundError):
            make_folder(address)
            lock = take_lock(path)
            if lock is not None or path.read_text():
                break
    if lock is None:
        raise _taken(run_id, path)
    try:
        os.ftruncate(lock, 0)
        os.pwrite(lock, str(os.getpid()).encode(), 0)
        yield
    finally:
        with suppress(OSError):
            path.unlink()
            address.folder.rmdir()
            address.folder.parent.rmdir()
        drop_lock(lock)


def _taken(run_id: str, path: Path) -> Exception:
    try:
        holder = path.read_text()
    except OSError:
        return LevelFailed(f"{path} could not be locked: remove its folder if no job runs, and start again")
    return UsageError(
        f"the run {run_id!r} is already running on this node, under process {holder or '?'}; give this job another "
        "name with --rdzv-id, or, if this is another node of the same job on one machine, set RESILIENT_NODE"
    )
