"""Where a run's durable snapshots go, in one spelling: by it the agent knows the run again."""

import os
from pathlib import Path


def normal_url(url: str | os.PathLike[str]) -> str:
    """An absolute path for plain paths and file://; other URLs without a trailing slash."""
    text = os.fspath(url)
    if text.startswith("file://"):
        text = text.removeprefix("file://")
    return text.rstrip("/") if "://" in text else str(Path(text).absolute())
