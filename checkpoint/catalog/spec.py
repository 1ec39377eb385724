"""The specification language: how the tensors of a job's ranks make up the global ones, by name pattern, in TOML.

DTensor and FSDP2 say this themselves; hand-written tensor, pipeline and expert parallelism does not. The idea is the
universal checkpoint language of Universal Checkpointing (Lian et al., 2024); what it can say is in `docs/spec.md`.
Here it is read and asked; `assemble.py` makes pieces of it, and `presets/` has it for well-known models.
"""

import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import translate
from importlib import resources
from typing import Any, cast

from resilient.checkpoint.catalog.cut import HOWS, Cut, How, Padded, Shard, SubParameters
from resilient.errors import LayoutMismatch, UsageError

__all__ = ["PRESETS", "Cut", "How", "Numbered", "Padded", "Shard", "Spec", "SubParameters", "parse_spec", "preset"]

PRESETS = ("gpt-neox", "llama", "megatron", "megatron-swiglu", "mixtral")
_NUMBER = "{number}"


@dataclass(frozen=True, slots=True)
class Numbered:
    """Names whose number counts on from rank to rank along an axis: layers over stages, experts over their ranks."""

    pattern: re.Pattern[str]
    over: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """What a specification says. `axes`: of the job's mesh, the outermost first, as its ranks are numbered.

    `sizes`: of axes, as far as they are known. `fallback`: the cuts of a preset, for names that no own cut matches,
    then those of the preset's own preset.
    """

    axes: tuple[str, ...]
    sizes: Mapping[str, int] = field(default_factory=dict)
    cuts: tuple[Cut, ...] = ()
    fallback: tuple[tuple[Cut, ...], ...] = ()
    numbered: tuple[Numbered, ...] = ()
    otherwise: How | None = None
    where: str = "the specification"

    def cut_of(self, fqn: str) -> Cut:
        """Raises UsageError where no cut matches and nothing is said of the others, and where two do."""
        for cuts in (self.cuts, *self.fallback):
            found = [cut for cut in cuts if cut.matches(fqn)]
            if len(found) > 1:
                both = " and ".join(cut.text for cut in found)
                raise UsageError(f"{self.where}: {fqn} is matched by {both}; only one cut may match a parameter")
            if found:
                return found[0]
        if self.otherwise is not None:
            return Cut(how=self.otherwise, text=f"otherwise = {self.otherwise!r}")
        raise UsageError(f'{self.where}: no cut matches {fqn}; add one, or say `otherwise = "replicated"`')

    def check(self, shapes: Mapping[str, Sequence[int]] | Iterable[str]) -> None:
        """Whether the specification fits a model, given by its parameters' names, with their global shapes or without.

        Raises UsageError for a pattern that matches nothing, a parameter that two match or none does, and
        LayoutMismatch for a shape that the mesh's `sizes` do not divide.
        """
        known = dict(shapes) if isinstance(shapes, Mapping) else dict.fromkeys(shapes)
        for name, shape in known.items():
            cut = self.cut_of(name)
            if shape is not None:
                self._check_shape(name, cut, tuple(shape))
        for cut in self.cuts:  # a preset may have more than a model needs
            if not cut.optional and not any(cut.matches(name) for name in known):
                raise UsageError(f"{self.where}: {cut.text} matches no parameter (mark the cut `optional` if it may)")

    def coordinates(self, rank: int, sizes: Mapping[str, int] | None = None) -> dict[str, int]:
        """Where a rank is in the mesh. Raises UsageError for an axis whose size is not known."""
        known = {**self.sizes, **(sizes or {})}
        found: dict[str, int] = {}
        for axis in reversed(self.axes):
            if axis not in known:
                raise UsageError(f"{self.where}: the size of the mesh axis {axis!r} is not known; say it in `sizes`")
            found[axis] = rank % known[axis]
            rank //= known[axis]
        if rank:
            raise UsageError(f"{self.where}: the mesh {known} has fewer ranks than there are")
        return {axis: found[axis] for axis in self.axes}

    def with_vocabulary(self, size: int) -> "Spec":
        """The same, with the true size where a padded dimension names none."""

        def sized(cut: Cut) -> Cut:
            if cut.padded is None or cut.padded.size is not None:
                return cut
            return replace(cut, padded=replace(cut.padded, size=size))

        fallback = tuple(tuple(map(sized, cuts)) for cuts in self.fallback)
        return replace(self, cuts=tuple(map(sized, self.cuts)), fallback=fallback)

    def global_names(self, names: Sequence[tuple[Mapping[str, int], Iterable[str]]]) -> list[dict[str, str]]:
        """For each rank, given by coordinates and its parameters' names, what these are called in the whole model."""
        found = [{name: name for name in own} for _, own in names]
        for rule in self.numbered:
            counts: dict[str, dict[int, int]] = {}
            for (at, _), own in zip(names, found, strict=True):
                for name in own.values():
                    if match := rule.pattern.fullmatch(name):
                        per_rank = counts.setdefault(match[1], {})
                        index = at.get(rule.over, 0)
                        per_rank[index] = max(per_rank.get(index, 0), int(match[2]) + 1)
            for (at, _), own in zip(names, found, strict=True):
                for local, name in own.items():
                    if match := rule.pattern.fullmatch(name):
                        before = sum(n for index, n in counts[match[1]].items() if index < at.get(rule.over, 0))
                        own[local] = f"{match[1]}{int(match[2]) + before}{match[3]}"
        return found

    def _check_shape(self, name: str, cut: Cut, shape: tuple[int, ...]) -> None:
        cut.check(name, len(shape))
        for dim, size in enumerate(shape):
            ways = 1
            for axis in cut.over(dim):
                ways *= self.sizes.get(axis, 1)
            padded = cut.padded is not None and cut.padded.dim == dim
            fused = cut.sub_parameters
            widths = [width for _, width in fused.spans(size, name)] if fused and fused.dim == dim else [size]
            if not padded and any(width % ways for width in widths):
                raise LayoutMismatch(
                    f"{name} of shape {shape}: {widths} elements along dimension {dim} are not to be divided by "
                    f"{ways}, over {' and '.join(cut.over(dim))}"
                )


