"""Runs one launcher from its command line to its exit code, and leaves nothing behind.

parse ──► claim the run on this node ──► rendezvous ──► `Launcher.supervise` ──► close, clean up
"""

import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.rendezvous import RendezvousError

from resilient.checkpoint.agent.address import drop_lock, node_name, take_lock
from resilient.launch.run.identity import claimed
from resilient.launch.run.launcher import Launcher
from resilient.launch.run.notice import Notice
from resilient.launch.run.options import Settings, parse
from resilient.launch.run.rendezvous import open_rendezvous
from resilient.launch.run.report import Reporter

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGQUIT)
_SHARED_MEMORY = "/dev/shm"  # so that no step waits for a disk, whatever /tmp is
_PREFIX, _ALIVE = "resilient-run-", "alive"
_YOUNG_S = 60.0  # a folder of another launcher that has not locked it yet
_FAREWELL_S = 3.0  # nodes that wait look about every second whether the job has ended


def run(arguments: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run the job on this node; returns the exit code. Blocks; on the main thread, whose signal handlers it sets.

    Raises UsageError, PolicyError for what cannot be; LevelFailed when the nodes cannot meet.
    """
    with _scratch() as scratch:
        settings = parse(arguments, environment, scratch)
        with claimed(settings.config.run_id, environment):
            return _launch(settings, scratch)


@contextmanager
def _scratch() -> Iterator[Path]:
    """A private folder on memory, for as long as this launcher lives; removes those of launchers that were killed."""
    base = Path(_SHARED_MEMORY if os.access(_SHARED_MEMORY, os.W_OK) else tempfile.gettempdir())
    for left in base.glob(f"{_PREFIX}*"):
        with suppress(OSError):  # another user's, or just gone
            if time.time() - left.stat().st_mtime > _YOUNG_S and (lock := take_lock(left / _ALIVE)) is not None:
                shutil.rmtree(left, ignore_errors=True)
                drop_lock(lock)
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=base))
    lock = take_lock(folder / _ALIVE)
    assert lock is not None
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        drop_lock(lock)


def _launch(settings: Settings, scratch: Path) -> int:
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGQUIT"  # it wants one; all are ours in a moment
    notice = Notice({*settings.stop_signals, *_SIGNALS})
    notice.install()
    if settings.log_dir is not None:
        settings.log_dir.mkdir(parents=True, exist_ok=True)
    reporter = Reporter(node_name(), settings.log_dir)
    handler, serves = open_rendezvous(settings.config, scratch)
    launcher = Launcher(settings, handler, notice, reporter, scratch)
    closes = True
    try:
        ending = launcher.supervise()
        closes = ending.closes
        return ending.exit_code
    except SignalException as error:  # torch's handlers are there for a moment while workers are being started
        code = 128 + int(error.sigval)
        text = f"{signal.Signals(error.sigval).name} on {node_name()} while workers were being started: they are ended"
        reporter.tell("stopped", f"{text} (exit code {code})", {"exit_code": code}, own=True)
        return code
    finally:
        launcher.end()
        if closes:
            with suppress(RendezvousError, RuntimeError):  # its store may have gone with its node
                handler.shutdown()
                if serves and settings.config.max_nodes > 1:
                    time.sleep(_FAREWELL_S)
