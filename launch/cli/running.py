"""`resilient run`: torchrun that loses no step; its options are torchrun's and ours, read by torchrun's own parser.
`resilient rendezvous`: the place where its nodes meet, outside of them.
"""

import os
import signal

import click


class _Passing(click.Command):
    """Leaves its arguments as they are, -- and --help included."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.params["arguments"] = tuple(args)
        return []


@click.command(
    cls=_Passing,
    options_metavar="[options of torchrun] [--policy FILE] [--set KEY=VALUE] [--grace-s S] SCRIPT [its arguments]",
    short_help="Run a training script as torchrun does; failures cost no step.",
)
def run(arguments: tuple[str, ...]) -> int:
    from resilient.launch.run.job import run as run_job

    return run_job(arguments, os.environ)


@click.command(short_help="Serve the rendezvous of a job outside its nodes, so that any of them may be lost.")
@click.argument("endpoint", metavar="HOST[:PORT]")
def rendezvous(endpoint: str) -> int:
    """Serve, until a signal ends it, the place where the nodes of `resilient run --rdzv-endpoint HOST:PORT` meet.

    Without it the first node that HOST names serves it, and the job cannot outlive that one. It listens at HOST only.
    """
    from resilient.launch.run.rendezvous import serve

    ending = (signal.SIGINT, signal.SIGTERM)
    signal.pthread_sigmask(signal.SIG_BLOCK, ending)
    store = serve(endpoint)
    click.echo(f"the rendezvous is at {endpoint.partition(':')[0]}:{store.port}", err=True)
    signal.sigwait(ending)
    return 0
