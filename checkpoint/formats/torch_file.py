"""One file of `torch.save`, `.pt`, `.pth`, `.bin` or `.ckpt`: `torch_source.py` reads it, `torch_sink.py` plans one.

Several are read where they are the shards of a model, with an index, as transformers wrote them before safetensors.
docs/formats/torch.md is for users. To recognise one takes no torch, which is slow to import.
"""

from resilient.checkpoint.formats.folder import Folder
from resilient.checkpoint.formats.output import Output, SinkOptions
from resilient.checkpoint.formats.source import Reference, Source
from resilient.errors import DamagedImage, NotACheckpoint

__all__ = ["open_source", "plan", "recognise"]

_INDEX = "pytorch_model.bin.index.json"
_MOST_INDEX_BYTES = 100_000_000
_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")


def recognise(folder: Folder) -> bool:
    """Whether there is one file that is called like one of torch's, or an index of several."""
    return len(_named(folder)) == 1 or folder.has(_INDEX)


def open_source(folder: Folder, reference: Reference) -> Source:
    """Raises NotACheckpoint, DamagedImage, FileNotFoundError, LevelFailed."""
    from resilient.checkpoint.formats.torch_source import TorchSource
    from resilient.checkpoint.formats.torch_zip import open_archive

    index = _index(folder) if folder.only_file is None and folder.has(_INDEX) else {}
    found = sorted(set(index.values())) or ([folder.only_file] if folder.only_file else _named(folder))
    if len(found) != 1 and not index:
        raise NotACheckpoint(f"{folder.url} has {len(found)} files of torch.save at its top; name the one to read")
    source = TorchSource(reference, folder, [open_archive(folder, name) for name in found])
    known = source.catalog.tensors.keys() | source.catalog.aliases.keys()
    for name, file in index.items():
        if f"model.{name}" not in known:
            raise DamagedImage(f"{folder.where(file)} has no tensor {name!r}; the index says that it is there")
    return source


def plan(source: Source, options: SinkOptions) -> list[Output]:
    """See `torch_sink.py`."""
    from resilient.checkpoint.formats.torch_sink import plan

    return plan(source, options)


def _index(folder: Folder) -> dict[str, str]:
    """Which file has which tensor of a model that transformers saved in shards. Raises DamagedImage."""
    from resilient.checkpoint.formats.hf_header import strict_json

    where = folder.where(_INDEX)
    index = strict_json(folder.read_all(_INDEX, _MOST_INDEX_BYTES), where).get("weight_map")
    if not isinstance(index, dict) or not index:
        raise DamagedImage(f"{where} has no weight_map")
    for name, file in index.items():
        if not isinstance(file, str) or "/" in file or not folder.has(file):
            raise DamagedImage(f"{where} says that tensor {name!r} is in {file!r}, which is no file beside it")
    return index


def _named(folder: Folder) -> list[str]:
    return [name for name in folder.names if name.endswith(_SUFFIXES) and "/" not in name]
