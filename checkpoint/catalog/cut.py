"""How one kind of parameter is cut over the ranks: what a specification (`spec.py`) says of it, as values."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from resilient.errors import LayoutMismatch

How = Literal["replicated", "sharded", "averaged", "unique"]
HOWS: tuple[How, ...] = ("replicated", "sharded", "averaged", "unique")


@dataclass(frozen=True, slots=True)
class Shard:
    """Dimension `dim` is cut over the ranks along a mesh axis, in the order of their coordinates there."""

    dim: int
    over: str


@dataclass(frozen=True, slots=True)
class SubParameters:
    """Dimension `dim` is several parameters one behind the other, each cut by itself. `widths`: in proportion."""

    dim: int
    widths: tuple[int, ...]

    def spans(self, size: int, what: str) -> list[tuple[int, int]]:
        """(begin, width) of each in a dimension of so many elements. Raises LayoutMismatch: it does not divide."""
        total = sum(self.widths)
        if size % total:
            raise LayoutMismatch(
                f"{what}: {size} elements along dimension {self.dim} are not to be divided into sub-parameters "
                f"of widths {list(self.widths)}"
            )
        found, begin = [], 0
        for width in self.widths:
            found.append((begin, width * size // total))
            begin += width * size // total
        return found


@dataclass(frozen=True, slots=True)
class Padded:
    """Dimension `dim` has elements at its end that are none: `size` are real (None: the caller knows, or all are)."""

    dim: int
    size: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """How one kind of parameter is cut. Of two `shards` of one dimension the first is the outer.

    averaged: copies that may differ along the axes `averaged`, of which the first stands for all. unique: every rank
    has its own. optional: that a job has no such parameter is no mistake.
    """

    patterns: tuple[re.Pattern[str], ...] = ()
    text: str = ""
    how: How = "replicated"
    shards: tuple[Shard, ...] = ()
    averaged: tuple[str, ...] = ()
    sub_parameters: SubParameters | None = None
    padded: Padded | None = None
    optional: bool = False

    def matches(self, fqn: str) -> bool:
        return any(pattern.fullmatch(fqn) for pattern in self.patterns)

    @property
    def axes(self) -> tuple[str, ...]:
        return tuple(shard.over for shard in self.shards)

    def over(self, dim: int) -> tuple[str, ...]:
        """The axes that a dimension is cut over, outer first."""
        return tuple(shard.over for shard in self.shards if shard.dim == dim)

    def check(self, name: str, dims: int) -> None:
        """Raises LayoutMismatch where a tensor has not the dimensions that the cut names."""
        named = [shard.dim for shard in self.shards]
        named += [one.dim for one in (self.sub_parameters, self.padded) if one is not None]
        for dim in named:
            if dim >= dims:
                raise LayoutMismatch(f"{name} has {dims} dimensions; the cut for {self.text} speaks of dimension {dim}")

    def of_state(self, name: str, parameter: Sequence[int], state: Sequence[int]) -> "Cut":
        """The cut of optimizer state of the shape `state`, of a parameter of the shape `parameter` on the same rank.

        State of the parameter's shape is cut as it is. A single number is replicated. Factored state, such as
        Adafactor's rows and columns, has the shape of the parameter without its last or its last but one dimension
        (`row` or `col` in `name` decides where both fit); where the dimension it lacks is cut, each rank has estimated
        its own: averaged. Raises LayoutMismatch for other shapes.
        """
        whole, shape = tuple(parameter), tuple(state)
        if shape == whole:
            return self
        if all(size == 1 for size in shape):
            return Cut(text=self.text)
        last = len(whole) - 1
        fitting = [dim for dim in (last, last - 1) if dim >= 0 and whole[:dim] + whole[dim + 1 :] == shape]
        if len(fitting) > 1:
            fitting = [last - 1 if "col" in name.rsplit(".", 1)[-1] else last]
        if not fitting:
            raise LayoutMismatch(
                f"{name} of shape {shape} is state of a parameter of shape {whole}: how it is cut is not known"
            )
        return self._without(fitting[0])

    def _without(self, dim: int) -> "Cut":
        def moved(one: Any) -> Any:
            if one is None or one.dim == dim:
                return None
            return replace(one, dim=one.dim - 1) if one.dim > dim else one

        shards = tuple(shard for shard in map(moved, self.shards) if shard is not None)
        return replace(
            self,
            how="averaged" if self.over(dim) else self.how,
            shards=shards,
            averaged=self.averaged + self.over(dim),
            sub_parameters=moved(self.sub_parameters),
            padded=moved(self.padded),
        )
