"""Checkpoints of Megatron-LM: read, in its legacy layout (one file for each model-parallel rank) and in `torch_dist`.

Here an iteration is found; `megatron_ranks.py` opens legacy ones, `megatron_dist.py` those of `torch_dist`.
docs/formats/megatron.md is for users.
"""

import re

from resilient.checkpoint.formats.folder import Folder
from resilient.checkpoint.formats.source import Reference, Source
from resilient.errors import NotACheckpoint

__all__ = ["open_source", "recognise"]

_TRACKER = "latest_checkpointed_iteration.txt"
_RANK = re.compile(r"(iter_\d{7}/|release/|)mp_rank_\d\d(_\d{3}){0,2}/model_optim_rng\.pt")
_DIST = ("metadata.json", "common.pt", ".metadata")
_MOST_TRACKER_BYTES = 64


def recognise(folder: Folder) -> bool:
    """By names: the file that names the latest iteration, or what is in an iteration."""
    names = folder.names
    return _TRACKER in names or any(_RANK.fullmatch(name) for name in names) or all(name in names for name in _DIST)


def open_source(folder: Folder, reference: Reference) -> Source:
    """Open an iteration; `folder` is one, or holds some, of which `reference.step` or the latest is taken.

    Raises FileNotFoundError, NotACheckpoint, DamagedImage, LayoutMismatch, UsageError, LevelFailed.
    """
    from resilient.checkpoint.formats.megatron_dist import MegatronDist
    from resilient.checkpoint.formats.megatron_ranks import MegatronRanks

    inside = _iteration(folder, reference)
    place = Folder(f"{folder.url.rstrip('/')}/{inside}") if inside else folder
    try:
        if any(_RANK.fullmatch(name) for name in place.names):
            return MegatronRanks(reference, place)
        if ".metadata" in place.names:
            return MegatronDist(reference, place)
        raise NotACheckpoint(
            f"{place.url} has neither mp_rank_* folders nor .metadata: it was never finished, or is none"
        )
    except BaseException:
        if place is not folder:
            place.close()
        raise


def _iteration(folder: Folder, reference: Reference) -> str:
    """The folder of the iteration, below; "" where `folder` is it."""
    names = folder.names
    below = {name.split("/", 1)[0] for name in names if "/" in name}
    found = {int(name[5:]): name for name in below if re.fullmatch(r"iter_\d{7}", name)}
    if not found and "release" not in below:
        return ""
    if reference.step is not None:
        if reference.step not in found:
            raise FileNotFoundError(
                f"{folder.url} has no iteration {reference.step}; it has {', '.join(map(str, sorted(found))) or 'none'}"
            )
        return found[reference.step]
    latest = (
        folder.read_all(_TRACKER, _MOST_TRACKER_BYTES).decode("ascii", "replace").strip() if _TRACKER in names else ""
    )
    if latest == "release":
        return "release"
    if latest.isdigit() and int(latest) in found:
        return found[int(latest)]
    if latest:
        raise NotACheckpoint(
            f"{folder.where(_TRACKER)} names iteration {latest!r}, which is not there; name one of "
            f"{', '.join(map(str, sorted(found)))} as the step"
        )
    return found[max(found)] if found else "release"
