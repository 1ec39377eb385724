"""What a rank's lanes are doing, in a file that is written anew every second: for `resilient net watch`."""

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

EVERY_S = 1.0
SUFFIX = ".lanes.json"


class StatusFile:
    """`folder` "": none is written. The file is for its owner's eyes alone, and goes when the lanes do."""

    def __init__(self, folder: str, group: str) -> None:
        self._path: Path | None = None
        self._next = 0.0
        if folder:
            os.makedirs(folder, mode=0o700, exist_ok=True)
            self._path = Path(folder) / f"{group}.{os.getpid()}.{id(self):x}{SUFFIX}"

    def due(self, now: float) -> bool:
        """Whether it is time to write again; from then on it is not."""
        if self._path is None or now < self._next:
            return False
        self._next = now + EVERY_S
        return True

    def write(self, report: Mapping[str, Any]) -> None:
        """A disk that is full, or a folder that is gone, is no reason to stop a training."""
        assert self._path is not None
        new = self._path.with_suffix(".new")
        with suppress(OSError):
            descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with open(descriptor, "w") as file:
                json.dump(report, file)
            os.replace(new, self._path)

    def remove(self) -> None:
        if self._path is not None:
            with suppress(OSError):
                self._path.unlink()
