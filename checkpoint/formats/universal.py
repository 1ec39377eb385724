"""DeepSpeed universal checkpoints: a folder a parameter, a file a state. As a source, DeepSpeed's own and ours.

DeepSpeed's converter leaves two kinds: from ZeRO-1 and 2 dicts with the whole tensor and how it is cut, from ZeRO-3
bare flat tensors. Frozen parameters and buffers are in the copied model states, where its own loader does not look.
Writing is in `universal_sink.py`.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from resilient.checkpoint.catalog.catalog import ITEMSIZES, Catalog, Kind, Tensor
from resilient.checkpoint.catalog.spec import Cut
from resilient.checkpoint.catalog.table import PieceTable, StoredPiece
from resilient.checkpoint.formats.deepspeed_files import FilesSource, TorchFiles, malformed
from resilient.checkpoint.formats.deepspeed_model import ModelStates, read_model
from resilient.checkpoint.formats.deepspeed_names import OPTIMIZER_STATE, Files, sort_files, tag_folder, tags_of
from resilient.checkpoint.formats.deepspeed_objects import objects_of
from resilient.checkpoint.formats.deepspeed_parallel import joined
from resilient.checkpoint.formats.deepspeed_zero import MASTER, RankFile
from resilient.checkpoint.formats.folder import Folder
from resilient.checkpoint.formats.source import Reference
from resilient.checkpoint.formats.stored import StoredTensor
from resilient.checkpoint.formats.universal_sink import NUMBERS, OTHER_STATES
from resilient.checkpoint.formats.universal_sink import plan as plan
from resilient.checkpoint.pieces import Piece
from resilient.errors import DamagedImage

MODEL, OPTIMIZER = "model", "optimizer"
_STATE = re.compile(r"^zero/([^/]+)/([^/]+)\.pt$")


def recognise(folder: Folder) -> bool:
    """Whether there is a `zero/optimizer_state.pt` beside ranks' files, here or in a folder here."""
    return bool(tags_of(folder.names, universal=True))


def open_source(folder: Folder, reference: Reference) -> FilesSource:
    """The folder that `latest_universal` names, or that of `reference.step`, or the folder itself.

    Raises NotACheckpoint, DamagedImage.
    """
    prefix = tag_folder(folder, reference, universal=True)
    with malformed(folder):
        return _Opening(folder, reference, prefix, TorchFiles(folder, trust=reference.trust_pickle)).source()


