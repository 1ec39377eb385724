"""`resilient convert`: a checkpoint of any format as one of another."""

import re
from typing import TYPE_CHECKING

import click

from resilient.errors import UsageError
from resilient.launch.cli import options
from resilient.launch.cli.output import Exit, progress, remark, size_text, tell, tell_json

if TYPE_CHECKING:
    from resilient.checkpoint.formats.convert import Report

_DTYPES = {
    "float32": "float32",
    "float16": "float16",
    "bfloat16": "bfloat16",
    "float64": "float64",
    "fp32": "float32",
    "fp16": "float16",
    "bf16": "bfloat16",
    "fp64": "float64",
}
_UNITS = ("", "K", "M", "G", "T")
_SIZE = re.compile(r"^(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?$", re.IGNORECASE)


def size_of(ctx: click.Context, param: click.Parameter, value: str | None) -> int | None:
    """A number of bytes: "5GB", "512MiB", "1000000"."""
    if value is None:
        return None
    match = _SIZE.match(value)
    nbytes = 0
    if match is not None:
        number, unit, binary = match.groups()
        nbytes = int(float(number) * (1024 if binary else 1000) ** _UNITS.index(unit.upper()))
    if nbytes < 1:
        raise click.BadParameter(f"{value!r} is no size; write one such as 5GB or 512MiB")
    return nbytes


def settings_of(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    """KEY=VALUE, several times."""
    found = {}
    for value in values:
        key, equals, text = value.partition("=")
        if not equals or not key:
            raise click.BadParameter(f"{value!r} is not KEY=VALUE")
        found[key] = text
    return found


@click.command()
@click.argument("source")
@click.argument("target")
@click.option("--to", required=True, type=click.Choice(options.SINKS), help="The format to write.")
@options.opening
@click.option("--dtype", type=click.Choice(sorted(_DTYPES)), help="Of floating-point parameters and buffers.")
@options.select
@click.option("--shard-size", callback=size_of, metavar="SIZE", help="About how large a file may get, such as 5GB.")
@click.option("--ranks", type=click.IntRange(min=1), default=1, help="To native: of how many ranks.")
@click.option(
    "--set",
    "extra",
    callback=settings_of,
    multiple=True,
    metavar="KEY=VALUE",
    help="A setting of the format (docs).",
)
@click.option("--workers", type=click.IntRange(min=1), help="How many processes write.")
@click.option("--force", is_flag=True, help="Replace what is at TARGET.")
@options.as_json
def convert(
    source: str,
    target: str,
    to: str,
    format_name: str | None,
    step: int | None,
    spec: str | None,
    trust_pickle: bool,
    dtype: str | None,
    select: tuple[str, ...],
    shard_size: int | None,
    ranks: int,
    extra: dict[str, str],
    workers: int | None,
    force: bool,
    as_json: bool,
) -> int:
    """Write the checkpoint SOURCE to TARGET in another format, or in the same with other shards, dtypes or ranks.

    Nothing is overwritten without --force. A conversion that was interrupted goes on when it is started again.
    """
    from dataclasses import asdict, replace

    from resilient.checkpoint.formats.convert import convert as run
    from resilient.checkpoint.formats.output import SinkOptions

    reference = options.reference(source, format_name, step, spec, trust_pickle)
    wanted = SinkOptions(dtype=None if dtype is None else _DTYPES[dtype], ranks=ranks, extra=extra)
    if shard_size is not None:
        wanted = replace(wanted, shard_bytes=shard_size)
    if ranks != 1 and to != "native":
        raise UsageError(f"--ranks is for snapshots of ours (--to native), not for {to}")
    with progress(f"{source} → {to}", None) as counter:
        report = run(
            reference,
            target,
            to=to,
            options=wanted,
            select=select,
            force=force,
            workers=workers,
            progress=counter.add,
            total=counter.total,
        )
    if as_json:
        tell_json(asdict(report))
    else:
        _tell_report(report)
    return Exit.OK


def _tell_report(report: "Report") -> None:
    skipped = f", {report.skipped} were there already" if report.skipped else ""
    tell(f"{report.target}: {report.tensors} tensors, {size_text(report.nbytes)} in {report.files} files{skipped}")
    for name, count in report.beyond.items():
        remark(f"{name}: {count} values were beyond the range of the dtype, and were set to its ends")
    for note in report.notes:
        remark(f"note: {note}")