def preset(name: str) -> str:
    """The text of a specification that ships with the library. Raises UsageError for a name that is none."""
    if name not in PRESETS:
        raise UsageError(f"there is no preset {name!r}; there are {', '.join(PRESETS)}")
    return (resources.files("resilient.checkpoint.catalog") / "presets" / f"{name}.toml").read_text("utf-8")


def parse_spec(text: str, where: str = "the specification") -> Spec:
    """Read a specification; `where` is its name in messages. Raises UsageError for whatever it cannot mean."""
    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{where} is no TOML: {error}") from error
    door = _Door(where)
    door.only(raw, "", "preset", "otherwise", "mesh", "cut", "numbered")
    base = parse_spec(preset(raw["preset"]), f"preset {raw['preset']}") if "preset" in raw else None
    mesh = door.table(raw.get("mesh", {}), "mesh", "axes", "sizes")
    axes = tuple(door.texts(mesh["axes"], "mesh.axes")) if "axes" in mesh else base.axes if base else ()
    if len(set(axes)) != len(axes):
        raise door.wrong("mesh.axes names an axis twice")
    door.axes = axes
    otherwise = raw.get("otherwise", base.otherwise if base else None)
    if otherwise not in (None, "replicated", "unique"):
        raise door.wrong(f"otherwise is replicated or unique, not {otherwise!r}")
    return Spec(
        axes=axes,
        sizes=door.sizes(mesh.get("sizes", {})),
        cuts=tuple(door.cut(one, number) for number, one in enumerate(door.rows(raw, "cut"))),
        fallback=(base.cuts, *base.fallback) if base else (),
        numbered=tuple(door.numbered(one) for one in door.rows(raw, "numbered")) or (base.numbered if base else ()),
        otherwise=cast(How | None, otherwise),
        where=where,
    )


