"""Which files a DeepSpeed checkpoint consists of, by their names alone, and whether all of them are there.

The names are those of `engine.py` (`_get_zero_ckpt_prefix`, `_get_ckpt_name`, `_get_layer_ckpt_name`). What is in the
files is for `deepspeed_zero.py`.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from resilient.checkpoint.formats.folder import Folder
from resilient.checkpoint.formats.source import Reference
from resilient.errors import DamagedImage, NotACheckpoint

LATEST, LATEST_UNIVERSAL = "latest", "latest_universal"
OPTIMIZER_STATE = "zero/optimizer_state.pt"  # of universal checkpoints
_MODEL = re.compile(r"^mp_rank_(\d+)_model_states\.pt$")
_MODEL_3 = re.compile(r"^zero_pp_rank_(\d+)_mp_rank_(\d+)_model_states\.pt$")
_OPTIMIZER = re.compile(r"^(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt$")
_LAYER = re.compile(r"^layer_(\d+)(?:-model_(\d+))?-model_states\.pt$")
_EXPERT = re.compile(r"^(?:layer_\d+_)?expert_\d+_mp_rank_\d+_model_states\.pt$|^expp_rank_\d+_.*optim_states\.pt$")
_TAG_BYTES = 4096

Rank = tuple[int, int]
"""(data-parallel rank, model-parallel rank)."""


@dataclass(slots=True, kw_only=True)
class Files:
    """The files of one tag, by rank. `model_3`: of ZeRO-3, of every rank; `layers` by (layer, tensor-parallel rank)."""

    prefix: str
    model: dict[int, str] = field(default_factory=dict)
    model_3: dict[Rank, str] = field(default_factory=dict)
    optimizer: dict[Rank, str] = field(default_factory=dict)
    layers: dict[Rank, str] = field(default_factory=dict)
    experts: list[str] = field(default_factory=list)

    @property
    def model_ranks(self) -> list[int]:
        """The model-parallel ranks."""
        found = set(self.model) | {mp for _, mp in self.model_3} | {mp for _, mp in self.optimizer}
        return sorted(found)


def is_rank_file(name: str) -> bool:
    """Whether a name, without folders, is that of a file of a DeepSpeed checkpoint."""
    return any(pattern.match(name) for pattern in (_MODEL, _MODEL_3, _OPTIMIZER))


def sort_files(prefix: str, names: Iterable[str]) -> Files:
    """The files below `prefix` ("" or with a slash at its end)."""
    found = Files(prefix=prefix)
    for full in names:
        name = full.removeprefix(prefix)
        if not full.startswith(prefix) or "/" in name:
            continue
        if match := _MODEL.match(name):
            found.model[int(match[1])] = full
        elif match := _MODEL_3.match(name):
            found.model_3[int(match[1]), int(match[2])] = full
        elif match := _OPTIMIZER.match(name):
            found.optimizer[int(match[1]), int(match[2])] = full
        elif match := _LAYER.match(name):
            found.layers[int(match[1]), int(match[2] or 0)] = full
        elif _EXPERT.match(name):
            found.experts.append(full)
    return found


def tags_of(names: Iterable[str], *, universal: bool) -> list[str]:
    """The folders, "" for the top, that hold ranks' files, of universal checkpoints or of others."""
    names = list(names)
    of_universal = {name.removesuffix(OPTIMIZER_STATE).rstrip("/") for name in names if name.endswith(OPTIMIZER_STATE)}
    found = {name.rpartition("/")[0] for name in names if is_rank_file(name.rpartition("/")[2])}
    return sorted(tag for tag in found if "/" not in tag and (tag in of_universal) == universal)


def tag_folder(folder: Folder, reference: Reference, *, universal: bool) -> str:
    """The prefix of the names of the tag to open: "" where the folder is the tag's own.

    Of several tags it is the one of `reference.step` (`global_step<step>`), else the one that `latest` or
    `latest_universal` names. Raises NotACheckpoint.
    """
    latest = LATEST_UNIVERSAL if universal else LATEST
    tags = tags_of(folder.names, universal=universal)
    known = ", ".join(tags) or "none"
    if "" in tags:
        return ""
    if reference.step is not None:
        wanted = [tag for tag in tags if _step_of(tag) == reference.step]
        if len(wanted) != 1:
            raise NotACheckpoint(f"{folder.url} has no tag of step {reference.step}; it has {known}")
        return f"{wanted[0]}/"
    if folder.has(latest):
        tag = folder.read_all(latest, _TAG_BYTES).decode("utf-8", "replace").strip()
        if tag not in tags:
            raise NotACheckpoint(f"{folder.where(latest)} names {tag!r}, which is not there; there are: {known}")
        return f"{tag}/"
    if len(tags) != 1:
        raise NotACheckpoint(f"{folder.url} has no file `{latest}` and not one tag ({known}): open the folder of one")
    return f"{tags[0]}/"


def check_ranks(folder: Folder, files: Files, world: int, model_ranks: int) -> None:
    """Raises DamagedImage where the file of a rank is missing, or is one too many, as of another job."""
    for kind, found in (("model", files.model_3), ("optimizer", files.optimizer)):
        if not found:
            continue
        expected = {(dp, mp) for dp in range(world) for mp in range(model_ranks)}
        missing, foreign = sorted(expected - set(found)), sorted(set(found) - expected)
        if missing:
            dp, mp = missing[0]
            raise DamagedImage(
                f"{folder.url}: the {kind} states of {len(missing)} of {len(expected)} ranks are missing, first those "
                f"of zero_pp_rank_{dp}_mp_rank_{mp:02d}"
            )
        if foreign:
            raise DamagedImage(
                f"{folder.where(found[foreign[0]])} belongs to no rank of a job of {world} × {model_ranks} ranks: "
                "two checkpoints are mixed in the folder"
            )
    missing_models = sorted(set(range(model_ranks)) - set(files.model)) if not files.model_3 else []
    if missing_models:
        raise DamagedImage(
            f"{folder.url}: {len(missing_models)} of {model_ranks} files of model states are missing, first "
            f"mp_rank_{missing_models[0]:02d}_model_states.pt"
        )


def _step_of(tag: str) -> int | None:
    match = re.search(r"(\d+)(?:_universal)?$", tag)
    return int(match[1]) if match else None
