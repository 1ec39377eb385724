"""The agent process: `python -m resilient.checkpoint.agent <folder>`. Trainers start it by themselves.

Stages: detach (a child of init, in a session of its own), log to a bounded file, wait for an earlier agent of the
folder to be gone, serve. The starting process ends when the agent serves, or says on stderr why it does not.
"""

import argparse
import contextlib
import faulthandler
import logging
import os
import signal
import sys
from collections.abc import Callable
from logging.handlers import RotatingFileHandler
from pathlib import Path

from resilient.checkpoint.agent.address import Address, make_folder
from resilient.checkpoint.agent.server import Agent

LOG_BYTES = 1 << 20
NICE = 5
_READY = "ready"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m resilient.checkpoint.agent", description=__doc__)
    parser.add_argument("folder", type=Path, help="the agent's folder; made if need be")
    parser.add_argument("--patience", type=float, default=30.0, help="seconds to wait for an earlier agent to end")
    parser.add_argument(
        "--foreground", action="store_true", help="do not detach; SIGTERM: end once the trainers have left"
    )
    options = parser.parse_args(arguments)
    address = Address(folder=options.folder.absolute())
    if options.foreground:
        _serve(address, options.patience, on_ready=lambda: None, patient=True)
        return 0
    return _detach(address, options.patience)


def _detach(address: Address, patience_s: float) -> int:
    """Fork; the child becomes the agent, the parent returns when it serves."""
    reading, writing = os.pipe()
    if os.fork() == 0:
        os.close(reading)
        _become_agent(address, patience_s, writing)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        answer = pipe.read()
    if answer == _READY:
        return 0
    print(answer or f"it died before it served; see {address.log}", file=sys.stderr)
    return 1


def _become_agent(address: Address, patience_s: float, starter: int) -> None:
    """The child's life. Never returns."""

    def report(message: str) -> None:
        os.write(starter, message.encode())
        os.close(starter)

    status, ready = 1, False
    try:
        os.setsid()
        nothing = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1, 2):  # the starter's pipes end with the starter
            os.dup2(nothing, fd)
        os.close(nothing)

        def on_ready() -> None:
            nonlocal ready
            ready = True
            report(_READY)

        _serve(address, patience_s, on_ready)
        status = 0
    except Exception as error:  # whatever it is, the starter or the log has to have it: there is nobody else to tell
        logging.getLogger(__name__).exception("the agent ends")
        if not ready:
            report(f"{type(error).__name__}: {error}")
    finally:
        os._exit(status)


def _serve(address: Address, patience_s: float, on_ready: Callable[[], None], *, patient: bool = False) -> None:
    """Be the agent. `patient`: SIGTERM is no reason to leave the trainers alone, who may be saving because of it."""
    os.umask(0o077)
    make_folder(address)
    log_file = _log_to(address)
    faulthandler.enable(log_file)
    _yield_to_training()
    agent = Agent(address)
    signal.signal(signal.SIGTERM, lambda _number, _frame: agent.finish() if patient else agent.stop())
    # A notice of preemption goes to all processes of a job: it is for the trainers.
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    if patient:
        signal.signal(signal.SIGINT, lambda _number, _frame: agent.stop())
    agent.run(on_ready, patience_s=patience_s)


def _yield_to_training() -> None:
    """Run after the trainers, and do not interrupt one that has just handed over a block."""
    os.nice(NICE)
    with contextlib.suppress(OSError):  # a sandbox may forbid it; it is a courtesy
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def _log_to(address: Address) -> int:
    """Log to a file that does not grow without end; returns a descriptor for what the interpreter says when it dies."""
    handler = RotatingFileHandler(address.log, maxBytes=LOG_BYTES, backupCount=1)
    logging.basicConfig(
        level=logging.INFO, handlers=[handler], format="%(asctime)s %(levelname)s %(process)d %(name)s: %(message)s"
    )
    return os.open(address.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
