"""`resilient ls` and `resilient inspect`: which checkpoints lie somewhere, and what is in one of them."""

from typing import TYPE_CHECKING, Any

import click

from resilient.launch.cli import options
from resilient.launch.cli.output import (
    Exit,
    age_text,
    ranges_text,
    remark,
    seconds_since,
    size_text,
    tell,
    tell_facts,
    tell_json,
    tell_table,
)

if TYPE_CHECKING:
    from resilient.checkpoint.catalog.catalog import Catalog, Tensor
    from resilient.checkpoint.formats.source import Source
    from resilient.launch.cli.listing import Listed


@click.command()
@click.argument("url")
@options.as_json
def ls(url: str, as_json: bool) -> int:
    """List the checkpoints at URL: steps, ranks, what is missing, sizes and ages."""
    from resilient.launch.cli.listing import checkpoints

    found = checkpoints(url)
    if as_json:
        tell_json({"url": url, "checkpoints": [_listed_json(one) for one in found]})
        return Exit.OK
    columns = ("step", "format", "ranks", "complete", "size", "files", "age", "where")
    tell_table(columns, [_listed_row(one) for one in found], right=("step", "ranks", "size", "files", "age"))
    for one in found:
        for note in (one.problem, *one.notes):
            if note:
                remark(f"{_name(one)}: {note}")
    return Exit.OK


def _listed_row(one: "Listed") -> tuple[object, ...]:
    complete = "yes" if one.is_complete else f"no, missing: {ranges_text(one.missing)}" if one.missing else "no"
    return (
        "" if one.step is None else one.step,
        one.format,
        one.world_size or "",
        complete,
        size_text(one.nbytes),
        one.files,
        age_text(seconds_since(one.modified)),
        one.url,
    )


def _listed_json(one: "Listed") -> dict[str, Any]:
    return {
        "url": one.url,
        "format": one.format,
        "step": one.step,
        "world_size": one.world_size,
        "complete": one.is_complete,
        "missing_ranks": list(one.missing),
        "bytes": one.nbytes,
        "files": one.files,
        "modified": one.modified,
        "problem": one.problem or None,
        "notes": list(one.notes),
    }


def _name(one: "Listed") -> str:
    return one.url if one.step is None else f"{one.url}, step {one.step}"


@click.command()
@click.argument("url")
@options.opening
@options.select
@click.option("--pieces", is_flag=True, help="With --json: every piece of every tensor, and where its bytes are.")
@options.as_json
def inspect(
    url: str,
    format_name: str | None,
    step: int | None,
    spec: str | None,
    trust_pickle: bool,
    select: tuple[str, ...],
    pieces: bool,
    as_json: bool,
) -> int:
    """Show what is in the checkpoint at URL: tensors, dtypes, shapes, who held what, groups, digests."""
    from resilient.checkpoint.formats.registry import open_source
    from resilient.checkpoint.formats.select import select as selected

    with open_source(options.reference(url, format_name, step, spec, trust_pickle)) as source:
        tensors = list(selected(source.catalog, select).tensors.values())
        if as_json:
            tell_json(_described(source, tensors, pieces=pieces))
        else:
            _show(url, source, tensors)
    return Exit.OK


def _show(url: str, source: "Source", tensors: "list[Tensor]") -> None:
    catalog = source.catalog
    kinds: dict[str, int] = {}
    for tensor in tensors:
        kinds[tensor.kind] = kinds.get(tensor.kind, 0) + 1
    tell_facts(
        {
            "where": url,
            "format": catalog.format,
            "step": "unknown" if catalog.step is None else catalog.step,
            "ranks": catalog.world_size or "",
            "files": f"{len(catalog.files)}, {size_text(sum(file.nbytes for file in catalog.files))}",
            "tensors": f"{len(tensors)}, {size_text(sum(tensor.nbytes for tensor in tensors))}",
            "kinds": ", ".join(f"{count} {kind}" for kind, count in kinds.items()),
            "objects": ", ".join(sorted(source.objects())),
        }
    )
    tell("")
    rows = [
        (one.name, one.kind, one.dtype, list(one.shape), size_text(one.nbytes), len(one.pieces), _holders(catalog, one))
        for one in tensors
    ]
    held = "ranks" if _files_are_ranks(catalog) else "files"
    tell_table(("tensor", "kind", "dtype", "shape", "size", "pieces", held), rows, right=("size", "pieces"))
    _show_rest(source)


