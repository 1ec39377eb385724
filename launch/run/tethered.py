"""Becomes a worker that ends with its launcher: `python tethered.py LAUNCHER_PID PROGRAM [its arguments]`.

A launcher that is killed can end nobody. Its workers would train on, unseen, and be in the way of the same command
started again; so the kernel kills them at that moment (prctl(2), PR_SET_PDEATHSIG; exec keeps it). Agents are children
of workers and are not meant: they keep the memory. A script of its own, which imports nothing that takes time.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main(launcher: int, command: list[str]) -> None:
    """Does not return. Exit code 127 where there is no such program, 126 where it cannot be run."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != launcher:  # it has gone just before
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        os.execvp(command[0], command)
    except OSError as error:
        print(f"resilient run: {command[0]} cannot be run: {error.strerror}", file=sys.stderr)
        sys.exit(127 if isinstance(error, FileNotFoundError) else 126)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
