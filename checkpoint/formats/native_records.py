"""Which step of a level a URL means, and the records of a step: all that listing and pruning need, without torch.

`native.py` opens what is found here.
"""

import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from resilient.checkpoint.levels.image_io import RECORD_READERS, read_record
from resilient.checkpoint.levels.store import Store
from resilient.checkpoint.record import Record
from resilient.errors import DamagedImage

_STEP_FOLDER = re.compile(r"^step_(\d{8,})$")


@dataclass(frozen=True, slots=True)
class Place:
    """A level's URL, and the step if the URL that was given is a step's own folder."""

    url: str
    step: int | None


def place_of(url: str) -> Place:
    """The level that a URL means. Looks at nothing but its text."""
    root, _, last = url.rstrip("/").rpartition("/")
    match = _STEP_FOLDER.match(last)
    return Place(root or ".", int(match[1])) if match else Place(url, None)


def read_records(store: Store, step: int, ranks: Iterable[int], world_size: int) -> dict[int, Record]:
    """The records of these ranks. Raises what `read_record` does, for the first that cannot be read.

    Their pieces are kept as text, which takes a fifth of the memory.
    """
    wanted = list(ranks)
    with ThreadPoolExecutor(RECORD_READERS, thread_name_prefix="resilient-records") as pool:
        found = pool.map(lambda rank: replace(read_record(store, step, rank, world_size), parsed=None), wanted)
        return dict(zip(wanted, found, strict=True))


def check_lives(url: str, step: int, lives: Mapping[int, str]) -> None:
    """`lives`: by rank. Raises DamagedImage where the ranks' images are not of one snapshot."""
    ranks_of: dict[str, list[int]] = {}
    for rank, life in lives.items():
        ranks_of.setdefault(life, []).append(rank)
    if len(ranks_of) > 1:
        told = "; ".join(f"ranks {ranks}" for ranks in ranks_of.values())
        raise DamagedImage(f"{url}: step {step} was written by two lives of the job ({told}); use another step")
