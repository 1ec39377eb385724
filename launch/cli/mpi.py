"""`resilient mpi`: runs an unchanged script, one that expects torchrun's variables, under mpirun."""

import runpy
import sys
from pathlib import Path
from types import TracebackType

import click

from resilient.launch.cli.output import Exit


@click.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.option("-m", "--module", is_flag=True, help="SCRIPT is the name of a module, as for python -m.")
@click.argument("script")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def mpi(module: bool, script: str, arguments: tuple[str, ...]) -> int:
    """Run SCRIPT as torchrun would have it, when started by mpirun: mpirun -n 8 resilient mpi train.py --lr 1e-4

    Ranks and hosts come from MPI; RANK, LOCAL_RANK, MASTER_ADDR and the like are set from them. Needs mpi4py.
    """
    from resilient.launch.mpi import join

    join()
    sys.argv = [script, *arguments]
    try:
        if module:
            runpy.run_module(script, run_name="__main__", alter_sys=True)
        else:
            if not sys.flags.safe_path:
                sys.path.insert(0, str(Path(script).resolve().parent))
            runpy.run_path(script, run_name="__main__")
    except Exception as error:  # the script's own, whatever it is; `join` has arranged that this ends the whole job
        told = error.with_traceback(_below(error.__traceback__, script))
        sys.excepthook(type(told), told, told.__traceback__)
        return 1  # as Python's own for such an end
    return Exit.OK


def _below(trace: TracebackType | None, script: str) -> TracebackType | None:
    """The traceback without our own frames; all of it where the script does not stand in it."""
    at = trace
    while at is not None and at.tb_frame.f_code.co_filename != script:
        at = at.tb_next
    return at or trace