def _show_rest(source: "Source") -> None:
    catalog = source.catalog
    if catalog.aliases:
        tell("\ntied:")
        for name, first in catalog.aliases.items():
            tell(f"  {name} is {first}")
    for item, groups in catalog.groups.items():
        tell(f"\ngroups of {item}:")
        for number, group in enumerate(groups):
            values = ", ".join(f"{key}={value!r}" for key, value in group.items() if key != "params")
            tell(f"  {number}: {len(group['params'])} parameters; {values}")
    for note in catalog.notes:
        remark(f"note: {note}")


def _files_are_ranks(catalog: "Catalog") -> bool:
    return catalog.format == "native"


def held_by(tensor: "Tensor") -> list[int]:
    """The numbers of the files in which there are pieces of a tensor, ascending."""
    return sorted({int(number) for number in tensor.pieces.rows[:, 0].tolist()})


def _holders(catalog: "Catalog", tensor: "Tensor") -> str:
    own = catalog.own.get(tensor.name)
    if own is not None and len(own) > 1:
        return f"{ranges_text(sorted(own))} (each its own)"
    return ranges_text(held_by(tensor))


def _described(source: "Source", tensors: "list[Tensor]", *, pieces: bool) -> dict[str, Any]:
    catalog = source.catalog
    return {
        "url": source.reference.url,
        "format": catalog.format,
        "step": catalog.step,
        "world_size": catalog.world_size,
        "bytes": sum(tensor.nbytes for tensor in tensors),
        "files": [{"name": file.name, "bytes": file.nbytes} for file in catalog.files],
        "tensors": [_tensor_json(catalog, tensor, pieces=pieces) for tensor in tensors],
        "aliases": catalog.aliases,
        "groups": catalog.groups,
        "objects": sorted(source.objects()),
        "images": _images_json(source),
        "notes": catalog.notes,
    }


def _tensor_json(catalog: "Catalog", tensor: "Tensor", *, pieces: bool) -> dict[str, Any]:
    raw: dict[str, Any] = {
        "name": tensor.name,
        "kind": tensor.kind,
        "item": tensor.item,
        "dtype": tensor.dtype,
        "shape": list(tensor.shape),
        "bytes": tensor.nbytes,
        "pieces": len(tensor.pieces),
        "held_by": held_by(tensor),
        "own_of_ranks": sorted(catalog.own.get(tensor.name, ())),
    }
    if tensor.kind == "optimizer":
        raw |= {"parameter": tensor.parameter, "state": tensor.state}
    if pieces:
        raw["stored"] = [
            {
                "file": one.file,
                "offset": catalog.files[one.file].begins + one.offset,
                "offsets": list(one.piece.offsets),
                "sizes": list(one.piece.sizes),
                "start": one.piece.start,
                "stop": one.piece.stop,
                "strides": list(one.strides or ()),
            }
            for one in tensor.pieces.pieces(tensor.shape)
        ]
    return raw


def _images_json(source: "Source") -> list[dict[str, Any]]:
    """Of a snapshot of ours what the records say of the images."""
    from resilient.checkpoint.formats.native import NativeSource

    if not isinstance(source, NativeSource):
        return []
    return [
        {
            "rank": rank,
            "name": record.image_name,
            "bytes": record.image_bytes,
            "encoding": record.encoding and record.encoding["name"],
            "run_id": record.run_id,
            "life": record.life,
            "plan_digest": record.plan_digest,
            "blocks": list(record.blocks),
            "software": record.software,
        }
        for rank, record in source.records.items()
    ]
