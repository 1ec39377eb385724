"""`resilient verify` and `resilient diff`: whether a checkpoint is whole, and whether two are the same."""

from typing import TYPE_CHECKING, Any

import click

from resilient.errors import DamagedImage
from resilient.launch.cli import options
from resilient.launch.cli.output import (
    Exit,
    progress,
    ranges_text,
    remark,
    size_text,
    tell,
    tell_json,
    tell_table,
)

if TYPE_CHECKING:
    from resilient.checkpoint.formats.source import Finding, Reference


@click.command()
@click.argument("url")
@options.opening
@click.option("--all", "every", is_flag=True, help="Every complete step that is there.")
@options.as_json
def verify(
    url: str,
    format_name: str | None,
    step: int | None,
    spec: str | None,
    trust_pickle: bool,
    every: bool,
    as_json: bool,
) -> int:
    """Read all bytes of the checkpoint at URL; snapshots of ours are compared with their digests."""
    reference = options.reference(url, format_name, step, spec, trust_pickle)
    reports = [_verified(one) for one in (_every_step(reference) if every else [reference])]
    damaged = any(report["findings"] for report in reports)
    if as_json:
        tell_json({"url": url, "well": not damaged, "checkpoints": reports})
    else:
        for report in reports:
            _tell_report(report)
    return Exit.FOUND if damaged else Exit.OK


def _every_step(reference: "Reference") -> "list[Reference]":
    from dataclasses import replace

    from resilient.launch.cli.listing import checkpoints

    found = checkpoints(reference.url)
    if all(one.format == "native" for one in found):
        for one in found:
            if not one.is_complete:
                remark(f"{one.url}, step {one.step} is not complete; missing: {ranges_text(one.missing) or 'all'}")
        return [replace(reference, step=one.step) for one in found if one.is_complete]
    return [replace(reference, url=one.url, format=one.format) for one in found]


def _verified(reference: "Reference") -> dict[str, Any]:
    """What is wrong with one checkpoint. Raises what opening raises, but for damage, which is a finding."""
    from resilient.checkpoint.formats.registry import open_source

    report: dict[str, Any] = {"url": reference.url, "step": reference.step, "bytes": 0, "findings": []}
    try:
        source = open_source(reference)
    except DamagedImage as error:
        report["findings"] = [_finding_json(one) for one in _of_what_does_not_open(reference, error)]
        return report
    with source:
        total = sum(file.nbytes for file in source.catalog.files)
        report |= {"step": source.catalog.step, "bytes": total, "format": source.catalog.format}
        with progress(f"verifying {size_text(total)}", total) as counter:
            report["findings"] = [_finding_json(one) for one in source.verify(counter.add)]
        for note in source.catalog.notes:
            remark(f"note: {note}")
    return report


def _of_what_does_not_open(reference: "Reference", error: DamagedImage) -> "list[Finding]":
    """Of a snapshot of ours each rank by itself; of others why they do not open."""
    from resilient.checkpoint.formats.native import step_at
    from resilient.checkpoint.formats.native_repair import verify_step
    from resilient.checkpoint.formats.source import Finding

    found = step_at(reference)
    if found is None:
        return [Finding("", (), str(error))]
    with progress(f"verifying step {found[1]}", None) as counter:
        return list(verify_step(*found, counter.add)) or [Finding("", (), str(error))]


def _finding_json(found: "Finding") -> dict[str, Any]:
    return {"file": found.file or None, "tensors": list(found.tensors), "problem": found.problem}


def _tell_report(report: dict[str, Any]) -> None:
    name = report["url"] if report["step"] is None else f"{report['url']}, step {report['step']}"
    if not report["findings"]:
        tell(f"{name}: well ({size_text(report['bytes'])})")
        return
    tell(f"{name}: DAMAGED")
    for found in report["findings"]:
        tell(f"  {found['file']}: {found['problem']}" if found["file"] else f"  {found['problem']}")
        for tensor in found["tensors"]:
            tell(f"    {tensor}")


@click.command()
@click.argument("a")
@click.argument("b")
@click.option("--step", type=click.IntRange(min=0), help="The step of both; each one's newest if not given.")
@click.option("--step-b", type=click.IntRange(min=0), help="The step of B, where it is another.")
@options.spec
@click.option("--atol", default=0.0, type=click.FloatRange(min=0), help="Values may differ so much ...")
@click.option("--rtol", default=0.0, type=click.FloatRange(min=0), help="... and so much of the value in B.")
@options.select
@click.option("--trust-pickle", is_flag=True, help="Let foreign pickles build any object, which runs their code.")
@options.as_json
def diff(
    a: str,
    b: str,
    step: int | None,
    step_b: int | None,
    spec: str | None,
    atol: float,
    rtol: float,
    select: tuple[str, ...],
    trust_pickle: bool,
    as_json: bool,
) -> int:
    """Say which tensors differ between the checkpoints A and B, of whatever formats, and by how much."""
    from resilient.checkpoint.formats.registry import open_source
    from resilient.checkpoint.formats.select import select as selected
    from resilient.launch.cli import comparing

    tolerance = comparing.Tolerance(absolute=atol, relative=rtol)
    one = options.reference(a, step=step, spec=spec, trust=trust_pickle)
    other = options.reference(b, step=step if step_b is None else step_b, spec=spec, trust=trust_pickle)
    with open_source(one) as first, open_source(other) as second:
        compared = comparing.pairs(*(selected(source.catalog, select) for source in (first, second)))
        total = sum(pair.a.nbytes for pair in compared if pair.a is not None and pair.b is not None)
        with progress("comparing", total) as counter:
            found = list(comparing.differences(first, second, compared, tolerance, counter.add))
    if as_json:
        rows = [comparing.as_json(difference) for difference in found]
        tell_json({"a": a, "b": b, "tensors": len(compared), "same": not found, "differences": rows})
    else:
        _tell_differences(found, len(compared))
    return Exit.FOUND if found else Exit.OK


def _tell_differences(found: list[Any], compared: int) -> None:
    if not found:
        tell(f"the same: {compared} tensors")
        return
    rows = [
        (one.name, one.what, one.detail, one.elements or "", _number(one.most), _number(one.most_relative))
        for one in found
    ]
    columns = ("tensor", "what", "detail", "elements", "max |a - b|", "relative")
    tell_table(columns, rows, right=("elements", "max |a - b|", "relative"))
    tell(f"{len(found)} of {compared} tensors differ")


def _number(value: float) -> str:
    return f"{value:.3g}" if value else ""
