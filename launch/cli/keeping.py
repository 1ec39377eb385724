"""`resilient repair` and `resilient prune`: to make a damaged snapshot whole, and to delete old ones."""

import sys
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import click

from resilient.errors import NotACheckpoint, UsageError
from resilient.launch.cli import options
from resilient.launch.cli.output import Exit, progress, ranges_text, remark, size_text, tell, tell_json

if TYPE_CHECKING:
    from resilient.checkpoint.formats.native_repair import Mended
    from resilient.launch.cli.pruning import Pruning


@click.command()
@click.argument("url")
@click.option("--from", "others", multiple=True, required=True, metavar="OTHER", help="Where to take bytes from.")
@click.option("--step", type=click.IntRange(min=0), help="The step; the newest that is there if not given.")
@click.option("--all", "every", is_flag=True, help="All steps that are there.")
@click.option("--dry-run", is_flag=True, help="Only say what would be done.")
@options.as_json
def repair(url: str, others: tuple[str, ...], step: int | None, every: bool, dry_run: bool, as_json: bool) -> int:
    """Make snapshots of ours at URL whole again with what other levels have of the same snapshots.

    Every byte is compared with its digest before it is used, and read back after it was written.
    """
    from resilient.checkpoint.formats.native_records import place_of
    from resilient.checkpoint.formats.native_repair import Repair
    from resilient.checkpoint.levels.open import open_store

    if step is not None and every:
        raise UsageError("--step and --all cannot both be given")
    place = place_of(url)
    stores = [open_store(place.url), *(open_store(place_of(other).url) for other in others)]
    steps = _steps_to_repair(stores[0], place.step if step is None else step, every=every)
    reports: list[dict[str, Any]] = []
    for number in steps:
        with progress(f"step {number}", None) as counter:
            mended = list(Repair(stores, number, counter.add).run(dry=dry_run))
        reports.append({"step": number, "ranks": [_mended_json(one) for one in mended]})
        if not as_json:
            _tell_mended(url, number, mended)
    if as_json:
        tell_json({"url": url, "from": list(others), "dry_run": dry_run, "steps": reports})
    outcomes = {one["outcome"] for report in reports for one in report["ranks"]}
    return Exit.FOUND if outcomes & {"lost", "repairable"} else Exit.OK


def _steps_to_repair(store: Any, step: int | None, *, every: bool) -> list[int]:
    from resilient.checkpoint.names import step_of

    if step is not None:
        return [step]
    found = sorted({number for name in store.list() if (number := step_of(name)) is not None})
    if not found:
        raise NotACheckpoint(f"{store.url} has no step; name one with --step to take it as a whole from elsewhere")
    return found if every else found[-1:]


def _mended_json(one: "Mended") -> dict[str, Any]:
    return {
        "rank": one.rank,
        "outcome": one.outcome,
        "problems": list(one.problems),
        "tensors": list(one.tensors),
        "from": list(one.sources),
        "blocks": one.blocks,
    }


def _tell_mended(url: str, step: int, mended: "list[Mended]") -> None:
    well = [one.rank for one in mended if one.outcome == "well"]
    if well:
        tell(f"{url}, step {step}: ranks {ranges_text(well)} are well")
    for one in mended:
        if one.outcome != "well":
            source = f", from {', '.join(one.sources)}" if one.sources else ""
            tell(f"{url}, step {step}: rank {one.rank}: {one.outcome}{source}: {'; '.join(one.problems)}")


@click.command()
@click.argument("url")
@click.option("--keep", type=click.IntRange(min=1), required=True, help="How many of the newest complete steps stay.")
@click.option("--keep-every", type=click.IntRange(min=1), metavar="K", help="Steps that K divides stay, too.")
@click.option("--dry-run", is_flag=True, help="Only say what would be deleted.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.option("--force", is_flag=True, help="Although a job may be writing there.")
@options.as_json
def prune(url: str, keep: int, keep_every: int | None, dry_run: bool, yes: bool, force: bool, as_json: bool) -> int:
    """Delete old snapshots of ours at URL. The newest complete one always stays."""
    from resilient.checkpoint.levels.open import open_store
    from resilient.checkpoint.names import complete_steps
    from resilient.launch.cli import pruning
    from resilient.launch.cli.listing import files_below

    store = open_store(url)
    if not complete_steps(store.list()):
        raise NotACheckpoint(f"{url} has no complete snapshot of ours, so nothing is deleted there")
    with nullcontext() if force or dry_run else pruning.claimed(store):
        files = files_below(url)
        names = [file.name for file in files]
        sound = pruning.sound_step(store, complete_steps(names))
        decided = pruning.decide(names, sound, keep=keep, keep_every=keep_every)
        gone = {*decided.deletions.records, *decided.deletions.images}
        nbytes = sum(file.nbytes for file in files if file.name in gone)
        if not as_json:
            _tell_pruning(decided, nbytes)
        deletes = bool(gone) and not dry_run
        if deletes:
            if not yes:
                _ask(f"delete {len(decided.steps)} steps of {url}?")
            pruning.delete(store, decided)
    if as_json:
        tell_json(
            {
                "url": url,
                "deleted": deletes,
                "steps": list(decided.steps),
                "kept": list(decided.kept),
                "bytes": nbytes,
                "files": len(gone),
                "reason": decided.reason,
            }
        )
    return Exit.OK


def _ask(question: str) -> None:
    """Raises click.Abort for a no, UsageError where nobody can be asked."""
    if not sys.stdin.isatty():
        raise UsageError("nobody can be asked here whether to delete: give --yes, or --dry-run to see what would go")
    click.confirm(question, abort=True, err=True)


def _tell_pruning(decided: "Pruning", nbytes: int) -> None:
    tell(f"stay: {ranges_text(decided.kept)}")
    tell(f"go:   {ranges_text(decided.steps) or 'none'} ({size_text(nbytes)})")
    remark(decided.reason)
