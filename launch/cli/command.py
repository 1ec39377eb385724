"""The command `resilient`: its commands, and what every one of them does alike: options, errors, exit codes.

Errors of the library are told in one line, without a traceback (`--debug` shows it), and end with the code of their
kind (`output.Exit`). What is no error of ours is a defect: it is shown with its traceback, and must not end with the
code of "damage was found", as Python would have it.
"""

import os
import sys
import traceback
from collections.abc import Sequence

import click

from resilient.errors import ResilientError
from resilient.launch.cli.agent import agent
from resilient.launch.cli.check import diff, verify
from resilient.launch.cli.conversion import convert
from resilient.launch.cli.doctor import doctor
from resilient.launch.cli.keeping import prune, repair
from resilient.launch.cli.look import inspect, ls
from resilient.launch.cli.mpi import mpi
from resilient.launch.cli.net import net
from resilient.launch.cli.output import Enough, Exit, exit_code, remark
from resilient.launch.cli.running import rendezvous, run
from resilient.launch.cli.slurm import slurm


@click.group(
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Exit codes: 0 well, 1 damage or a difference was found, 2 usage, 3 nothing is there or no checkpoint, "
    "4 a disk or service failed.",
)
@click.version_option(package_name="torch-resilient", prog_name="resilient")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def resilient(debug: bool) -> None:
    """Look at checkpoints, verify, compare, convert, repair and prune them.

    URLs are local paths or what fsspec knows: s3://bucket/run, gs://..., memory://...; the format is recognised.
    """


for _command in (agent, ls, inspect, verify, diff, convert, repair, prune, mpi, doctor, net, rendezvous, run, slurm):
    resilient.add_command(_command)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns its exit code. `arguments`: those of the process when not given."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    try:
        code = resilient.main(given, prog_name="resilient", standalone_mode=False)
        sys.stdout.flush()
    except click.Abort:
        remark("interrupted; nothing that counts was left half-done")
        return Exit.INTERRUPTED
    except click.ClickException as error:
        error.show()
        return Exit.USAGE
    except (Enough, BrokenPipeError):  # the latter from the flush
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter complains when it ends
        return Exit.OK
    except (ResilientError, OSError) as error:
        if "--debug" in given:
            traceback.print_exc()
        remark(f"resilient: {_told(error)}")
        return exit_code(error)
    except Exception:
        traceback.print_exc()
        remark("resilient: this is a defect of the command, not of the checkpoint; please report it")
        return Exit.FAILED
    return code if isinstance(code, int) else Exit.OK


def _told(error: BaseException) -> str:
    """The message of an error, with its notes. An OSError has its number in front, which says little."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    if isinstance(error, OSError) and error.filename and str(error.filename) not in text:
        text = f"{error.filename}: {text}"
    return "\n".join([text or type(error).__name__, *getattr(error, "__notes__", [])])
