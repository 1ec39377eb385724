"""Checkpoints of DeepSpeed as a source: ZeRO-0 to 3, with tensor and pipeline parallel ranks, read in place.

Nothing is copied at opening: the pickles of the ranks' files say where their tensors lie, and the flat partitions of
ZeRO become pieces of the parameters (`deepspeed_zero.py`). Of ZeRO-3, which stores no 16-bit parameters, the masters
stand for them. Classes of DeepSpeed in the pickles are not imported. How slices of tensor-parallel ranks make up
parameters says `universal_checkpoint_info`, where the job left it, or a specification (`deepspeed_parallel.py`).
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch

from resilient.checkpoint.catalog.catalog import ITEMSIZES, Catalog, Kind, Tensor
from resilient.checkpoint.catalog.spec import Cut, parse_spec
from resilient.checkpoint.formats.deepspeed_files import FilesSource, TorchFiles, malformed
from resilient.checkpoint.formats.deepspeed_model import ModelStates, check_steps, read_layer, read_model
from resilient.checkpoint.formats.deepspeed_names import Files, check_ranks, sort_files, tag_folder, tags_of
from resilient.checkpoint.formats.deepspeed_objects import objects_of, real
from resilient.checkpoint.formats.deepspeed_parallel import Cuts, joined, universal_info
from resilient.checkpoint.formats.deepspeed_plain import plain_optimizer
from resilient.checkpoint.formats.deepspeed_zero import MASTER, Partitions, Ranges, RankFile, zero_1_or_2, zero_3
from resilient.checkpoint.formats.folder import Folder
from resilient.checkpoint.formats.source import Reference
from resilient.checkpoint.formats.stored import StoredTensor
from resilient.errors import DamagedImage, NotACheckpoint

MODEL, OPTIMIZER = "model", "optimizer"
_COMPARED = 64  # values of a parameter with those of a master


def recognise(folder: Folder) -> bool:
    """Whether files of DeepSpeed's ranks lie there, or in folders there, and not only universal checkpoints."""
    return bool(tags_of(folder.names, universal=False))


def open_source(folder: Folder, reference: Reference) -> FilesSource:
    """The tag that `latest` names, or that of `reference.step`; the folder may be a tag's own.

    Raises NotACheckpoint (also for what is not read yet: experts in files of their own, elastic checkpoints),
    DamagedImage where ranks are missing or are of different steps, UsageError where a specification is needed,
    LayoutMismatch where it does not fit.
    """
    files = sort_files(tag_folder(folder, reference, universal=False), folder.names)
    if not files.model_ranks:
        raise NotACheckpoint(f"{folder.url} has no files of DeepSpeed's ranks")
    if files.experts:
        raise NotACheckpoint(
            f"{folder.where(files.experts[0])}: experts that are stored in files of their own are not read yet; "
            "convert the checkpoint with DeepSpeed's ds_to_universal and open that"
        )
    torch_files = TorchFiles(folder, trust=reference.trust_pickle)
    with malformed(folder):
        return _Opening(folder, reference, files, torch_files).source()


