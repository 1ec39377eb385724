"""The catalog of a snapshot of ours, from the merged index of all ranks' records: never the truth itself (law 3)."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np

from resilient.checkpoint.catalog.catalog import Catalog, File, Tensor
from resilient.checkpoint.catalog.index import Entry, Header, Index, tensor_of
from resilient.checkpoint.catalog.table import PieceTable, Rows
from resilient.checkpoint.names import image_name
from resilient.errors import DamagedImage


def native_catalog(index: Index) -> Catalog:
    """The catalog of one snapshot. File number r is the image of rank r; offsets count from the beginning of its data.

    The index has all ranks. Raises DamagedImage where the pieces of a tensor do not fit together.
    """
    assert index.is_complete, "an index of all ranks"
    size, members = index.world_size, index.members
    catalog = Catalog(
        format="native",
        files=[
            File(image_name(index.step, rank, size), members[rank].image_bytes, members[rank].data_start)
            for rank in range(size)
        ],
        step=index.step,
        world_size=size,
    )
    for text, _ in sorted(index.others.items(), key=lambda item: item[1]):
        for raw in json.loads(text):
            if "alias_of" in raw:
                catalog.aliases[raw["key"]] = raw["alias_of"]
            elif "optimizer" in raw:
                _add_groups(catalog, raw["optimizer"], raw["groups"])
    for header, entry in index.sorted_entries():
        if header.own:
            own: Mapping[int, Tensor] = OfRanks(header, entry)
            catalog.own[header.name] = {**catalog.own[header.name], **own} if header.name in catalog.own else own
        else:
            _add(catalog, header, entry)
    for name, own in catalog.own.items():
        if name not in catalog.tensors:
            catalog.add(own[min(own)])
    return catalog


class OfRanks(Mapping[int, Tensor]):
    """What each rank has of its own under one name, by rank. Each is looked up when it is asked for."""

    def __init__(self, header: Header, entry: Entry) -> None:
        """Raises DamagedImage where any of them is not whole."""
        self._whole = tensor_of(header, entry.table)
        self._ranks = entry.table.files
        self._found: dict[int, Tensor] = {}
        if entry.table.numel != self._whole.numel * len(self._ranks):
            broken = next((one for one in self.values() if one.problem()), self._whole)
            raise DamagedImage(broken.problem() or f"tensor {header.name!r} of some rank is not whole")

    def __getitem__(self, rank: int) -> Tensor:
        if rank not in self._found:
            table = self._whole.pieces.of_file(rank)
            if not len(table):
                raise KeyError(rank)
            self._found[rank] = replace(self._whole, pieces=table)
        return self._found[rank]

    def __iter__(self) -> Iterator[int]:
        return iter(self._ranks)

    def __len__(self) -> int:
        return len(self._ranks)


def _add_groups(catalog: Catalog, item: str, groups: Sequence[list[str]]) -> None:
    """Groups of the same number belong together: pipeline stages have each their own parameters in them."""
    known = catalog.groups.setdefault(item, [])
    for number, names in enumerate(groups):
        if number == len(known):
            known.append({"params": list(names)})
        elif known[number]["params"] != names:
            there = set(known[number]["params"])
            known[number]["params"] += [name for name in names if name not in there]


def _add(catalog: Catalog, header: Header, entry: Entry) -> None:
    """A tensor, or, where groups of ranks have different ones under the same name, that of each group."""
    whole = tensor_of(header, entry.table)
    if header.name in catalog.tensors:
        other = catalog.tensors[header.name]
        raise DamagedImage(
            f"tensor {header.name!r} is {other.dtype} {other.shape} ({other.kind}) on some ranks, and "
            f"{whole.dtype} {whole.shape} ({whole.kind}) on others"
        )
    if entry.table.numel == whole.numel:  # the records' digests vouch for the rest
        catalog.tensors[header.name] = whole
        return
    groups = [replace(whole, pieces=PieceTable(len(header.shape), rows)) for rows in _by_group(entry.table.rows)]
    for group in groups:
        if group.pieces.numel != group.numel:
            raise DamagedImage(group.problem() or f"tensor {header.name!r} is not whole")
    catalog.tensors[header.name] = groups[0]
    own = {rank: group for group in groups for rank in group.pieces.files}
    catalog.own[header.name] = {**catalog.own.get(header.name, {}), **own}


def _by_group(rows: Rows) -> list[Rows]:
    """The rows as whole tensors, one of each group of ranks that has the name.

    A record does not name the group. Groups are told apart by what cannot be of one tensor: a range that is there
    again. Groups that share a tensor cut it at the same places, since they are of one size.
    """
    times: dict[tuple[int, ...], int] = {}
    number = []
    for row in rows.tolist():
        key = tuple(row[2:])
        number.append(times.get(key, 0))
        times[key] = number[-1] + 1
    return [rows[np.array(number) == one] for one in range(max(number) + 1)]
