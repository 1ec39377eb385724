"""The formats, by name, and which one a place holds."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module

from resilient.checkpoint.formats.folder import JOURNAL, Folder
from resilient.checkpoint.formats.output import Plan
from resilient.checkpoint.formats.source import Reference, Source
from resilient.errors import NotACheckpoint, UsageError

FORMATS = ("native", "dcp", "deepspeed", "deepspeed-universal", "megatron", "safetensors", "torch")
SINKS = ("native", "dcp", "deepspeed-universal", "safetensors", "torch")
_MODULES = {
    "native": "native",
    "dcp": "dcp",
    "deepspeed": "deepspeed",
    "deepspeed-universal": "universal",
    "megatron": "megatron",
    "safetensors": "hf_safetensors",
    "torch": "torch_file",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """What a format's module has: `recognise(folder)` by its names alone, `open_source(folder, reference)`, `plan`."""

    name: str
    recognise: Callable[[Folder], bool]
    open_source: Callable[[Folder, Reference], Source]
    plan: Plan | None


def format_of(name: str) -> Format:
    """Raises UsageError for a name that is none."""
    if name not in _MODULES:
        raise UsageError(f"there is no format {name!r}; known are {', '.join(FORMATS)}")
    module = import_module(f"resilient.checkpoint.formats.{_MODULES[name]}")
    return Format(
        name=name,
        recognise=module.recognise,
        open_source=module.open_source,
        plan=module.plan if name in SINKS else None,
    )


def recognise(folder: Folder) -> str:
    """The name of the format that lies there. Raises NotACheckpoint, FileNotFoundError."""
    for name in FORMATS:  # from what is told for sure by its names to what any file could be
        if format_of(name).recognise(folder):
            return name
    raise NotACheckpoint(
        f"{folder.url} is no checkpoint that is known ({', '.join(FORMATS)}); name its format if it is one"
    )


def open_source(reference: Reference) -> Source:
    """Open a checkpoint.

    Raises FileNotFoundError, NotACheckpoint, DamagedImage, NewerFormat, UsageError, LevelFailed.
    """
    folder = Folder(reference.url)
    try:
        if folder.has(JOURNAL):
            raise NotACheckpoint(
                f"{folder.url} is what an interrupted conversion left: run that once more to finish it"
            )
        name = reference.format or recognise(folder)
        return format_of(name).open_source(
            folder, replace(reference, format=name)
        )  # workers need not recognise it again
    except BaseException:
        folder.close()
        raise
