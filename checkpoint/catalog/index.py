"""The merged index of a snapshot: what the records of its images say of their pieces, folded. Pure.

It is the content of `catalog.json` (docs/format.md), and what ranks send one another to make it: each folds the records
it has read, and two such parts are merged into one, in any order. So that nobody reads every record, it says of each
image what tells whether its record is still the same (life, plan, length); the digests of the blocks only the record
has. Offsets are those in an image's data: where that begins may change from step to step, the folded pieces do not.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, get_args

import numpy as np

from resilient.checkpoint.catalog.catalog import ITEMSIZES, MOST_ELEMENTS, Kind, Tensor
from resilient.checkpoint.catalog.table import FILE, PieceTable, row_major, within
from resilient.checkpoint.digest import digest
from resilient.checkpoint.record import Record
from resilient.errors import DamagedImage, NewerFormat

FORMAT = "resilient.catalog"
VERSION = 1
_HEAD = '{"digest":"'
_MOST_RANKS = 1 << 22
_KINDS = get_args(Kind)


class Header(NamedTuple):
    """What a tensor is. `own`: each rank has one of its own under this name."""

    name: str
    own: bool
    kind: Kind
    dtype: str
    shape: tuple[int, ...]
    parameter: str
    state: str


@dataclass(frozen=True, slots=True)
class Entry:
    """The pieces of a tensor; file number r is the image of rank r. `host`: it lay in host memory on some rank.

    `at`: the first rank that has it, and where in its record: the order of tensors.
    """

    at: tuple[int, int]
    host: bool
    table: PieceTable


@dataclass(frozen=True, slots=True)
class Member:
    """One image. `planned_bytes`: where its last piece ends in the data; the objects lie behind it."""

    life: str
    plan_digest: str
    image_bytes: int
    data_start: int
    planned_bytes: int


@dataclass(slots=True, kw_only=True)
class Index:
    """The records of some ranks of one snapshot (`members`), or of all. Not to be changed.

    `others`: what the records list besides pieces (second names, groups of optimizers) as JSON text, and the ranks
    whose records say so.
    """

    run_id: str
    step: int
    world_size: int
    members: dict[int, Member] = field(default_factory=dict)
    entries: dict[Header, Entry] = field(default_factory=dict)
    others: dict[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def is_complete(self) -> bool:
        return len(self.members) == self.world_size

    @property
    def lives(self) -> set[str]:
        """More than one: the images are not of one snapshot."""
        return {member.life for member in self.members.values()}

    def disagreement(self, record: Record) -> str | None:
        """Why this is not the record that the index was made from; None where it is."""
        member = self.members[record.rank]
        for what in ("life", "plan_digest", "image_bytes"):
            if getattr(member, what) != getattr(record, what):
                return f"{what} is {getattr(record, what)} in the record of rank {record.rank}, {getattr(member, what)}"
        return None

    def others_of(self, rank: int) -> str:
        """What the record of a rank lists besides pieces, as the JSON text of a list."""
        return next((text for text, ranks in self.others.items() if rank in ranks), "[]")

    def text(self) -> str:
        """As it is stored and sent. The first member is the digest of all that follows, as in a record."""
        lives = sorted(self.lives)
        numbers = {life: number for number, life in enumerate(lives)}
        ranks = sorted(self.members)
        head = {
            "format": FORMAT,
            "version": VERSION,
            "run_id": self.run_id,
            "step": self.step,
            "world_size": self.world_size,
            "lives": lives,
            "ranks": list(_runs(ranks)),
            "images": [_member_json(self.members[rank], numbers) for rank in ranks],
            "tensors": [_entry_json(*one) for one in self.sorted_entries()],
        }
        others = ",".join(
            f'{{"ranks":{json.dumps(list(_runs(ranks)), separators=(",", ":"))},"entries":{text}}}'
            for text, ranks in sorted(self.others.items(), key=lambda item: item[1])
        )
        rest = json.dumps(head, separators=(",", ":"))[1:-1] + f',"others":[{others}]}}\n'
        return f'{_HEAD}{digest(rest.encode())}",\n{rest}'

    def sorted_entries(self) -> list[tuple[Header, Entry]]:
        """In the order of the records."""
        return sorted(self.entries.items(), key=lambda item: item[1].at)


def index_of(records: Iterable[Record], begins: Mapping[int, int] | None = None) -> Index:
    """What these records say; at least one. `begins`: where the data starts, for records that do not say it.

    Raises DamagedImage where they are not of one step, or lack a member.
    """
    index: Index | None = None
    rows: dict[Header, list[list[int]]] = {}
    first: dict[Header, tuple[tuple[int, int], bool]] = {}
    others: dict[str, list[int]] = {}
    for record in records:
        if index is None:
            index = Index(run_id=record.run_id, step=record.step, world_size=record.world_size)
        _check_same(index, record.run_id, record.step, record.world_size)
        rank, planned, besides = record.rank, 0, []
        for number, raw in enumerate(record.pieces()):
            if "nbytes" not in raw:
                besides.append(raw)
                continue
            header = _header_of(raw)
            at, host = first.get(header, ((rank, number), False))
            first[header] = min(at, (rank, number)), host or bool(raw["host"])
            rows.setdefault(header, []).append(_row(raw, rank))
            planned = max(planned, raw["offset"] + raw["nbytes"])
        start = record.data_start if record.data_start is not None else (begins or {})[rank]
        index.members[rank] = Member(record.life, record.plan_digest, record.image_bytes, start, planned)
        others.setdefault(json.dumps(besides, separators=(",", ":")), []).append(rank)
    assert index is not None, "there is a record"
    for header, found in rows.items():
        table = PieceTable(len(header.shape), np.array(found, dtype=np.int64)).folded()
        index.entries[header] = Entry(*first[header], table)
    index.others = {text: tuple(sorted(ranks)) for text, ranks in others.items()}
    return index


def merged(parts: Sequence[Index]) -> Index:
    """One index of what several say; at least one, of different ranks. The order makes no difference.

    Raises DamagedImage where they are not of one step.
    """
    index = Index(run_id=parts[0].run_id, step=parts[0].step, world_size=parts[0].world_size)
    entries: dict[Header, list[Entry]] = {}
    others: dict[str, list[int]] = {}
    for part in parts:
        _check_same(index, part.run_id, part.step, part.world_size)
        assert not index.members.keys() & part.members.keys(), "of different ranks"
        index.members |= part.members
        for header, entry in part.entries.items():
            entries.setdefault(header, []).append(entry)
        for text, ranks in part.others.items():
            others.setdefault(text, []).extend(ranks)
    for header, found in entries.items():
        index.entries[header] = found[0] if len(found) == 1 else _joined(found)
    index.others = {text: tuple(sorted(ranks)) for text, ranks in others.items()}
    return index


def _joined(entries: Sequence[Entry]) -> Entry:
    table = PieceTable.joined([entry.table for entry in entries])
    return Entry(min(entry.at for entry in entries), any(entry.host for entry in entries), table)


def parse_index(data: str | bytes, where: str) -> Index:
    """What `Index.text` gave. Raises DamagedImage for all else, NewerFormat."""
    try:
        text = data.decode() if isinstance(data, bytes) else data
        claimed, _, rest = text.removeprefix(_HEAD).partition('",\n')
        if digest(rest.encode()) != claimed:
            raise ValueError("its digest does not match what it says")
        raw = json.loads("{" + rest)
        if raw["format"] != FORMAT:
            raise ValueError("it is no catalog")
        if raw["version"] != VERSION:
            raise NewerFormat(f"{where} has catalog version {raw['version']}; this library reads {VERSION}: upgrade it")
        return _index_of(raw)
    except (ValueError, KeyError, TypeError, IndexError, OverflowError, RecursionError) as error:
        raise DamagedImage(f"{where} is no whole catalog ({type(error).__name__}: {error})") from error


def _index_of(raw: Mapping[str, Any]) -> Index:
    """Raises ValueError and its like, and DamagedImage."""
    size = raw["world_size"]
    if not (isinstance(raw["run_id"], str) and _is_number(raw["step"]) and _is_number(size) and size <= _MOST_RANKS):
        raise ValueError("it does not say whose it is")
    ranks = _ranks(raw["ranks"], size)
    index = Index(run_id=raw["run_id"], step=raw["step"], world_size=size)
    for rank, (life, plan_digest, *numbers) in zip(ranks, raw["images"], strict=True):
        if not (isinstance(plan_digest, str) and len(numbers) == 3 and all(map(_is_number, numbers))):
            raise ValueError(f"image {rank} is {plan_digest!r}, {numbers}")
        index.members[rank] = Member(str(raw["lives"][life]), plan_digest, *numbers)
    _add_entries(index, raw["tensors"])
    _check_pieces(index)
    for one in raw["others"]:
        text = json.dumps([dict(each) for each in one["entries"]], separators=(",", ":"))
        index.others[text] = tuple(_ranks(one["ranks"], size))
    if sorted(rank for found in index.others.values() for rank in found) != sorted(ranks):
        raise ValueError("it does not say of each rank what else its record lists")
    return index


def _add_entries(index: Index, raws: Sequence[Mapping[str, Any]]) -> None:
    headers = [_header_in(raw) for raw in raws]
    tables: dict[int, PieceTable] = {}
    for dims, numbers in _by_dims(headers).items():
        found = PieceTable.all_from_json(dims, [raws[number]["pieces"] for number in numbers])
        tables |= zip(numbers, found, strict=True)
    for number, (header, raw) in enumerate(zip(headers, raws, strict=True)):
        if header in index.entries:
            raise ValueError(f"{header.name!r} twice")
        rank, place = raw["at"]
        if not (_is_number(rank) and _is_number(place)):
            raise ValueError(f"{header.name!r} is first at {rank!r}, {place!r}")
        index.entries[header] = Entry((rank, place), raw.get("host") is True, tables[number])


def _header_in(raw: Mapping[str, Any]) -> Header:
    name, kind, dtype, shape = raw["name"], raw["kind"], raw["dtype"], tuple(raw["shape"])
    parameter, state = raw.get("parameter", ""), raw.get("state", "")
    if not (name and isinstance(name, str) and isinstance(parameter, str) and isinstance(state, str)):
        raise ValueError(f"a tensor is called {[name, parameter, state]}")
    if kind not in _KINDS or dtype not in ITEMSIZES or not all(map(_is_number, shape)):
        raise ValueError(f"{name!r} is a {kind!r} of {dtype!r} with the shape {shape}")
    if math.prod(shape) > MOST_ELEMENTS:
        raise ValueError(f"{name!r} has the shape {shape}")
    return Header(name, raw.get("own") is True, kind, dtype, shape, parameter, state)


def _by_dims(headers: Iterable[Header]) -> dict[int, list[int]]:
    """The numbers of those of as many dimensions."""
    found: dict[int, list[int]] = {}
    for number, header in enumerate(headers):
        found.setdefault(len(header.shape), []).append(number)
    return found


def _check_pieces(index: Index) -> None:
    """That all pieces lie within their tensors. Those of as many dimensions at once; what is wrong is looked for then.

    Raises DamagedImage.
    """
    entries = list(index.entries.items())
    for dims, numbers in _by_dims(header for header, _ in entries).items():
        rows, owners = PieceTable.corners_of([entries[number][1].table for number in numbers])
        shapes = np.array([entries[number][0].shape for number in numbers], dtype=np.int64).reshape(len(numbers), dims)
        if within(rows, shapes[owners], dims) and not (rows[:, FILE] >= index.world_size).any():
            continue
        for header, entry in (entries[number] for number in numbers):
            problem = tensor_of(header, entry.table).problem(partly=True)
            if problem is not None or entry.table.last_file >= index.world_size:
                raise DamagedImage(problem or f"a piece of {header.name!r} is of a rank that there is not")


def tensor_of(header: Header, table: PieceTable) -> Tensor:
    """The tensor that some pieces are of, whether or not they are all of it."""
    name, item = header.name, header.name.split(".", 1)[0]
    if header.kind == "optimizer":
        item = name.removesuffix(f".state.{header.parameter}.{header.state}")
    return Tensor(
        name=name,
        kind=header.kind,
        dtype=header.dtype,
        shape=header.shape,
        pieces=table,
        item=item,
        parameter=header.parameter,
        state=header.state,
    )


def _header_of(raw: Mapping[str, Any]) -> Header:
    parameter, state = raw.get("parameter", ""), raw.get("name", "")
    return Header(raw["key"], bool(raw["own"]), raw["kind"], raw["dtype"], tuple(raw["shape"]), parameter, state)


def _row(raw: Mapping[str, Any], rank: int) -> list[int]:
    sizes = raw["sizes"]
    return [rank, raw["offset"], raw["start"], raw["stop"], *raw["offsets"], *sizes, *row_major(sizes)]


def _check_same(index: Index, run_id: str, step: int, world_size: int) -> None:
    if (step, world_size) != (index.step, index.world_size):
        raise DamagedImage(
            f"records of step {step} of {world_size} ranks (run {run_id!r}) lie among those of step {index.step} of "
            f"{index.world_size} ranks (run {index.run_id!r}): use another snapshot"
        )


def _entry_json(header: Header, entry: Entry) -> dict[str, Any]:
    raw: dict[str, Any] = {
        "name": header.name,
        "kind": header.kind,
        "dtype": header.dtype,
        "shape": list(header.shape),
        "at": list(entry.at),
        "pieces": entry.table.to_json(),
    }
    if header.own:
        raw["own"] = True
    if entry.host:
        raw["host"] = True
    if header.kind == "optimizer":
        raw |= {"parameter": header.parameter, "state": header.state}
    return raw


def _member_json(member: Member, lives: Mapping[str, int]) -> list[Any]:
    numbers = member.image_bytes, member.data_start, member.planned_bytes
    return [lives[member.life], member.plan_digest, *numbers]


def _runs(ranks: Sequence[int]) -> Iterator[list[int]]:
    """Ascending numbers as [first, last] of those that follow one another."""
    begin = 0
    for at in range(1, len(ranks) + 1):
        if at == len(ranks) or ranks[at] != ranks[at - 1] + 1:
            yield [ranks[begin], ranks[at - 1]]
            begin = at


def _ranks(runs: Iterable[Sequence[int]], world_size: int) -> list[int]:
    found: list[int] = []
    for first, last in runs:
        if not (_is_number(first) and _is_number(last) and first <= last < world_size):
            raise ValueError(f"{first!r} to {last!r} are no ranks of {world_size}")
        found += range(first, last + 1)
    if len(set(found)) != len(found):
        raise ValueError("a rank twice")
    return found


def _is_number(value: Any) -> bool:
    return type(value) is int and value >= 0
