"""How the parts of a snapshot are called, on every level.

    step_00000100/rank_00003-of-00008.safetensors     the image
    step_00000100/rank_00003-of-00008.digests         the digests of its blocks of 64 KiB
    step_00000100/rank_00003-of-00008.json            its record, written last
    step_00000100/catalog.json                        the records of all ranks merged, or nothing: it can be made again

Names are relative to a level's root and use `/` everywhere. Pure functions; nothing here touches a disk.
"""

import re
from collections.abc import Iterable

_RECORD = re.compile(r"^step_(\d{8,})/rank_(\d{5,})-of-(\d{5,})\.json$")
_ANY = re.compile(r"^step_(\d{8,})/")


def step_folder(step: int) -> str:
    return f"step_{step:08d}"


def image_name(step: int, rank: int, world_size: int) -> str:
    return f"{step_folder(step)}/rank_{rank:05d}-of-{world_size:05d}.safetensors"


def digests_name(step: int, rank: int, world_size: int) -> str:
    return f"{step_folder(step)}/rank_{rank:05d}-of-{world_size:05d}.digests"


def record_name(step: int, rank: int, world_size: int) -> str:
    return f"{step_folder(step)}/rank_{rank:05d}-of-{world_size:05d}.json"


def catalog_name(step: int) -> str:
    return f"{step_folder(step)}/catalog.json"


def parse_record_name(name: str) -> tuple[int, int, int] | None:
    """(step, rank, world size) of a record's name; None for any other name."""
    match = _RECORD.match(name)
    return (int(match[1]), int(match[2]), int(match[3])) if match else None


def step_of(name: str) -> int | None:
    """The step whose folder a name lies in; None outside all of them."""
    match = _ANY.match(name)
    return int(match[1]) if match else None


def records_by_step(names: Iterable[str]) -> dict[int, dict[int, set[int]]]:
    """{step: {world size: ranks whose record is there}} of a level's listing."""
    found: dict[int, dict[int, set[int]]] = {}
    for name in names:
        parsed = parse_record_name(name)
        if parsed:
            step, rank, world_size = parsed
            found.setdefault(step, {}).setdefault(world_size, set()).add(rank)
    return found


def complete_steps(names: Iterable[str]) -> dict[int, int]:
    """{step: world size} of the steps for which every rank's record is there (law 3)."""
    return {
        step: world_size
        for step, worlds in records_by_step(names).items()
        for world_size, ranks in worlds.items()
        if ranks == set(range(world_size))
    }
