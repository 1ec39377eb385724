"""Measured costs, kept from one job to the next in a private file for each kind of machine and group.

A cache: whatever is wrong with a file (gone, unreadable, somebody else's, damaged) means that there is none. It is
never relied upon to be true: see `decide`.
"""

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from resilient.kernels.dispatch.costs import Costs

_VERSION = 1


def folder(environment: Mapping[str, str] = os.environ) -> Path:
    """RESILIENT_CACHE_DIR, or `resilient` in the user's cache (XDG_CACHE_HOME, ~/.cache)."""
    chosen = environment.get("RESILIENT_CACHE_DIR")
    if chosen:
        return Path(chosen)
    base = environment.get("XDG_CACHE_HOME") or os.path.join(environment.get("HOME") or "/nonexistent", ".cache")
    return Path(base) / "resilient"


class Cache:
    """Files in a folder, which is made at the first `keep`, for this user alone."""

    def __init__(self, place: Path) -> None:
        self._place = place

    def find(self, key: Mapping[str, str | int]) -> Costs | None:
        path = self._path(key)
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            with open(descriptor, encoding="utf-8") as file:
                if os.fstat(file.fileno()).st_uid != os.geteuid():
                    return None
                read = json.load(file)
            if read["version"] != _VERSION or read["key"] != dict(key):
                return None
            return Costs.from_json(read["costs"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
            return None

    def keep(self, key: Mapping[str, str | int], costs: Costs) -> None:
        """Replaces what is there for this key at once. A folder that cannot be written to is no error."""
        text = json.dumps({"version": _VERSION, "key": dict(key), "costs": costs.to_json()}, indent=1)
        with contextlib.suppress(OSError):
            self._place.mkdir(mode=0o700, parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=self._place, prefix=".new-", delete=False) as file:  # mode 0600
                try:
                    file.write(text)
                    file.flush()
                    os.replace(file.name, self._path(key))
                except OSError:
                    os.unlink(file.name)

    def forget(self, key: Mapping[str, str | int]) -> None:
        with contextlib.suppress(OSError):
            self._path(key).unlink(missing_ok=True)

    def _path(self, key: Mapping[str, str | int]) -> Path:
        digest = hashlib.sha256(json.dumps(dict(key), sort_keys=True).encode()).hexdigest()[:24]
        return self._place / f"kernels-{digest}.json"
