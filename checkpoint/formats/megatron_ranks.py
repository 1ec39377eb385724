"""An iteration of Megatron-LM's legacy layout: `mp_rank_TT[_PPP][_EEE]/model_optim_rng.pt`, one for each rank's model.

Stages: the ranks' files are read (names and offsets only) → the names of layers and experts are numbered on over the
ranks → slices are joined by the specification, by default the preset for the job's arguments → the optimizer's
numbers get the names of parameters, if they fit (`megatron_optimizer.py`).
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from resilient.checkpoint.catalog.assemble import Held, assemble
from resilient.checkpoint.catalog.catalog import ITEMSIZES, Catalog, File, Kind, Tensor
from resilient.checkpoint.catalog.cut import Cut
from resilient.checkpoint.catalog.spec import Spec, parse_spec, preset
from resilient.checkpoint.catalog.table import PieceTable
from resilient.checkpoint.formats.folder import Folder
from resilient.checkpoint.formats.megatron_optimizer import Unfit, optimizer_of
from resilient.checkpoint.formats.source import Finding, Progress, Reference, Source
from resilient.checkpoint.formats.state_catalog import loaded
from resilient.checkpoint.formats.stored import StoredTensor
from resilient.checkpoint.formats.torch_source import checked
from resilient.checkpoint.formats.torch_values import OneFile, is_stored, read_tree, stored_leaves
from resilient.checkpoint.formats.torch_zip import Archive, open_archive
from resilient.checkpoint.formats.values import is_floating
from resilient.errors import DamagedImage, NotACheckpoint, UsageError

__all__ = ["MegatronRanks"]

_FILE = re.compile(r"mp_rank_(\d\d)(?:_(\d{3}))?(?:_(\d{3}))?/model_optim_rng\.pt")
_MODEL = re.compile(r"model(\d*)")
_BUFFERS = ("expert_bias", "local_tokens_per_expert")
_LEAST_VERSION = 2  # before, heads were ordered otherwise
_MOST_RANKS = 1 << 14


@dataclass(slots=True)
class RankFile:
    """One file: the coordinates of its rank, and its tree. `chunks`: of each part of the model its tensors.

    With interleaved pipelines a rank has several parts; their coordinate "pp" counts on over all of them.
    """

    number: int
    archive: Archive
    at: dict[str, int]
    tree: dict[str, Any]
    chunks: list[tuple[dict[str, int], dict[str, StoredTensor]]] = field(default_factory=list)


class MegatronRanks(Source):
    """See the module."""

    def __init__(self, reference: Reference, folder: Folder) -> None:
        super().__init__(reference, folder, Catalog(format="megatron"))
        self.ranks = _read(folder, reference.trust_pickle)
        self.args: Mapping[str, Any] = self.ranks[0].tree.get("args") or {}
        self.catalog.files = [File(rank.archive.name, folder.size(rank.archive.name)) for rank in self.ranks]
        self.catalog.world_size = len(self.ranks)
        self.catalog.step = _iteration(folder, self.ranks)
        self.spec = _spec(reference, self.args)
        self._left: set[str] = set()
        _Filler(self).fill()

    def objects(self, rank: int = 0) -> dict[str, Any]:
        """Arguments, scheduler, random generators and counters of a rank's file."""
        one = self.ranks[rank] if 0 <= rank < len(self.ranks) else self.ranks[0]
        rest = {key: value for key, value in one.tree.items() if key != "optimizer" and not _MODEL.fullmatch(key)}
        made: dict[str, Any] = loaded(rest, stored_leaves(OneFile(self.folder, one.archive.name)))
        return made

    def verify(self, progress: Progress) -> Iterator[Finding]:
        """Compares every storage with the checksum that torch.save wrote, where it wrote one."""
        for rank in self.ranks:
            for key, member in rank.archive.storages():
                problem = checked(self.folder, rank.archive.name, member, progress)
                if problem is not None:
                    yield Finding(rank.archive.name, (), f"storage {key}: {problem}")


def _read(folder: Folder, trust: bool) -> list[RankFile]:
    """All files, in the order of their names. Raises DamagedImage where one is missing."""
    found = [(name, match) for name in folder.names if (match := _FILE.fullmatch(name))]
    if len(found) > _MOST_RANKS:
        raise NotACheckpoint(f"{folder.url} has {len(found)} files of ranks; at most {_MOST_RANKS} are read")
    ranks: list[RankFile] = []
    for number, (name, match) in enumerate(found):
        archive = open_archive(folder, name)
        tree = read_tree(archive, trust=trust)
        if not isinstance(tree, dict) or not any(_MODEL.fullmatch(str(key)) for key in tree):
            raise NotACheckpoint(f"{folder.where(name)} has no model; it is no file of Megatron's")
        args = ranks[0].tree.get("args") if ranks else tree.get("args")
        if not isinstance(args, dict):
            raise NotACheckpoint(f"{folder.where(name)} has no arguments of the job, which say how it was parallel")
        tensor, second, third = (int(part) if part else None for part in match.groups())
        stages = _size(args, "pipeline_model_parallel_size")
        stage, expert = (second, third) if stages > 1 else (0, second)
        at = {"tp": tensor or 0, "pp": stage or 0, "ep": expert or 0}
        rank = RankFile(number, archive, at, tree)
        rank.chunks = list(_chunks(folder, rank, stages))
        ranks.append(rank)
    _check_all_there(folder, ranks)
    return ranks


