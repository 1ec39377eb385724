"""The catalog of a snapshot of ours, from the records of all ranks: a merged index, and never the truth (law 3)."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from resilient.checkpoint.catalog.catalog import Catalog, File, Tensor
from resilient.checkpoint.catalog.table import START, STOP, PieceTable, Rows, row_major
from resilient.checkpoint.record import Record
from resilient.errors import DamagedImage

_Key = tuple[str, int | None]
"""A tensor's name, and the rank where it is a rank's own."""


def native_catalog(records: Mapping[int, Record], begins: Mapping[int, int]) -> Catalog:
    """The catalog of one snapshot. File number r is the image of rank r; `begins[r]` is where its data starts.

    All ranks must be there. Raises DamagedImage where the pieces of a tensor do not fit together.
    """
    first = records[0]
    catalog = Catalog(
        format="native",
        files=[File(records[rank].image_name, records[rank].image_bytes) for rank in range(first.world_size)],
        step=first.step,
        world_size=first.world_size,
    )
    described: dict[_Key, dict[str, Any]] = {}
    rows: dict[_Key, list[list[int]]] = {}
    for rank in range(first.world_size):
        for raw in records[rank].pieces():
            if "nbytes" in raw:
                key = raw["key"], rank if raw["own"] else None
                described.setdefault(key, raw)
                rows.setdefault(key, []).append(_row(raw, rank, begins[rank]))
            elif "alias_of" in raw:
                catalog.aliases[raw["key"]] = raw["alias_of"]
            elif "optimizer" in raw:
                _add_groups(catalog, raw["optimizer"], raw["groups"])
    for key, raw in described.items():
        _add(catalog, key, raw, np.array(rows[key], dtype=np.int64))
    for name, own in catalog.own.items():
        if name not in catalog.tensors:
            catalog.add(own[min(own)])
    return catalog


def _add_groups(catalog: Catalog, item: str, groups: Sequence[list[str]]) -> None:
    """Groups of the same number belong together: pipeline stages have each their own parameters in them."""
    known = catalog.groups.setdefault(item, [])
    for number, names in enumerate(groups):
        if number == len(known):
            known.append({"params": list(names)})
        elif known[number]["params"] != names:
            there = set(known[number]["params"])
            known[number]["params"] += [name for name in names if name not in there]


def _row(raw: Mapping[str, Any], rank: int, begins: int) -> list[int]:
    sizes = raw["sizes"]
    return [rank, begins + raw["offset"], raw["start"], raw["stop"], *raw["offsets"], *sizes, *row_major(sizes)]


def _add(catalog: Catalog, key: _Key, raw: Mapping[str, Any], rows: Rows) -> None:
    name, rank = key
    for number, group in enumerate(_by_group(raw, rows)):
        tensor = Tensor(
            name=name,
            kind=raw["kind"],
            dtype=raw["dtype"],
            shape=tuple(raw["shape"]),
            pieces=PieceTable(len(raw["shape"]), group),
            item=_item_of(raw),
            parameter=raw.get("parameter", ""),
            state=raw.get("name", ""),
        )
        if int((group[:, STOP] - group[:, START]).sum()) != tensor.numel:  # the record's digest vouches for the rest
            raise DamagedImage(tensor.problem() or f"tensor {name!r} is not whole")
        if rank is None and not number:
            catalog.tensors[name] = tensor
        if rank is not None or len(group) != len(rows):  # several groups of ranks hold one of this name each
            ranks: Iterable[int] = [rank] if rank is not None else sorted({int(row[0]) for row in group})
            catalog.own.setdefault(name, {}).update(dict.fromkeys(ranks, tensor))


def _by_group(raw: Mapping[str, Any], rows: Rows) -> list[Rows]:
    """The rows as whole tensors: of one, or, where groups of ranks have the same names, of each group's.

    A record does not name the group. Groups are told apart by what cannot be of one tensor: a range that is there
    again. Groups that share a tensor cut it at the same places, since they are of one size.
    """
    if len({tuple(row[2:]) for row in rows.tolist()}) == len(rows):
        return [rows]
    boxes: dict[tuple[int, ...], int] = {}
    number = [boxes.setdefault(tuple(row[2:]), 0) for row in rows.tolist()]
    for at, row in enumerate(rows.tolist()):
        key = tuple(row[2:])
        number[at] = boxes[key]
        boxes[key] += 1
    return [rows[np.array(number) == one] for one in range(max(number) + 1)]


def _item_of(raw: Mapping[str, Any]) -> str:
    """The item of the state that a tensor belongs to: of optimizer state what stands before `.state.<parameter>`."""
    name: str = raw["key"]
    if raw["kind"] == "optimizer":
        return name.removesuffix(f".state.{raw['parameter']}.{raw['name']}")
    return name.split(".", 1)[0]
