"""What a caller may say where and when: the url of the durable snapshots in one spelling, and the number of a step."""

import os
from operator import index
from pathlib import Path

from resilient.checkpoint.levels import claim
from resilient.errors import PolicyError, UsageError

_MOST_STEP = (1 << 62) - 1


def normal_url(url: str | os.PathLike[str]) -> str:
    """An absolute path for plain paths and file://; other URLs without a trailing slash. By it the agent knows the run.

    Raises UsageError for what is neither, and for an empty text, which would mean the present folder.
    """
    if not isinstance(url, str | os.PathLike) or not os.fspath(url):
        raise UsageError(f"url = {url!r} is no place for snapshots: give it a folder, or a URL such as s3://bucket/run")
    text = os.fspath(url)
    if text.startswith("file://"):
        text = text.removeprefix("file://")
    return text.rstrip("/") if "://" in text else str(Path(text).absolute())


def check_apart(url: str, local: str | None) -> None:
    """Raises PolicyError for a local level in the durable one's folder: each deletes what the other is to keep."""
    if local is not None and "://" not in url and os.path.realpath(local) == os.path.realpath(url):
        raise PolicyError(
            f"local = {local!r} is the folder of the durable level, {url}: give the local level a folder of its own, "
            "on a disk of the node, or leave local out"
        )


def others_in(url: str) -> list[str]:
    """What lies in the folder of a url besides what is ours or hidden; nothing where it cannot be looked at.

    Of a folder without snapshots: what somebody may have taken for one.
    """
    try:
        names = os.listdir(url) if "://" not in url else []
    except OSError:
        return []
    return sorted(name for name in names if name != claim.NAME and not name.startswith("."))


def whole_step(step: object) -> int:
    """The number of a step, from an integer of any type (numpy's, a tensor of one element). Raises UsageError."""
    try:
        number = index(step)  # type: ignore[arg-type]
    except TypeError:
        raise UsageError(f"save({step!r}): a step is a whole number, not a {type(step).__name__}") from None
    if not 0 <= number <= _MOST_STEP:
        raise UsageError(f"save({number}): a step is a number from 0 to {_MOST_STEP}")
    return number