def _chunks(folder: Folder, rank: RankFile, stages: int) -> Iterator[tuple[dict[str, int], dict[str, StoredTensor]]]:
    for key, model in rank.tree.items():
        match = _MODEL.fullmatch(str(key))
        if match is None:
            continue
        if not isinstance(model, dict):
            raise DamagedImage(f"{folder.where(rank.archive.name)}: its {key!r} is no state of a module")
        at = {**rank.at, "pp": int(match[1] or 0) * stages + rank.at["pp"]}
        yield at, dict(_flat(model, ""))


def _flat(model: Mapping[Any, Any], prefix: str) -> Iterator[tuple[str, StoredTensor]]:
    """Tensors by name; older models nest the states of their modules."""
    for key, value in model.items():
        name = f"{prefix}{key}"
        if is_stored(value) and not name.endswith("_extra_state"):
            yield name, value
        elif isinstance(value, dict):
            yield from _flat(value, f"{name}.")


def _check_all_there(folder: Folder, ranks: list[RankFile]) -> None:
    args = ranks[0].tree["args"]
    sizes = {
        "tp": _size(args, "tensor_model_parallel_size"),
        "pp": _size(args, "pipeline_model_parallel_size"),
        "ep": _size(args, "expert_model_parallel_size"),
    }
    have = {(rank.at["tp"], rank.at["pp"], rank.at["ep"]) for rank in ranks}
    for tensor in range(sizes["tp"]):
        for stage in range(sizes["pp"]):
            for expert in range(sizes["ep"]):
                if (tensor, stage, expert) not in have:
                    raise DamagedImage(
                        f"{folder.url}: the file of tensor-parallel rank {tensor}, stage {stage}, expert-parallel rank "
                        f"{expert} is missing; the job had {sizes['tp']} x {sizes['pp']} x {sizes['ep']}"
                    )
    version = ranks[0].tree.get("checkpoint_version", 3.0)
    if isinstance(version, int | float) and version < _LEAST_VERSION:
        raise NotACheckpoint(
            f"{folder.url} has checkpoint version {version}, with another order of attention heads; load and save it "
            "with a newer Megatron-LM"
        )


def _iteration(folder: Folder, ranks: list[RankFile]) -> int | None:
    steps = {rank.tree.get("iteration") for rank in ranks}
    if len(steps) > 1:
        told = ", ".join(f"{rank.archive.name}: {rank.tree.get('iteration')}" for rank in ranks[:8])
        raise DamagedImage(f"{folder.url}: its files are of different iterations ({told})")
    step = steps.pop()
    return step if type(step) is int else None


def _size(args: Mapping[str, Any], key: str) -> int:
    value = args.get(key)
    return value if type(value) is int and 0 < value <= _MOST_RANKS else 1


def _spec(reference: Reference, args: Mapping[str, Any]) -> Spec:
    if reference.spec is None:
        name = "megatron-swiglu" if args.get("swiglu") is True else "megatron"
        return parse_spec(preset(name), f"preset {name}")
    spec = parse_spec(reference.spec)
    if "tp" not in spec.axes and _size(args, "tensor_model_parallel_size") > 1:
        raise UsageError(f"{spec.where}: the mesh has no axis 'tp', over which the checkpoint is cut")
    return spec


@dataclass(slots=True)
class _Gathered:
    """What the ranks have of one tensor. `like`: the shape of the parameter on each, for state."""

    kind: Kind
    dtype: str
    parameter: str = ""
    state: str = ""
    held: list[Held] = field(default_factory=list)
    like: tuple[int, ...] = ()


