"""The worker processes of this node in one life of the job: how they have ended, signals to them, their end.

Over a context of torch's elastic, which makes them and looks after their logs. Its own waiting is not used: it ends all
others, by force after half a minute, as soon as one has ended, also when all are about to stop by agreement.
"""

import signal
import time

from torch.distributed.elastic.multiprocessing import PContext
from torch.distributed.elastic.multiprocessing.api import SubprocessContext

_POLL_S = 0.02
_KILLED_S = 30


class Workers:
    """`first_rank`: the global rank of the first of them. Used on the launcher's one thread."""

    def __init__(self, context: PContext, first_rank: int) -> None:
        assert isinstance(context, SubprocessContext)  # `options.py` takes care of it
        self._context = context
        self._first_rank = first_rank

    def exits(self) -> dict[int, int]:
        """The exit codes of those that have ended, by rank; negative for signals."""
        codes = {
            self._first_rank + local: handler.proc.poll()
            for local, handler in self._context.subprocess_handlers.items()
        }
        return {rank: code for rank, code in codes.items() if code is not None}

    def all_ended(self) -> bool:
        return len(self.exits()) == len(self._context.subprocess_handlers)

    def pid(self, rank: int) -> int:
        return int(self._context.subprocess_handlers[rank - self._first_rank].proc.pid)

    def error_file(self, rank: int) -> str:
        """Where the worker may have left what went wrong, if it uses torch's `record`."""
        return self._context.error_files[rank - self._first_rank]

    def send(self, signal_number: int) -> None:
        """To each that runs; not to its children, which end with it or handle their own signals."""
        for handler in self._context.subprocess_handlers.values():
            if handler.proc.poll() is None:
                handler.proc.send_signal(signal_number)

    def end(self, *, quiet_s: float, patience_s: float) -> None:
        """Return when none runs. They may end by themselves for `quiet_s`, are asked, and after `patience_s` killed.

        Blocks that long, and for a process that the kernel holds fast up to half a minute more.
        """
        if not self._wait(quiet_s):
            self.send(signal.SIGTERM)
            self._wait(patience_s)
        self._context.close(signal.SIGKILL, _KILLED_S)  # their groups; and the threads that copy logs

    def _wait(self, seconds: float) -> bool:
        end = time.monotonic() + seconds
        while not self.all_ended():
            if time.monotonic() > end:
                return False
            time.sleep(_POLL_S)
        return True