class _Opening:
    """From files to a catalog. Stages: model states, optimizer states, and both joined over model-parallel ranks."""

    def __init__(self, folder: Folder, reference: Reference, files: Files, torch_files: TorchFiles) -> None:
        self._folder, self._reference, self._files, self._torch = folder, reference, files, torch_files
        self._catalog = Catalog(format="deepspeed", files=torch_files.listed)

    def source(self) -> FilesSource:
        ranks = self._files.model_ranks
        first = self._model_tree(ranks[0])
        self._check(first, ranks)
        models = [read_model(self._torch.read, self._files, mp, self._at(first, mp)) for mp in ranks]
        self._read_layers(models)
        optimizers = [self._optimizer(model, mp) for model, mp in zip(models, ranks, strict=True)]
        self._join(models, [one for one, _ in optimizers if one is not None], self._cuts(models, optimizers))
        self._catalog.step = first.tree.get("global_steps")
        self._catalog.world_size = int(first.tree.get("dp_world_size") or 1) * len(ranks)
        trees = optimizers[0][1]
        numbers = {name: own for one, _ in optimizers if one is not None for name, own in one.numbers.items()}
        objects = objects_of(
            first,
            trees[0] if trees else self._plain_tree(first),
            self._torch.config,
            {f"{MODEL}.{name}": own for name, own in numbers.items()},
            self._torch.load,
        )
        others = {name: other for model in models for name, other in model.others.items()}
        if others:
            objects[MODEL] = {name: real(value, self._load_of(file)) for name, (file, value) in others.items()}
        return FilesSource(self._reference, self._folder, self._catalog, self._torch, objects)

    def _model_tree(self, mp: int) -> RankFile:
        name = self._files.model.get(mp) or self._files.model_3.get((0, mp))
        if name is None:
            raise DamagedImage(f"{self._folder.url}: the model states of mp_rank_{mp:02d} are missing")
        return self._torch.read(name)

    def _check(self, first: RankFile, ranks: list[int]) -> None:
        tree = first.tree
        if "module" not in tree or "global_steps" not in tree:
            raise NotACheckpoint(f"{first.where} holds no model states of DeepSpeed")
        if ranks != list(range(len(ranks))):
            raise DamagedImage(f"{self._folder.url}: of the model-parallel ranks only {ranks} are there")
        world, slices = tree.get("dp_world_size"), tree.get("mp_world_size")
        degrees = tree.get("checkpoint_parallel_dimensions") or {}
        expected = max(slices or 1, (degrees.get("pp_degree") or 1) * (degrees.get("tp_degree") or 1))
        if type(world) is not int or not 0 < world < 1 << 20 or len(ranks) < expected:
            raise DamagedImage(
                f"{first.where} is of a job of {world!r} data-parallel and {expected} model-parallel ranks; "
                f"the files of {len(ranks)} of these are there"
            )
        check_ranks(self._folder, self._files, world, len(ranks))
        check_steps([self._model_tree(mp) for mp in ranks])

    def _at(self, first: RankFile, mp: int) -> dict[str, int]:
        """The coordinates of a model-parallel rank: pipeline stage by stage."""
        ways = self._slices(first.tree)
        return {"pp": mp // ways, "tp": mp % ways}

    def _slices(self, tree: Mapping[str, Any]) -> int:
        degrees = tree.get("checkpoint_parallel_dimensions") or {}
        told = degrees.get("tp_degree") or (1 if self._files.layers else tree.get("mp_world_size"))
        return max(1, int(told or 1))

    def _read_layers(self, models: list[ModelStates]) -> None:
        for (layer, tp), name in sorted(self._files.layers.items()):
            rank = self._torch.read(name)
            stages = [model for model in models if model.at["tp"] == tp]
            mine = [one for one in stages if any(_is_of_layer(full, layer) for full in _names(one))] or stages[:1]
            if not mine:
                raise DamagedImage(f"{rank.where} is of tensor-parallel rank {tp}, which has no other files")
            read_layer(self._torch.read, mine[0], name, layer)

    def _optimizer(self, model: ModelStates, mp: int) -> tuple[Partitions | None, list[RankFile]]:
        mine = [self._torch.read(name) for (_, of), name in sorted(self._files.optimizer.items()) if of == mp]
        if not mine:
            rank = RankFile(self._torch.number_of(model.where), model.where, model.tree)
            found = plain_optimizer(rank, model, self._fits(model))
            if isinstance(found, str):
                self._catalog.notes.append(f"without optimizer state of {model.where}: {found}")
                return None, []
            return found, []
        ranks = [_inner(rank) for rank in mine]
        for rank in ranks:
            _check_count(rank, len(ranks))
        if model.groups is None:
            raise DamagedImage(f"{model.where} does not say what shapes the partitioned parameters have")
        read = zero_3 if self._files.model_3 else zero_1_or_2
        found = read(ranks, model.groups, model.at)
        self._check_numbers(found, mine)
        return found, ranks

    def _check_numbers(self, found: Partitions, ranks: list[RankFile]) -> None:
        """State that is a single number, such as the step, is the same on all ranks of one checkpoint."""
        looked: set[tuple[int, int]] = set()
        for (name, state), ranges in found.states.items():
            if any(one.shape for one in ranges.held):
                continue
            places = {(one.file, one.offset) for one in ranges.held}
            if len(places) == 1 or places <= looked:
                continue
            looked |= places
            values = {place: self._torch.number_at(*place, ranges.dtype) for place in places}
            if len(set(values.values())) > 1:
                raise DamagedImage(
                    f"{ranks[0].where} and its fellows have {state} = {sorted(set(values.values()))} of {name}: "
                    "they are of different steps"
                )

    def _cuts(self, models: list[ModelStates], optimizers: list[tuple[Partitions | None, list[RankFile]]]) -> Cuts:
        trees = [rank.tree for _, ranks in optimizers for rank in ranks[:1]] + [model.tree for model in models]
        spec = parse_spec(self._reference.spec) if self._reference.spec is not None else None
        ways = 1 + max(model.at["tp"] for model in models)
        return Cuts(spec, universal_info(trees), ways, self._folder.url)

    def _join(self, models: list[ModelStates], optimizers: list[Partitions], cuts: Cuts) -> None:
        self._join_models(models, optimizers, cuts)
        states: dict[tuple[str, str], Ranges] = {}
        for one in optimizers:
            for key, ranges in one.states.items():
                _merge(states, key, ranges)
        for (name, state), ranges in states.items():
            full = f"{MODEL}.{name}"
            self._add(f"{OPTIMIZER}.state.{full}.{state}", "optimizer", ranges, cuts, name, parameter=full, state=state)
        groups: list[dict[str, Any]] = []
        for one in optimizers:
            for number, group in enumerate(one.groups):
                names = [f"{MODEL}.{name}" for name in group["params"]]
                if number == len(groups):
                    groups.append({**group, "params": []})
                groups[number]["params"] += [name for name in names if name not in groups[number]["params"]]
        if optimizers:
            self._catalog.groups[OPTIMIZER] = groups

    def _join_models(self, models: list[ModelStates], optimizers: list[Partitions], cuts: Cuts) -> None:
        tensors: dict[str, Ranges] = {}
        kinds: dict[str, Kind] = {}
        for model in models:
            kinds |= model.kinds
            for name, ranges in model.tensors.items():
                _merge(tensors, name, ranges)
            self._catalog.aliases |= {f"{MODEL}.{a}": f"{MODEL}.{b}" for a, b in model.aliases.items()}
        missing = [
            name for model in models for name in _trained(model) if name not in tensors and name not in model.aliases
        ]
        if missing and not self._files.model_3:
            raise DamagedImage(
                f"{self._folder.url}: the model states have no {missing[0]} (and {len(missing) - 1} more), which the "
                "optimizer holds: the file of a layer is missing"
            )
        for one in optimizers if self._files.model_3 else ():
            for (name, state), ranges in one.states.items():
                if state == MASTER and name not in kinds:
                    _merge(tensors, name, ranges)
        for name, ranges in tensors.items():
            self._add(f"{MODEL}.{name}", kinds.get(name, "parameter"), ranges, cuts, name)

    def _add(self, full: str, kind: Kind, ranges: Ranges, cuts: Cuts, name: str, **more: str) -> None:
        shape = ranges.held[0].shape
        cut = cuts.of(name, shape) if shape and kind != "buffer" else Cut(text=name)
        whole, table = joined(full, cut, ranges.held, ITEMSIZES[ranges.dtype])
        item = OPTIMIZER if kind == "optimizer" else MODEL
        self._catalog.add(
            Tensor(name=full, kind=kind, dtype=ranges.dtype, shape=whole, pieces=table, item=item, **more)
        )

    def _plain_tree(self, first: RankFile) -> RankFile | None:
        saved = first.tree.get("optimizer")
        return RankFile(first.file, first.where, saved) if isinstance(saved, dict) else None

    def _load_of(self, file: int) -> Callable[[StoredTensor], torch.Tensor]:
        return lambda stored: self._torch.load(stored, file)

    def _fits(self, model: ModelStates) -> Callable[[str, StoredTensor], bool]:
        """Whether a master's first values, made as short as the model's, are those of a parameter."""
        file = self._torch.number_of(model.where)

        def fits(name: str, master: StoredTensor) -> bool:
            held, count = model.tensors[name], min(master.numel, _COMPARED)
            own = StoredTensor(held.dtype, (count,), (1,), held.held[0].offset, "")
            low = self._torch.load(own, held.held[0].file)
            high = self._torch.load(replace(master, shape=(count,), strides=(1,)), file)
            return torch.equal(high.to(low.dtype), low)

        return fits


def _inner(rank: RankFile) -> RankFile:
    tree = rank.tree.get("optimizer_state_dict")
    if not isinstance(tree, dict):
        raise DamagedImage(f"{rank.where}: its 'optimizer_state_dict' is {type(tree).__name__}")
    return RankFile(rank.file, rank.where, tree)


def _check_count(rank: RankFile, world: int) -> None:
    told = rank.tree.get("partition_count")
    counts = set(told) if isinstance(told, list) else {told}
    if counts - {world}:
        raise DamagedImage(f"{rank.where} is one of {told} partitions, and the files of {world} are there")


def _trained(model: ModelStates) -> Iterator[str]:
    for shapes in model.groups or []:
        yield from shapes


def _names(model: ModelStates) -> Iterator[str]:
    """All that the states of a pipeline's stage name: it has the layers that these are of."""
    for shapes in (*(model.groups or []), model.tree.get("frozen_param_shapes") or {}):
        yield from shapes
    yield from model.tree.get("buffer_names") or ()


def _is_of_layer(name: str, layer: int) -> bool:
    return name.startswith(f"{layer}.")


def _merge(into: dict[Any, Ranges], key: Any, ranges: Ranges) -> None:
    known = into.get(key)
    if known is None:
        into[key] = Ranges(ranges.dtype, list(ranges.held))
        return
    if known.dtype != ranges.dtype:
        raise DamagedImage(f"{key} is {known.dtype} on one model-parallel rank and {ranges.dtype} on another")
    known.held += ranges.held
