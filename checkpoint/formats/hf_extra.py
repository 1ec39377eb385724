"""What safetensors cannot say of a model and its optimizer: JSON under one key of the metadata of files that we write.

Readers of others pass over it. `docs/formats/safetensors.md` is the contract.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from resilient.checkpoint.formats.hf_header import Entry, strict_json
from resilient.errors import DamagedImage, NewerFormat

KEY = "resilient"
VERSION = 1
OPTIMIZER_FILE = "optimizer.safetensors"

STORED_AS: dict[str, tuple[str, tuple[int, ...]]] = {"complex128": ("float64", (2,)), "complex32": ("float16", (2,))}
"""Dtypes that the format does not know → the dtype in their place, and the last dimensions that it adds."""


@dataclass(frozen=True, slots=True)
class State:
    """Of which item, parameter (full name) and key a tensor of optimizer state is."""

    item: str
    parameter: str
    state: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Extra:
    """What a file's metadata add to it. Names are those in the file; `groups` as in a catalog."""

    item: str = "model"
    step: int | None = None
    aliases: Mapping[str, str] = field(default_factory=dict)
    buffers: frozenset[str] = frozenset()
    dtypes: Mapping[str, str] = field(default_factory=dict)
    states: Mapping[str, State] = field(default_factory=dict)
    groups: Mapping[str, list[dict[str, Any]]] = field(default_factory=dict)

    def true_dtype(self, entry: Entry, where: str) -> tuple[str, tuple[int, ...]]:
        """Dtype and shape of the tensor that is stored so. Raises DamagedImage where the two do not go together."""
        true = self.dtypes.get(entry.name)
        if true is None:
            return entry.dtype, entry.shape
        stored, added = STORED_AS.get(true, ("", ()))
        if stored != entry.dtype or entry.shape[len(entry.shape) - len(added) :] != added:
            raise DamagedImage(f"{where}: tensor {entry.name!r} cannot be {true}, stored as {entry.dtype}{entry.shape}")
        return true, entry.shape[: len(entry.shape) - len(added)]

    def metadata(self) -> dict[str, str]:
        """For the file's header; empty where there is nothing to say."""
        raw: dict[str, Any] = {}
        if self.item != "model":
            raw["item"] = self.item
        if self.step is not None:
            raw["step"] = self.step
        raw |= {key: dict(value) for key in ("aliases", "dtypes", "groups") if (value := getattr(self, key))}
        if self.buffers:
            raw["buffers"] = sorted(self.buffers)
        if self.states:
            raw["states"] = {name: [one.item, one.parameter, one.state] for name, one in self.states.items()}
        return {KEY: json.dumps({"version": VERSION} | raw, separators=(",", ":"))} if raw else {}


def parse_extra(metadata: Mapping[str, str], where: str) -> Extra:
    """What `Extra.metadata` gave; of a file of others an empty one. Raises DamagedImage, NewerFormat."""
    if KEY not in metadata:
        return Extra()
    raw = strict_json(metadata[KEY].encode(errors="replace"), f"the metadata {KEY!r} of {where}")
    version = raw.get("version")
    if isinstance(version, int) and version > VERSION:
        raise NewerFormat(f"{where} has metadata of version {version}; this library reads {VERSION}: upgrade it")
    try:
        return Extra(
            item=_text(raw.get("item", "model")),
            step=None if raw.get("step") is None else int(raw["step"]),
            aliases=_texts(raw.get("aliases", {})),
            buffers=frozenset(map(_text, raw.get("buffers", []))),
            dtypes=_texts(raw.get("dtypes", {})),
            states={name: State(*map(_text, one)) for name, one in raw.get("states", {}).items()},
            groups={item: [_group(one) for one in groups] for item, groups in raw.get("groups", {}).items()},
        )
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        raise DamagedImage(f"the metadata {KEY!r} of {where} cannot be read: {error}") from error


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


def _texts(raw: Any) -> dict[str, str]:
    return {name: _text(value) for name, value in raw.items()}


def _group(raw: Any) -> dict[str, Any]:
    return {**raw, "params": [_text(name) for name in raw["params"]]}
