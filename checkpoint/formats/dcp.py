"""Checkpoints of `torch.distributed.checkpoint`: a source (`dcp_source.py`) and a sink (`dcp_sink.py`).

docs/formats/dcp.md is for users. To recognise one takes no torch, which is slow to import.
"""

import gc
import re

from resilient.checkpoint.formats.folder import Folder
from resilient.checkpoint.formats.output import Output, SinkOptions
from resilient.checkpoint.formats.source import Reference, Source
from resilient.errors import NotACheckpoint

__all__ = ["open_source", "plan", "recognise"]

_OF_RANK = re.compile(r"^__(\d+)\.metadata$")
_MEGATRON = ("common.pt", "metadata.json")


def recognise(folder: Folder) -> bool:
    """Whether there is DCP's metadata, and it is not a checkpoint of Megatron's, which has more beside it."""
    return bool(_metadata_files(folder)) and not all(folder.has(name) for name in _MEGATRON)


def open_source(folder: Folder, reference: Reference) -> Source:
    """Raises NotACheckpoint, DamagedImage, FileNotFoundError, LevelFailed."""
    from resilient.checkpoint.formats.dcp_metadata import merged, read_metadata
    from resilient.checkpoint.formats.dcp_source import DcpSource

    names = _metadata_files(folder)
    if not names:
        raise NotACheckpoint(f"{folder.url} has no .metadata: it is none of DCP's, or one that was never finished")
    collecting = gc.isenabled()
    gc.disable()  # of millions of small records none is garbage, and looking for it takes most of the time
    try:
        parts = (read_metadata(folder, name, trust=reference.trust_pickle) for name in names)
        return DcpSource(reference, folder, merged(parts))
    finally:
        if collecting:
            gc.enable()


def plan(source: Source, options: SinkOptions) -> list[Output]:
    """See `dcp_sink.py`."""
    from resilient.checkpoint.formats.dcp_sink import plan

    return plan(source, options)


def _metadata_files(folder: Folder) -> list[str]:
    """The checkpoint's metadata, or those of its ranks where each wrote its own (without collectives)."""
    if folder.has(".metadata"):
        return [".metadata"]
    ranks = sorted((int(match[1]), name) for name in folder.names if (match := _OF_RANK.match(name)))
    return [name for _, name in ranks]
