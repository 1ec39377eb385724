"""Lightning's CheckpointIO over our format: what `ModelCheckpoint` and `save_checkpoint` write, without pickle.

A checkpoint is a folder with a snapshot of one rank: the module's tensors by name, the rest as objects, every block
with its digest. It is written where Lightning writes, by the global rank 0, and is verified when it is read. To write
behind the training: Lightning's own `AsyncCheckpointIO(ResilientCheckpointIO())`.
"""

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import fsspec
import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor

from resilient.checkpoint.digest import block_count, block_range, digest
from resilient.checkpoint.formats.fetched import fetched
from resilient.checkpoint.formats.folder import Folder
from resilient.checkpoint.formats.native import recognise
from resilient.checkpoint.formats.registry import open_source
from resilient.checkpoint.formats.source import Reference, Source
from resilient.checkpoint.image import header
from resilient.checkpoint.leaves import walk
from resilient.checkpoint.levels.image_io import chunks_of, write_image
from resilient.checkpoint.levels.open import open_store
from resilient.checkpoint.levels.store import Store
from resilient.checkpoint.names import image_name, record_name, step_folder
from resilient.checkpoint.objects import encode
from resilient.checkpoint.place import normal_url
from resilient.checkpoint.plan import Plan, data_start, make_plan
from resilient.checkpoint.record import Record
from resilient.checkpoint.tail import Tail
from resilient.errors import UsageError

__all__ = ["ResilientCheckpointIO"]

_MODEL, _REST = "model", "lightning"


class ResilientCheckpointIO(TorchCheckpointIO):
    """`Trainer(plugins=[ResilientCheckpointIO()])`. Checkpoints that torch has written are read, and removed, as ever.

    Saving blocks until the checkpoint is on the medium, and takes as much host memory as it has bytes. Raises
    StateError, naming it, for what cannot be saved without pickle, and LevelFailed.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """At `path`, a folder. What was there is gone only when the new one is whole, unless it is of the same step."""
        if storage_options is not None:
            raise UsageError(
                "ResilientCheckpointIO takes no storage_options: give them in the environment, as for fsspec"
            )
        rest, model = dict(checkpoint), {}
        for name, value in dict(checkpoint.get("state_dict", {})).items():
            if isinstance(value, Tensor):
                model[f"{_MODEL}.{name}"] = value
        rest["state_dict"] = {
            name: value for name, value in dict(rest.get("state_dict", {})).items() if not isinstance(value, Tensor)
        }
        store, step = open_store(normal_url(os.fspath(path))), int(checkpoint.get("global_step", 0))
        before = store.list()
        store.delete([name for name in before if name == record_name(step, 0, 1)])
        _write(store, step, model, rest)
        store.delete([name for name in before if not name.startswith(f"{step_folder(step)}/")])

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Verified, in host memory, or on the device that `map_location` names. Raises DamagedImage, NotACheckpoint."""
        if not _is_ours(path):
            loaded: dict[str, Any] = super().load_checkpoint(path, map_location, weights_only)
            return loaded
        with open_source(Reference(url=normal_url(os.fspath(path)), format="native")) as source:
            rest: dict[str, Any] = dict(source.objects()[_REST])
            tensors = {name.removeprefix(f"{_MODEL}."): _read(source, name) for name in _names(source)}
        rest["state_dict"] = tensors | rest["state_dict"]
        if isinstance(map_location, str | torch.device):
            rest["state_dict"] = {
                name: value.to(map_location) if isinstance(value, Tensor) else value
                for name, value in rest["state_dict"].items()
            }
        return rest

    def remove_checkpoint(self, path: str | Path) -> None:
        if not _is_ours(path):
            super().remove_checkpoint(path)
            return
        store = open_store(normal_url(os.fspath(path)))
        store.delete(store.list())
        files, root = fsspec.core.url_to_fs(os.fspath(path))
        if files.isdir(root) and not files.ls(root):
            files.rmdir(root)


def _is_ours(path: str | Path) -> bool:
    folder = Folder(normal_url(os.fspath(path)))
    try:
        return folder.only_file is None and recognise(folder)
    except FileNotFoundError:
        return False
    finally:
        folder.close()


def _names(source: Source) -> list[str]:
    return [*source.catalog.tensors, *source.catalog.aliases]


def _read(source: Source, name: str) -> Tensor:
    return fetched(source, source.catalog.tensors[source.catalog.aliases.get(name, name)])


def _write(store: Store, step: int, tensors: Mapping[str, Tensor], rest: Mapping[str, Any]) -> None:
    """A snapshot of one rank, by the calling thread."""
    plan = make_plan(walk(dict(tensors)), rank=0)
    tail = Tail(encode({_REST: dict(rest), "resilient.rng": {}}, "state"), plan.data_bytes)
    begins = data_start(plan, tail.header_text)
    image = memoryview(bytearray(begins + tail.end))
    metadata = {"format": "resilient", "rank": "0", "world_size": "1", "step": str(step)}
    image[:begins] = header([plan.header_text, tail.header_text], metadata, begins)
    _fill(image[begins:], plan)
    tail.write(image[begins:])
    record = Record(
        run_id="lightning",
        life=f"{time.time_ns():016x}",
        step=step,
        rank=0,
        world_size=1,
        plan_digest=plan.digest,
        image_name=image_name(step, 0, 1),
        image_bytes=image.nbytes,
        blocks=tuple(digest(image[slice(*block_range(n, image.nbytes))]) for n in range(block_count(image.nbytes))),
        pieces_text=plan.pieces_text,
        software={"torch": torch.__version__},
        data_start=begins,
    )
    write_image(store, record, lambda: chunks_of(image), cancelled=lambda: False)


def _fill(data: memoryview, plan: Plan) -> None:
    for one in plan.planned:
        if one.entry.nbytes:
            flat = one.leaf.local.detach().cpu().contiguous().view(-1).view(torch.uint8)
            data[one.entry.offset : one.entry.offset + one.entry.nbytes] = flat.numpy().data
