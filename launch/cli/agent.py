"""`resilient agent`: the agent step of a node, in the foreground or behind; and its end."""

import logging
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from resilient.errors import LevelFailed
from resilient.launch.cli.output import Exit, remark, tell

if TYPE_CHECKING:
    from resilient.launch.agent_step import AgentStep


@click.command()
@click.option(
    "--socket", "path", type=click.Path(path_type=Path), help="Where trainers find it; its folder is made private."
)
@click.option("--until-done", is_flag=True, help="End by itself when the agents that it has started have ended.")
@click.option(
    "--grace",
    "grace_s",
    type=click.FloatRange(min=0),
    default=600.0,
    show_default=True,
    metavar="SECONDS",
    help="How long agents may take to finish, once asked.",
)
@click.option("--detach", is_flag=True, help='Leave it behind: eval "$(resilient agent --detach)".')
@click.option("--finish", is_flag=True, help="Ask the one that listens to finish, and wait for its end.")
def agent(path: Path | None, until_done: bool, grace_s: float, detach: bool, finish: bool) -> int:
    """Start agents on behalf of this node's trainers, so that they outlive the trainers' step, container or launcher.

    Trainers find it by RESILIENT_AGENT_STEP, which it prints as a line for a shell. SIGTERM (or --finish) has the
    agents end once their trainers have left and their writes are done; a second SIGINT has them end at once.
    """
    path = path or _place()
    if finish:
        return _finish(path)
    if detach:
        return _detach(path, until_done=until_done, grace_s=grace_s)
    from resilient.launch.agent_step import AgentStep

    logging.basicConfig(level=logging.INFO, format="%(asctime)s resilient agent: %(message)s", stream=sys.stderr)
    step = AgentStep(path, until_done=until_done, grace_s=grace_s)
    _heed_signals(step)
    return step.run(on_ready=lambda: _tell_where(path))


def _place() -> Path:
    """The socket where none is named: where trainers look for it, else one for this node."""
    from resilient.checkpoint.agent.address import node_name, runtime_folder
    from resilient.checkpoint.agent.step import VARIABLE

    if os.environ.get(VARIABLE):
        return Path(os.environ[VARIABLE])
    return runtime_folder(os.environ) / "step" / f"{node_name()}.sock"


def _heed_signals(step: "AgentStep") -> None:
    signal.signal(signal.SIGTERM, lambda _number, _frame: step.finish())
    signal.signal(signal.SIGINT, lambda _number, _frame: step.hurry())
    # A notice of preemption goes to all processes of a job: it is for the trainers.
    for number in (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


def _tell_where(path: Path) -> None:
    from resilient.checkpoint.agent.step import VARIABLE

    tell(f"export {VARIABLE}={shlex.quote(str(path.absolute()))}")
    sys.stdout.flush()


def _finish(path: Path) -> int:
    from resilient.checkpoint.agent.step import ask

    try:
        answer = ask(path, {"op": "finish"}, within_s=None)
    except (FileNotFoundError, ConnectionRefusedError):
        remark(f"no agent step is at {path}: there is nothing to wait for")
        return Exit.OK
    except ConnectionError:  # it was just ending
        return Exit.OK
    remark(f"the agent step has ended; it had started {answer.get('started', 0)} agent(s)")
    return Exit.OK


def _detach(path: Path, *, until_done: bool, grace_s: float) -> int:
    """Start another process of this command, and pass on what it says when it serves."""
    from resilient.checkpoint.agent.address import make_private

    command = [sys.executable, "-m", "resilient.launch.cli", "agent", "--socket", str(path), "--grace", str(grace_s)]
    log_path = path.with_suffix(".log")
    make_private(path.parent)
    with open(os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "w") as log:
        process = subprocess.Popen(
            [*command, *(["--until-done"] if until_done else [])],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            start_new_session=True,
        )
    assert process.stdout is not None
    line = process.stdout.readline().strip()
    if not line:
        raise LevelFailed(f"the agent step did not start; see {log_path}")
    tell(line)
    process.returncode = 0  # it is left behind on purpose
    return Exit.OK