class _Filler:
    """Fills a source's catalog."""

    def __init__(self, source: MegatronRanks) -> None:
        self.source = source
        self.catalog = source.catalog
        self.folder = source.folder
        self.found: dict[str, _Gathered] = {}

    def fill(self) -> None:
        chunks = [(rank, at, tensors) for rank in self.source.ranks for at, tensors in rank.chunks]
        names = self.source.spec.global_names([(at, tensors) for _, at, tensors in chunks])
        tied = self._tied([name for one in names for name in one.values()])
        for (rank, at, tensors), called in zip(chunks, names, strict=True):
            for local, tensor in tensors.items():
                if called[local] != tied:
                    self._hold(rank, at, f"model.{called[local]}", tensor, _kind(local, tensor))
        if tied:
            self.catalog.aliases[f"model.{tied}"] = "model.embedding.word_embeddings.weight"
        self._optimizers(chunks, names)
        for name, one in self.found.items():
            self._add(name, one)
        self._tell()

    def _tied(self, names: list[str]) -> str:
        """The head, where it is the embedding: the last stage has a copy."""
        shared = self.source.args.get("untie_embeddings_and_output_weights") is False
        both = {"output_layer.weight", "embedding.word_embeddings.weight"} <= set(names)
        return "output_layer.weight" if shared and both else ""

    def _optimizers(self, chunks: list[Any], names: list[dict[str, str]]) -> None:
        """Only as a whole: where one rank's does not fit, it is left out, and a note says so."""
        groups: list[dict[str, Any]] = []
        states: list[tuple[RankFile, dict[str, int], str, str, StoredTensor, StoredTensor]] = []
        for rank in self.source.ranks:
            mine = [
                (at, called[local], tensor)
                for (other, at, tensors), called in zip(chunks, names, strict=True)
                for local, tensor in tensors.items()
                if other is rank and _kind(local, tensor) == "parameter"
            ]
            if rank.tree.get("optimizer") is None:
                continue
            try:
                optimizer = optimizer_of(rank.tree["optimizer"], [(name, tensor) for _, name, tensor in mine])
            except Unfit as error:
                self.catalog.notes.append(
                    f"{rank.archive.name}: the optimizer's state is not read: {error}; the model is whole"
                )
                return
            at_of = {name: at for at, name, _ in mine}
            shape_of = {name: tensor for _, name, tensor in mine}
            states += [(rank, at_of[n], n, key, one, shape_of[n]) for n, key, one in optimizer.states]
            for group in optimizer.groups:
                _merge(groups, group)
        for rank, at, name, key, tensor, parameter in states:
            full = f"optimizer.state.model.{name}.{key}"
            if f"model.{name}" in self.found:  # not of a tied copy
                self._hold(rank, at, full, tensor, "optimizer", f"model.{name}", key, parameter.shape)
        if groups:
            self.catalog.groups["optimizer"] = groups

    def _hold(
        self,
        rank: RankFile,
        at: dict[str, int],
        name: str,
        tensor: StoredTensor,
        kind: Kind,
        parameter: str = "",
        state: str = "",
        like: tuple[int, ...] = (),
    ) -> None:
        one = self.found.setdefault(name, _Gathered(kind, tensor.dtype, parameter, state, like=like))
        if one.dtype != tensor.dtype:
            raise DamagedImage(f"{self.folder.url}: ranks have {name} in {one.dtype} and in {tensor.dtype}")
        strides = None if tensor.is_contiguous else tensor.strides
        one.held.append(Held(at=at, shape=tensor.shape, file=rank.number, offset=tensor.offset, strides=strides))

    def _add(self, name: str, one: _Gathered) -> None:
        fqn = (one.parameter or name).removeprefix("model.")
        cut: Cut = self.source.spec.cut_of(fqn)
        if one.kind == "optimizer":
            cut = cut.of_state(name, one.like, one.held[0].shape)
        shape, pieces = assemble(name, cut, one.held, ITEMSIZES[one.dtype])
        self.catalog.add(
            Tensor(
                name=name,
                kind=one.kind,
                dtype=one.dtype,
                shape=shape,
                pieces=PieceTable.of(pieces),
                item="optimizer" if one.kind == "optimizer" else "model",
                parameter=one.parameter,
                state=one.state,
            )
        )

    def _tell(self) -> None:
        args = self.source.args
        padded, real = args.get("padded_vocab_size"), args.get("vocab_size")
        if padded and real and padded != real:
            self.catalog.notes.append(
                f"the vocabulary of {real} is padded to {padded}; a specification with a padded size leaves that out"
            )
        if any(name.endswith("distrib_optim.pt") for name in self.folder.names):
            self.catalog.notes.append(
                "the state of the distributed optimizer (distrib_optim.pt) is not read; the model is whole"
            )


def _merge(groups: list[dict[str, Any]], group: dict[str, Any]) -> None:
    """Groups of ranks that differ in nothing but their parameters are one."""
    told = {key: value for key, value in group.items() if key != "params"}
    for known in groups:
        if {key: value for key, value in known.items() if key != "params"} == told:
            known["params"] += [name for name in group["params"] if name not in known["params"]]
            return
    groups.append({**told, "params": list(group["params"])})


def _kind(name: str, tensor: StoredTensor) -> Kind:
    return "buffer" if not is_floating(tensor.dtype) or name.endswith(_BUFFERS) else "parameter"
