"""Items of the state that name their own tensors: for engines that keep the state of a job in a way of their own.

A module or an optimizer is walked by `leaves.py`; a `Provided` item says itself which tensors it has, under which names
and as which pieces (flat ranges, where the engine keeps flat partitions), what else there is to save, and how the
engine is made consistent when its tensors have been filled. Such names are those of the catalog, so that a snapshot
does not depend on who made it. The door to DeepSpeed (`resilient.launch.deepspeed`) has two of them.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from resilient.checkpoint.leaves import Leaf, Leaves
    from resilient.checkpoint.restore.images import Stored


class Saved(Protocol):
    """What a snapshot has, as seen from this rank."""

    def find(self, leaf: "Leaf") -> "list[Stored]":
        """The pieces of the tensor of the leaf's name that it may be filled from; none where there is no such."""
        ...

    def of_optimizer(self, item: str) -> "Mapping[str, Mapping[str, list[Stored]]]":
        """The pieces of an optimizer's state, by parameter and name."""
        ...


@dataclass(frozen=True, slots=True)
class Wanted:
    """What an item wants of a snapshot. `leaves`: live or new tensors to be filled, each from the tensor of its `key`.
    `states`: new contents of optimizers' states (optimizer, key of its state, contents), to be put there before that.
    """

    leaves: "Sequence[Leaf]"
    states: "Sequence[tuple[Optimizer, Any, dict[Any, Any]]]" = field(default=())


class Provided(ABC):
    """Called on the training thread. Methods that are collective within the engine are called by all ranks."""

    @abstractmethod
    def walk(self, found: "Leaves", item: str) -> None:
        """Add all tensors, second names, groups of parameters and what is to be watched. Raises StateError."""

    @abstractmethod
    def capture(self) -> object:
        """What is no tensor, as a value that `objects.py` can encode. It may share memory with the engine."""

    @abstractmethod
    def propose(self, found: "Leaves", item: str, saved: Saved) -> Wanted:
        """What to load. Changes nothing that is live. Raises LayoutMismatch for a snapshot that does not fit."""

    @abstractmethod
    def apply(self, value: Any, groups: Sequence[Sequence[str]], found: "Leaves", item: str) -> list[str]:
        """The tensors are filled: set the rest from what `capture` gave, and whatever follows from the tensors.

        `groups`: the names of the parameters in each of the saved groups. Returns notes on what was not restored.
        Collective.
        """
