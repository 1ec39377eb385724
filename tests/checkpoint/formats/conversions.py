"""What tests of conversions share: a conversion of a made checkpoint, what is written then, and a source that fails."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from resilient.checkpoint.formats.convert import Report, convert
from resilient.checkpoint.formats.source import Reference, Source
from resilient.errors import LevelFailed
from tests.checkpoint.formats.made import MadeSource, open_made


def to_safetensors(reference: Reference, target: Path | str, **options: Any) -> Report:
    how: dict[str, Any] = {"open_source": open_made, "workers": 1} | options
    return convert(reference, str(target), to="safetensors", **how)


def written(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of the safetensors files in a folder, as their own library reads them."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


class Failing(MadeSource):
    """Fails when it has read so many times."""

    reads_left = 0

    def read(self, file: int, offset: int, into: memoryview) -> None:
        if not self.reads_left:
            raise LevelFailed(5, "the disk is gone")
        self.reads_left -= 1
        super().read(file, offset, into)


def failing_after(reads: int) -> Callable[[Reference], Source]:
    def opener(reference: Reference) -> Source:
        made = open_made(reference)
        source = Failing(made.reference, made.folder, made.catalog)
        source.reads_left = reads
        return source

    return opener
