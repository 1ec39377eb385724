"""How a run of the benchmarks was asked for; made once by `bench/run.py`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bench.processes import Place


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """`quick`: one round, few saves. `smoke`: tiny sizes too, to see that everything runs; its figures say nothing."""

    place: Place
    rounds: int
    quick: bool
    smoke: bool
    say: Callable[[str], None]
    only: Sequence[str] = ()

    def turned(self, methods: Sequence[str], number: int) -> list[str]:
        """The methods that were asked for, beginning at another one in each round: none is always the first."""
        chosen = [method for method in methods if not self.only or any(part in method for part in self.only)]
        start = number % max(len(chosen), 1)
        return chosen[start:] + chosen[:start]
