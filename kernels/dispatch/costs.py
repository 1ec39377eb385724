"""What a matmul and a collective cost on this machine and in this group, and what ways of doing both would take: pure.

The numbers come from `measure`, or from a file (`cache`) that may be out of date. They only say what is worth a try:
what a shape's own calls take decides (`decide`).
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from resilient.kernels.overlap.call import OPERATIONS, Call, Operation
from resilient.kernels.overlap.chunks import cut

_MOST_RATES = 8
_MOST_ROWS = 1 << 40


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """A collective's time: `latency_s`, and bytes of the whole tensor at `bytes_per_s`."""

    latency_s: float
    bytes_per_s: float

    def seconds(self, nbytes: float) -> float:
        return self.latency_s + nbytes / self.bytes_per_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """`rates`: rows of a matmul -> flop/s, for one or more numbers of rows; between them it is interpolated."""

    rates: Mapping[int, float]
    lines: Mapping[Operation, Line]

    def multiply_s(self, rows: float, inner: int, columns: int) -> float:
        return 2 * rows * inner * columns / self._rate(rows)

    def _rate(self, rows: float) -> float:
        known = sorted(self.rates.items())
        if rows <= known[0][0]:
            return known[0][1]
        for (low, slow), (high, fast) in pairwise(known):
            if rows <= high:
                share = (math.log(rows) - math.log(low)) / (math.log(high) - math.log(low))
                return slow + share * (fast - slow)
        return known[-1][1]

    def to_json(self) -> dict[str, Any]:
        return {"rates": {str(rows): rate for rows, rate in self.rates.items()}, "lines": _lines(self.lines)}

    @classmethod
    def from_json(cls, read: Any) -> "Costs":
        """Raises ValueError, KeyError, TypeError, AttributeError or OverflowError for what is none.

        What passes has all that is asked of it later, and is short enough to be told to other ranks.
        """
        if not 1 <= len(read["rates"]) <= _MOST_RATES or set(read["lines"]) != set(OPERATIONS):
            raise ValueError(f"there must be 1 to {_MOST_RATES} rates, and lines for {', '.join(OPERATIONS)}")
        rates = {int(rows): float(rate) for rows, rate in read["rates"].items()}
        lines: dict[Operation, Line] = {
            name: Line(latency_s=float(line["latency_s"]), bytes_per_s=float(line["bytes_per_s"]))
            for name, line in read["lines"].items()
        }
        numbers = [*rates.values(), *(number for line in lines.values() for number in asdict(line).values())]
        if not all(math.isfinite(number) and number > 0 for number in numbers):
            raise ValueError("costs must be positive numbers")
        if not 1 <= min(rates) <= max(rates) <= _MOST_ROWS:
            raise ValueError(f"rates must be of 1 to {_MOST_ROWS} rows")
        return cls(rates=rates, lines=lines)


def _lines(lines: Mapping[Operation, Line]) -> dict[str, Any]:
    return {name: asdict(line) for name, line in lines.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """A call's two parts, each alone, in seconds."""

    compute_s: float
    communicate_s: float


def parts(costs: Costs, call: Call) -> Parts:
    compute_s = costs.multiply_s(call.rows, call.inner, call.columns) * (2 if call.backward else 1)
    return Parts(compute_s=compute_s, communicate_s=costs.lines[call.operation].seconds(call.nbytes))


def predicted_s(costs: Costs, call: Call, chunks: int) -> float:
    """What a call takes in `chunks` chunks; in one, it is the plain call.

    The longer of the two parts, and of the shorter one what nothing can hide: a chunk of it, at one end or the other,
    or half a chunk where those at the ends are smaller (`tapered`).
    """
    alone = parts(costs, call)
    if chunks == 1:
        return alone.compute_s + alone.communicate_s
    cuts = len(cut(call.rows_to_cut, chunks))
    rows = call.rows_to_cut / cuts
    pieces = call.rows / rows
    compute_s = pieces * costs.multiply_s(rows, call.inner, call.columns) + alone.compute_s * (call.backward / 2)
    line = costs.lines[call.operation]
    smaller_ends = call.operation == "matmul_all_reduce"
    communicate_s = (cuts + smaller_ends) * line.latency_s + call.nbytes / line.bytes_per_s
    bare = 1 / (2 * cuts) if smaller_ends else 1 / cuts
    return max(compute_s, communicate_s) + min(compute_s, communicate_s) * bare