class _Opening:
    def __init__(self, folder: Folder, reference: Reference, prefix: str, files: TorchFiles) -> None:
        self._folder, self._reference, self._prefix, self._torch = folder, reference, prefix, files
        self._catalog = Catalog(format="deepspeed-universal", files=files.listed)

    def source(self) -> FilesSource:
        files = sort_files(self._prefix, self._folder.names)
        model, first = self._model(files)
        optimizer = self._torch.read(f"{self._prefix}{OPTIMIZER_STATE}")
        states = dict(self._states())
        shapes = {name: shape for group in model.groups or [] for name, shape in group.items()}
        trained = {name for name, own in states.items() if set(own) > {MASTER} or name in shapes}
        missing = sorted(set(shapes) - {name for name, own in states.items() if MASTER in own})
        if missing:
            raise DamagedImage(
                f"{self._folder.where(f'{self._prefix}zero')}: {len(missing)} of {len(shapes)} parameters are missing, "
                f"first {missing[0]}"
            )
        self._add_model(model, states, trained, shapes)
        for name, own in states.items():
            if name in trained:
                self._add_states(name, own, shapes, _common_step(optimizer))
        self._add_others()
        self._add_groups(optimizer, model)
        self._catalog.step = first.tree.get("global_steps")
        numbers = optimizer.tree.get(NUMBERS)
        numbers = numbers if isinstance(numbers, Mapping) else {}
        objects = objects_of(
            first,
            optimizer,
            self._torch.config,
            {f"{MODEL}.{name}": own for name, own in numbers.items() if isinstance(own, Mapping)},
            self._torch.load,
        )
        return FilesSource(self._reference, self._folder, self._catalog, self._torch, objects)

    def _model(self, files: Files) -> tuple[ModelStates, RankFile]:
        """Of the first model-parallel rank: slices of frozen parameters could not be told from whole ones."""
        if files.model:
            files.model_3 = {}
        elif not files.model_3:
            raise DamagedImage(f"{self._folder.where(self._prefix)}: the model states are missing")
        ranks = files.model_ranks
        model = read_model(self._torch.read, files, ranks[0], {})
        if len(files.model or {mp for _, mp in files.model_3}) > 1:
            self._catalog.notes.append(
                "frozen parameters are left out: of several model-parallel ranks each has a slice"
            )
            for name in [name for name, kind in model.kinds.items() if kind == "parameter"]:
                del model.tensors[name], model.kinds[name]
        name = files.model.get(ranks[0]) or files.model_3[0, ranks[0]]
        return model, self._torch.read(name)

    def _states(self) -> Iterator[tuple[str, dict[str, tuple[RankFile, Any]]]]:
        """For each parameter its states: the file, and what it holds."""
        found: dict[str, dict[str, tuple[RankFile, Any]]] = {}
        for full in self._folder.names:
            match = _STATE.match(full.removeprefix(self._prefix)) if full.startswith(self._prefix) else None
            if match is not None:
                found.setdefault(match[1], {})[match[2]] = self._torch.value(full)
        yield from found.items()

    def _add_model(
        self,
        model: ModelStates,
        states: Mapping[str, dict[str, tuple[RankFile, Any]]],
        trained: set[str],
        shapes: Mapping[str, tuple[int, ...]],
    ) -> None:
        for name, ranges in model.tensors.items():
            if name in trained and not any(one.end for one in ranges.held):
                continue  # a placeholder
            whole, table = joined(name, Cut(text=name), ranges.held, ITEMSIZES[ranges.dtype])
            self._put(f"{MODEL}.{name}", model.kinds[name], ranges.dtype, whole, table)
        for name, own in states.items():
            full = f"{MODEL}.{name}"
            if full not in self._catalog.tensors and MASTER in own and name not in model.aliases:
                self._put_stored(full, "parameter", *own[MASTER], shapes.get(name))
        self._catalog.aliases = {f"{MODEL}.{a}": f"{MODEL}.{b}" for a, b in model.aliases.items()}

    def _add_states(
        self,
        name: str,
        own: dict[str, tuple[RankFile, Any]],
        shapes: Mapping[str, tuple[int, ...]],
        step: tuple[RankFile, Any] | None,
    ) -> None:
        full = f"{MODEL}.{name}"
        told = {**({"step": step} if step is not None and set(own) > {MASTER} else {}), **own}
        for state, (rank, value) in told.items():
            self._put_stored(
                f"{OPTIMIZER}.state.{full}.{state}",
                "optimizer",
                rank,
                value,
                None if state == "step" else shapes.get(name),
                parameter=full,
                state=state,
            )

    def _add_others(self) -> None:
        name = f"{self._prefix}{OTHER_STATES}"
        if not self._folder.has(name):
            return
        rank = self._torch.read(name)
        for parameter, states in rank.tree.items():
            for state, value in states.items() if isinstance(states, dict) else ():
                full = f"{MODEL}.{parameter}"
                self._put_stored(
                    f"{OPTIMIZER}.state.{full}.{state}", "optimizer", rank, value, None, parameter=full, state=state
                )

    def _put_stored(
        self, full: str, kind: Kind, rank: RankFile, value: Any, shape: tuple[int, ...] | None, **more: str
    ) -> None:
        """A stored tensor, in the shape that the model has it; a plain number is left to the objects."""
        stored = value.get("param") if isinstance(value, Mapping) else value
        if not isinstance(stored, StoredTensor):
            if isinstance(value, int | float):
                return
            raise DamagedImage(f"{rank.where} holds no tensor but {type(stored).__name__}")
        if shape is None or stored.shape == shape:
            whole, strides = stored.shape, None if stored.is_contiguous else stored.strides
        elif stored.is_contiguous and len(stored.shape) == 1 and stored.numel == _numel(shape):
            whole, strides = shape, None
        elif isinstance(value, Mapping) and value.get("vocab_tensor"):
            whole, strides = stored.shape, None if stored.is_contiguous else stored.strides
        else:
            raise DamagedImage(f"{rank.where} has the shape {stored.shape}; the model states say {shape}")
        piece = StoredPiece(piece=Piece.whole(whole), file=rank.file, offset=stored.offset, strides=strides)
        self._put(full, kind, stored.dtype, whole, PieceTable.of([piece]), **more)

    def _put(self, full: str, kind: Kind, dtype: str, shape: tuple[int, ...], table: PieceTable, **more: str) -> None:
        item = OPTIMIZER if kind == "optimizer" else MODEL
        self._catalog.add(Tensor(name=full, kind=kind, dtype=dtype, shape=shape, pieces=table, item=item, **more))

    def _add_groups(self, optimizer: RankFile, model: ModelStates) -> None:
        inner = optimizer.tree.get("optimizer_state_dict")
        groups = optimizer.tree.get("param_groups") or (inner.get("param_groups") if isinstance(inner, dict) else None)
        if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
            raise DamagedImage(f"{optimizer.where}: its 'param_groups' are {type(groups).__name__}")
        sub_groups = model.groups or []
        place = 0
        for group in groups:
            names = group.get("params") or []
            if not all(isinstance(name, str) for name in names):  # numbers of flat partitions, as ordered in the shapes
                names = [name for shapes in sub_groups[place : place + len(names)] for name in shapes]
                place += len(group["params"])
            values = {key: value for key, value in group.items() if key != "params"}
            self._catalog.groups.setdefault(OPTIMIZER, []).append(
                {**values, "params": [f"{MODEL}.{name}" for name in names]}
            )


def _common_step(optimizer: RankFile) -> tuple[RankFile, Any] | None:
    """The step that ZeRO-3 keeps once for all parameters."""
    inner = optimizer.tree.get("optimizer_state_dict")
    states = inner.get("state") if isinstance(inner, dict) else None
    first = states.get(0) if isinstance(states, dict) else None
    step = first.get("step") if isinstance(first, dict) else None
    return (optimizer, step) if isinstance(step, StoredTensor) and not step.shape else None


def _numel(shape: tuple[int, ...]) -> int:
    numel = 1
    for size in shape:
        numel *= size
    return numel
