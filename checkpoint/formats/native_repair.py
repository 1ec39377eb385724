"""Repair of a snapshot of ours from other levels' URLs: block by block, every block verified before it is used.

Stages: `survey` finds what is wrong at one place → `decide` (pure) says for each rank whose record counts → `Repair`
finds, for every block that is bad, a place that has it whole → and writes each broken image anew, in one step, with its
digests and its record, and reads it back. What one place lacks may come from several others.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from resilient.checkpoint.digest import block_count, block_range, digest
from resilient.checkpoint.formats.native_image import Span, damage_in, tensors_in, told, verify_image
from resilient.checkpoint.formats.source import Finding, Progress
from resilient.checkpoint.levels.image_io import read_fine_digests, read_image_range, read_record, write_image
from resilient.checkpoint.levels.index_io import mend_index
from resilient.checkpoint.levels.store import Store
from resilient.checkpoint.names import image_name, record_name, records_by_step, step_folder
from resilient.checkpoint.record import Record
from resilient.errors import DamagedImage, LevelFailed, NotACheckpoint, RestoreError

_UNREADABLE = (RestoreError, LevelFailed, FileNotFoundError)
Outcome = Literal["well", "repaired", "repairable", "lost"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """What a place says of one rank: its record, or why there is none that can be used."""

    record: Record | None
    problem: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mended:
    """What became of one rank's image. `problems`: what was wrong; `sources`: the URLs that bytes came from."""

    rank: int
    outcome: Outcome
    problems: tuple[str, ...] = ()
    tensors: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()
    blocks: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """Whose record counts for each rank: the number of the place (0: the one to repair), None where nobody has it."""

    life: str
    places: Mapping[int, int | None]
    reason: str


def world_size_of(stores: Sequence[Store], step: int) -> int:
    """How many ranks a step has: as the first place that knows it says, complete ones first. Raises NotACheckpoint."""
    best: tuple[bool, int, int] | None = None
    for store in stores:
        for world_size, ranks in records_by_step(store.list(step_folder(step))).get(step, {}).items():
            found = (len(ranks) == world_size, len(ranks), world_size)
            best = found if best is None or found[:2] > best[:2] else best
    if best is None:
        raise NotACheckpoint(f"{stores[0].url} has no record of step {step}, nor has any other place that was named")
    return best[2]


def survey(store: Store, step: int, world_size: int) -> dict[int, Told]:
    """What a place says of each rank of a step. Reads the records only."""
    found = {}
    for rank in range(world_size):
        try:
            found[rank] = Told(record=read_record(store, step, rank, world_size))
        except FileNotFoundError:
            found[rank] = Told(record=None, problem="its record is not there")
        except _UNREADABLE as error:
            found[rank] = Told(record=None, problem=str(error))
    return found


def decide(surveys: Sequence[Mapping[int, Told]]) -> Choice:
    """The life of the job that is to be repaired, and for each rank the first place with a record of that life.

    Wanted is the life of which most ranks have a record anywhere; of several the one that the first place has most
    of, then the newest. Pure.
    """
    lives = {one.record.life for places in surveys for one in places.values() if one.record is not None}
    if not lives:
        return Choice(life="", places=dict.fromkeys(surveys[0]), reason="no place has a record that can be read")

    def worth(life: str) -> tuple[int, int, str]:
        anywhere = sum(_first(surveys, rank, life) is not None for rank in surveys[0])
        here = sum(one.record is not None and one.record.life == life for one in surveys[0].values())
        return anywhere, here, life

    life = max(lives, key=worth)
    places = {rank: _first(surveys, rank, life) for rank in surveys[0]}
    have = sum(place is not None for place in places.values())
    return Choice(life=life, places=places, reason=f"{have} of {len(places)} ranks have records of one life of the job")


def _first(surveys: Sequence[Mapping[int, Told]], rank: int, life: str) -> int | None:
    for number, places in enumerate(surveys):
        record = places[rank].record
        if record is not None and record.life == life:
            return number
    return None


def verify_step(store: Store, step: int, progress: Progress) -> Iterator[Finding]:
    """What is wrong with a step that does not open as a whole, rank by rank. Raises NotACheckpoint."""
    places = survey(store, step, world_size_of([store], step))
    lives = {one.record.life for one in places.values() if one.record is not None}
    if len(lives) > 1:
        yield Finding(step_folder(step), (), f"its ranks were written in {len(lives)} lives of the job")
    for rank, one in places.items():
        if one.record is None:
            yield Finding(record_name(step, rank, len(places)), (), one.problem)
        else:
            yield from verify_image(store, one.record, progress)


