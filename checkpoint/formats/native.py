"""Snapshots of ours as a source and a sink of conversions: step folders with images, fine digests and records.

What is read is verified (law 5): by the digests of 64 KiB where the record has them, else by whole blocks. The place is
a level's URL, of which one complete step is opened, or a step's own folder. Here: finding a step and reading it. The
bytes of one image are the business of `native_image.py`; writing is in `native_sink.py`; what a single image is, when
there is nothing beside it, is for `hf_safetensors.py`.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from resilient.checkpoint.catalog.catalog import Catalog
from resilient.checkpoint.catalog.index import Index
from resilient.checkpoint.catalog.native import native_catalog
from resilient.checkpoint.extras import columns_by_parameter
from resilient.checkpoint.formats.folder import Folder
from resilient.checkpoint.formats.native_image import MALFORMED, Kept, VerifiedImage, verify_image
from resilient.checkpoint.formats.native_records import Place, check_lives, place_of, read_records
from resilient.checkpoint.formats.native_sink import plan as plan
from resilient.checkpoint.formats.source import Finding, Progress, Reference, Source
from resilient.checkpoint.levels.index_io import current_index, stored_index
from resilient.checkpoint.levels.open import open_store
from resilient.checkpoint.levels.store import Store
from resilient.checkpoint.names import (
    catalog_name,
    complete_steps,
    parse_record_name,
    record_name,
    records_by_step,
    step_folder,
)
from resilient.checkpoint.record import Record
from resilient.errors import DamagedImage, NotACheckpoint

_RECORD = re.compile(r"^rank_\d{5,}-of-\d{5,}\.json$")


def recognise(folder: Folder) -> bool:
    """Whether records lie there, in folders of steps or, where it is the folder of a step, at its top."""
    of_step = place_of(folder.url).step is not None
    return any(_RECORD.match(name) if of_step else parse_record_name(name) for name in folder.names)


def open_source(folder: Folder, reference: Reference) -> "NativeSource":
    """A complete step, the newest if none is named.

    Raises NotACheckpoint where there is no such step, DamagedImage for records that are damaged or of two lives,
    NewerFormat, LevelFailed.
    """
    place = place_of(folder.url)
    if place.step is not None:
        folder.close()
        folder = Folder(place.url)
    store = open_store(place.url)
    step, world_size = _step_to_open(store, place, reference.step)
    try:
        index = current_index(store, step, world_size)
        check_lives(store.url, step, {rank: member.life for rank, member in index.members.items()})
        return NativeSource(reference, folder, native_catalog(index), store, index)
    except MALFORMED as error:
        raise DamagedImage(
            f"{store.url}: the records of step {step} are not as the format says ({type(error).__name__}: {error})"
        ) from error


class NativeSource(Source):
    """One snapshot. The record of an image is read when its bytes are."""

    def __init__(self, reference: Reference, folder: Folder, catalog: Catalog, store: Store, index: Index) -> None:
        super().__init__(reference, folder, catalog)
        self.store = store
        self._index = index
        self._kept = Kept()
        self._images: dict[int, VerifiedImage] = {}
        self._objects: dict[int, dict[str, Any]] = {}
        self._complete_groups()

    @property
    def records(self) -> dict[int, Record]:
        """Those of all ranks. Reads them each time. Raises what `read_record` does."""
        ranks = range(self._index.world_size)
        return read_records(self.store, self._index.step, ranks, self._index.world_size)

    def read(self, file: int, offset: int, into: memoryview) -> None:
        self._image(file).read(self.catalog.files[file].begins + offset, into)

    def _image(self, rank: int) -> VerifiedImage:
        if rank not in self._images:
            index = self._index
            (record,) = read_records(self.store, index.step, [rank], index.world_size).values()
            problem = index.disagreement(record)
            if problem is not None:
                raise DamagedImage(
                    f"{self.store.url}: step {index.step} was written again after it had been opened: {problem}"
                )
            self._images[rank] = VerifiedImage(self.store, record, self._kept)
        return self._images[rank]

    def objects(self, rank: int = 0) -> dict[str, Any]:
        """As they were given to `save`; under `resilient.rng` the random generators.

        Of an optimizer `state` (what is no tensor, by parameter) and what else docs/format.md names.
        """
        rank = rank if rank < self._index.world_size else 0
        if rank not in self._objects:
            found = self._image(rank).objects()
            for item in self.catalog.groups.keys() & found.keys():
                found[item] = {**found[item], "state": columns_by_parameter(found[item]["state"])}
            self._objects[rank] = found
        return self._objects[rank]

    def verify(self, progress: Progress) -> Iterator[Finding]:
        for record in self.records.values():
            yield from verify_image(self.store, record, progress)
        _, problem = stored_index(self.store, self._index.step, self._index.world_size)
        if problem:
            name = catalog_name(self._index.step)
            yield Finding(name, (), f"{problem}: it is made anew where it is needed, and by `resilient repair`")

    def _complete_groups(self) -> None:
        """The records have the names of the parameters of each group, the objects their hyperparameters.

        Those of rank 0, and where it has fewer groups (a pipeline's stages have optimizers of their own) of the others.
        """
        for item, groups in self.catalog.groups.items():
            done = 0
            for rank in range(self._index.world_size):
                saved = self.objects(rank).get(item, {}).get("param_groups", [])
                for group, values in zip(groups[done:], saved[done:], strict=False):
                    group.update(values)
                done = max(done, len(saved))
                if done >= len(groups):
                    break
            if done != len(groups):
                raise DamagedImage(
                    f"{self.store.url}, step {self.catalog.step}: optimizer {item!r} has {len(groups)} groups of "
                    f"parameters in the records and {done} among the objects"
                )


def step_at(reference: Reference) -> tuple[Store, int] | None:
    """Where a snapshot of ours lies and which step `open_source` would open; None where there is none of ours."""
    folder = Folder(reference.url)
    try:
        if reference.format not in (None, "native") or folder.only_file is not None or not recognise(folder):
            return None
    finally:
        folder.close()
    place = place_of(reference.url)
    store = open_store(place.url)
    return store, _step_to_open(store, place, reference.step)[0]


def _step_to_open(store: Store, place: Place, asked: int | None) -> tuple[int, int]:
    """(step, world size). Raises NotACheckpoint."""
    url, wanted = place.url, asked if place.step is None else place.step
    names = store.list() if wanted is None else store.list(step_folder(wanted))
    complete = complete_steps(names)
    if wanted is None:
        if not complete:
            raise NotACheckpoint(f"{url} has no complete step{_incomplete(records_by_step(names))}")
        step = max(complete)
        return step, complete[step]
    if wanted not in complete:
        found = records_by_step(names)
        known = ", ".join(map(str, sorted(complete_steps(store.list())))) or "none"
        why = _incomplete({wanted: found[wanted]}) if wanted in found else ""
        raise NotACheckpoint(f"{url} has no complete step {wanted}{why}; complete are: {known}")
    return wanted, complete[wanted]


def _incomplete(found: Mapping[int, Mapping[int, set[int]]]) -> str:
    """What is missing of the newest of these steps, for a message."""
    if not found:
        return ""
    step = max(found)
    world_size, ranks = max(found[step].items(), key=lambda item: len(item[1]))
    missing = sorted(set(range(world_size)) - ranks)
    first = record_name(step, missing[0], world_size) if missing else ""
    return f" (of step {step} the records of {len(missing)} of {world_size} ranks are missing, first {first})"