class _Door:
    """Turns raw TOML into values; every complaint names the specification and the place in it."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.axes: tuple[str, ...] = ()

    def wrong(self, problem: str) -> UsageError:
        return UsageError(f"{self.where}: {problem}")

    def only(self, raw: Mapping[str, Any], place: str, *known: str) -> None:
        for key in raw:
            if key not in known:
                raise self.wrong(f"{place or 'a specification'} has no key {key!r}; known are {', '.join(known)}")

    def table(self, raw: Any, place: str, *known: str) -> Mapping[str, Any]:
        if not isinstance(raw, dict):
            raise self.wrong(f"{place} is a table with {', '.join(known)}, not {raw!r}")
        self.only(raw, place, *known)
        return raw

    def rows(self, raw: Mapping[str, Any], key: str) -> list[Any]:
        found = raw.get(key, [])
        if not isinstance(found, list):
            raise self.wrong(f"{key} is a list of tables: write [[{key}]]")
        return found

    def texts(self, raw: Any, place: str) -> list[str]:
        found = [raw] if isinstance(raw, str) else raw
        if not isinstance(found, list) or not found or not all(isinstance(one, str) and one for one in found):
            raise self.wrong(f"{place} is a text or a list of texts, not {raw!r}")
        return found

    def whole(self, raw: Any, place: str, least: int) -> int:
        if type(raw) is not int or raw < least:
            raise self.wrong(f"{place} is a whole number from {least} on, not {raw!r}")
        return raw

    def axis(self, raw: Any, place: str) -> str:
        if raw not in self.axes:
            raise self.wrong(f"{place}: the mesh has no axis {raw!r}; it has {', '.join(self.axes) or 'none'}")
        return cast(str, raw)

    def sizes(self, raw: Any) -> dict[str, int]:
        if not isinstance(raw, dict):
            raise self.wrong(f"mesh.sizes is a table of axes, not {raw!r}")
        return {self.axis(axis, "mesh.sizes"): self.whole(size, f"mesh.sizes.{axis}", 1) for axis, size in raw.items()}

    def cut(self, raw: Any, number: int) -> Cut:
        place = f"[[cut]] number {number + 1}"
        known = ("pattern", "regex", "optional", "sub_parameters", "padded", *HOWS)
        raw = self.table(raw, place, *known)
        patterns, text = self.patterns(raw, place)
        hows: list[How] = [how for how in HOWS if raw.get(how, False) is not False]
        if len(hows) != 1:
            raise self.wrong(f"the cut for {text} says {hows or 'nothing'}; it says one of {', '.join(HOWS)}")
        how: How = hows[0]
        if how in ("replicated", "unique") and raw[how] is not True:
            raise self.wrong(f"the cut for {text}: `{how}` is true or not there")
        if type(raw.get("optional", False)) is not bool:
            raise self.wrong(f"the cut for {text}: `optional` is true or false")
        return Cut(
            patterns=patterns,
            text=text,
            how=how,
            shards=self.shards(raw["sharded"], text) if how == "sharded" else (),
            averaged=self.averaged(raw["averaged"], text) if how == "averaged" else (),
            sub_parameters=self.sub_parameters(raw, text),
            padded=self.padded(raw, text),
            optional=raw.get("optional", False),
        )

    def patterns(self, raw: Mapping[str, Any], place: str) -> tuple[tuple[re.Pattern[str], ...], str]:
        if ("pattern" in raw) == ("regex" in raw):
            raise self.wrong(f"{place} has either `pattern`, with * and ?, or `regex`")
        kind = "pattern" if "pattern" in raw else "regex"
        texts = self.texts(raw[kind], f"{place}: {kind}")
        try:
            found = tuple(re.compile(translate(one) if kind == "pattern" else one) for one in texts)
        except re.error as error:
            raise self.wrong(f"{place}: {error}") from error
        return found, f"{kind} {', '.join(texts)}"

    def shards(self, raw: Any, text: str) -> tuple[Shard, ...]:
        found: list[Shard] = []
        for one in raw if isinstance(raw, list) else [raw]:
            table = self.table(one, f"the cut for {text}: sharded", "dim", "over")
            dim = self.whole(table.get("dim"), f"the cut for {text}: dim", 0)
            found.append(Shard(dim, self.axis(table.get("over"), f"the cut for {text}")))
        if not found or len({shard.over for shard in found}) != len(found):
            raise self.wrong(f"the cut for {text} is over no axis, or over one twice")
        return tuple(found)

    def averaged(self, raw: Any, text: str) -> tuple[str, ...]:
        table = self.table(raw, f"the cut for {text}: averaged", "over")
        return tuple(self.axis(one, f"the cut for {text}") for one in self.texts(table.get("over"), "averaged.over"))

    def sub_parameters(self, raw: Mapping[str, Any], text: str) -> SubParameters | None:
        if "sub_parameters" not in raw:
            return None
        place = f"the cut for {text}: sub_parameters"
        table = self.table(raw["sub_parameters"], place, "dim", "widths")
        widths = table.get("widths")
        if not isinstance(widths, list) or len(widths) < 2:
            raise self.wrong(f"{place}: widths is a list of two or more numbers")
        whole = tuple(self.whole(width, f"{place}: a width", 1) for width in widths)
        return SubParameters(self.whole(table.get("dim"), f"{place}: dim", 0), whole)

    def padded(self, raw: Mapping[str, Any], text: str) -> Padded | None:
        if "padded" not in raw:
            return None
        place = f"the cut for {text}: padded"
        table = self.table(raw["padded"], place, "dim", "size")
        size = self.whole(table["size"], f"{place}: size", 1) if "size" in table else None
        return Padded(self.whole(table.get("dim"), f"{place}: dim", 0), size)

    def numbered(self, raw: Any) -> Numbered:
        table = self.table(raw, "[[numbered]]", "pattern", "over")
        pattern = table.get("pattern")
        if not isinstance(pattern, str) or pattern.count(_NUMBER) != 1:
            raise self.wrong(f"[[numbered]]: pattern is a text with {_NUMBER} in it once, not {pattern!r}")
        before, after = (_inner(part) for part in pattern.split(_NUMBER))
        return Numbered(re.compile(f"({before})([0-9]+)({after})"), self.axis(table.get("over"), f"{pattern}"))


def _inner(pattern: str) -> str:
    """A glob as a regular expression that is part of a larger one; `*` takes as little as it can."""
    return "".join({"*": ".*?", "?": "."}.get(sign, re.escape(sign)) for sign in pattern)