@dataclass(slots=True)
class Repair:
    """One step at one place. `stores[0]` is repaired from the others. One thread."""

    stores: Sequence[Store]
    step: int
    progress: Progress
    _surveys: list[dict[int, Told]] = field(default_factory=list)

    def run(self, *, dry: bool) -> Iterator[Mended]:
        """Every rank in turn, then the index; with `dry` nothing is written. Raises NotACheckpoint, LevelFailed."""
        world_size = world_size_of(self.stores, self.step)
        self._surveys = [survey(store, self.step, world_size) for store in self.stores]
        choice = decide(self._surveys)
        outcomes = set()
        for rank, place in choice.places.items():
            mended = self._of_rank(rank, place, choice, dry=dry)
            outcomes.add(mended.outcome)
            yield mended
        if not dry and outcomes <= {"well", "repaired"}:
            mend_index(self.stores[0], self.step, world_size)

    def _of_rank(self, rank: int, place: int | None, choice: Choice, *, dry: bool) -> Mended:
        here = self._surveys[0][rank]
        if place is None:
            problem = here.problem or "its record is of another life of the job"
            return Mended(rank=rank, outcome="lost", problems=(f"{problem}; {choice.reason}",))
        wanted = self._surveys[place][rank].record
        assert wanted is not None
        problems = [] if place == 0 else [here.problem or "its record is of another life of the job"]
        mine = self._as_stored_here(wanted, here)
        bad = self._bad_blocks(mine, wanted, problems)
        if not problems:
            return Mended(rank=rank, outcome="well")
        found = {number: self._place_with(wanted, rank, number) for number in bad}
        lost = sorted(number for number, other in found.items() if other is None)
        sources = {other for other in found.values() if other is not None} | ({place} if place else set())
        mended = Mended(
            rank=rank,
            outcome="repairable",
            problems=tuple(problems),
            tensors=tensors_in(wanted, _spans(wanted, bad)),
            sources=tuple(self.stores[number].url for number in sorted(sources)),
            blocks=len(bad),
        )
        if lost:
            nowhere = f"no place has {len(lost)} of its {len(wanted.blocks)} blocks whole, first block {lost[0]}"
            names = tensors_in(wanted, _spans(wanted, lost))
            return replace(mended, outcome="lost", problems=(*problems, nowhere), tensors=names)
        if dry:
            return mended
        self._write(wanted, mine, {number: other for number, other in found.items() if other is not None})
        return replace(mended, outcome="repaired")

    def _as_stored_here(self, wanted: Record, here: Told) -> Record:
        """The record by which the image here can be read: its own, or the wanted one, if it lies here in that form."""
        if here.record is not None:
            return here.record
        name = image_name(wanted.step, wanted.rank, wanted.world_size)
        try:
            size = self.stores[0].size(name)
        except _UNREADABLE:
            return wanted
        return replace(wanted, encoding=None) if size == wanted.image_bytes else wanted

    def _bad_blocks(self, mine: Record, wanted: Record, problems: list[str]) -> list[int]:
        """The blocks of the image here that are not as `wanted` has them; adds to `problems`."""
        everything = list(range(block_count(wanted.image_bytes)))
        if mine.image_bytes != wanted.image_bytes:
            problems.append(f"its image has {mine.image_bytes} bytes, not {wanted.image_bytes}")
            return everything
        try:
            bad = damage_in(self.stores[0], replace(wanted, encoding=mine.encoding), self.progress)
        except FileNotFoundError:
            problems.append("its image is not there")
            return everything
        except _UNREADABLE:
            bad = self._one_by_one(mine, wanted, everything)
        if bad:
            problems.append(told(wanted, _spans(wanted, bad)))
        elif not problems:
            try:
                read_fine_digests(self.stores[0], mine)
            except _UNREADABLE as error:
                problems.append(f"its fine digests: {error}")
        return bad

    def _one_by_one(self, mine: Record, wanted: Record, numbers: Sequence[int]) -> list[int]:
        """The same for an image that cannot be read through: it ends early, or its disk has bad places."""
        return [number for number in numbers if _block(self.stores[0], mine, wanted, number) is None]

    def _place_with(self, wanted: Record, rank: int, number: int) -> int | None:
        """The first other place that has a block whole."""
        for place in range(1, len(self.stores)):
            record = self._surveys[place][rank].record
            if record is not None and _block(self.stores[place], record, wanted, number) is not None:
                return place
        return None

    def _write(self, wanted: Record, mine: Record, found: Mapping[int, int]) -> None:
        """The image anew, its record last; read back. Raises DamagedImage when it is not whole even then."""

        def chunks() -> Iterator[memoryview]:
            for number in range(block_count(wanted.image_bytes)):
                place = found.get(number, 0)
                record = mine if place == 0 else self._surveys[place][wanted.rank].record
                assert record is not None
                block = _block(self.stores[place], record, wanted, number)
                if block is None:
                    where = f"{self.stores[place].url}/{record.image_name}"
                    raise DamagedImage(f"{where}: block {number} was whole when it was looked at, and is damaged now")
                yield block

        store, here = self.stores[0], self._surveys[0]
        encodings = [one.record.encoding for one in here.values() if one.record is not None] or [wanted.encoding]
        compression = None if encodings[0] is None else str(encodings[0]["name"])
        written = write_image(store, wanted, chunks, compression=compression, cancelled=lambda: False)
        bad = damage_in(store, read_record(store, written.step, written.rank, written.world_size), lambda _: None)
        if bad:
            raise DamagedImage(f"{store.url}/{written.image_name} was written and read back damaged: replace the disk")


def _spans(record: Record, blocks: Sequence[int]) -> list[Span]:
    return [block_range(number, record.image_bytes) for number in blocks]


def _block(store: Store, record: Record, wanted: Record, number: int) -> memoryview | None:
    """A block as `wanted` has it, from an image that `record` describes; None where it is not so."""
    begin, end = block_range(number, wanted.image_bytes)
    if end > record.image_bytes:
        return None
    part = memoryview(bytearray(end - begin))
    try:
        read_image_range(store, record, begin, part)
    except _UNREADABLE:
        return None
    return part if digest(part) == wanted.blocks[number] else None
