"""Which way of doing a call is worth a try, and which one its times speak for: pure.

`plan` goes by what is known beforehand, `settle` by what the first calls took. A shape that cannot be cut is done the
plain way from the first call on, and is not timed. Another way than the plain one has to be quicker by `_MARGIN`, since
nothing may be slower with us than without us. Times are noisy, and nearly always upwards: a way's second best counts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from resilient.kernels.dispatch.costs import Costs, parts, predicted_s
from resilient.kernels.overlap.call import Call
from resilient.kernels.overlap.chunks import LEAST_ROWS, most

Method = Literal["plain", "chunked", "fused"]
TRIES = 5  # of each way
_CHUNKS = (2, 4, 8, 16, 32)
_MARGIN = 0.03
_HIDDEN = 0.03  # the least share of a call's time that hiding has to promise
_STALE = 3.0  # a prediction that is wrong by more came from numbers that no longer hold


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Choice:
    """A way of doing a call. `chunks` counts where the method is "chunked"."""

    method: Method = "plain"
    chunks: int = 1

    def __str__(self) -> str:
        return f"chunked in {self.chunks}" if self.method == "chunked" else self.method


PLAIN = Choice()
FUSED = Choice(method="fused")


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What the first calls of a shape do: each of `choices` in turn; where it is `settled`, all calls do the one."""

    choices: tuple[Choice, ...]
    settled: bool
    reason: str
    predicted_s: Mapping[Choice, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What later calls of a shape do. `stale`: the numbers it was planned with are far from what was seen."""

    choice: Choice
    reason: str
    stale: bool = False


def obvious(call: Call, fused: str | None) -> Plan | None:
    """The plan where it needs no costs at all. `fused`: why there is no fused kernel for this call; None: there is."""
    if fused is not None and most(call.rows_to_cut) < 2:
        few = f"{call.rows_to_cut} rows are too few for two chunks of {LEAST_ROWS}"
        return Plan(choices=(PLAIN,), settled=True, reason=few, predicted_s={})
    return None


def plan(call: Call, costs: Costs, fused: str | None = "not asked for") -> Plan:
    """Which ways to try."""
    known = obvious(call, fused)
    if known is not None:
        return known
    possible = [Choice(method="chunked", chunks=chunks) for chunks in _CHUNKS if chunks <= most(call.rows_to_cut)]
    times = {choice: predicted_s(costs, call, choice.chunks) for choice in (PLAIN, *possible)}
    alone = parts(costs, call)
    least, whole = sorted((alone.compute_s, alone.communicate_s)), times[PLAIN]
    if fused is not None and least[0] < _HIDDEN * whole:
        short = "the matmul" if alone.compute_s < alone.communicate_s else "the communication"
        reason = f"{short} would take {_ms(least[0])} of {_ms(whole)}: there is nothing to hide"
        return Plan(choices=(PLAIN,), settled=False, reason=reason, predicted_s=times)
    # The best by the model, and its neighbours: the model knows little of what small chunks cost.
    best = sorted(possible, key=lambda choice: times[choice])[:1]
    near = [one for one in possible if best and one.chunks in (best[0].chunks // 2, best[0].chunks * 2)]
    tried = (PLAIN, *best, *near, *([] if fused is not None else [FUSED]))
    reason = f"the matmul would take {_ms(alone.compute_s)}, the communication {_ms(alone.communicate_s)}: worth a try"
    return Plan(choices=tried, settled=False, reason=reason, predicted_s=times)


def wider(call: Call) -> tuple[Choice, ...]:
    """What to try when the costs have turned out to be wrong: a few chunks, whatever they say."""
    chunked = [Choice(method="chunked", chunks=chunks) for chunks in _CHUNKS if chunks <= most(call.rows_to_cut)]
    return (PLAIN, *chunked[:3])


def settle(planned: Plan, times: Mapping[Choice, Sequence[float]]) -> Verdict:
    """What the times of the first calls speak for. `times`: seconds, without the first call of each way."""
    counted = {choice: sorted(series)[:2][-1] for choice, series in times.items()}
    said = ", ".join(f"{choice} {_ms(seconds)}" for choice, seconds in counted.items())
    stale = _wrong(planned, counted)
    best = min(counted, key=lambda choice: counted[choice])
    if best == PLAIN:
        return Verdict(choice=PLAIN, reason=f"nothing was quicker: {said}", stale=stale)
    if counted[best] >= (1 - _MARGIN) * counted[PLAIN]:
        return Verdict(choice=PLAIN, reason=f"{best} is quicker by too little: {said}", stale=stale)
    return Verdict(choice=best, reason=f"{best} was the quickest: {said}", stale=stale)


def _wrong(planned: Plan, seen: Mapping[Choice, float]) -> bool:
    foretold = planned.predicted_s.get(PLAIN)
    if foretold is None or PLAIN not in seen:
        return False
    return not 1 / _STALE <= seen[PLAIN] / foretold <= _STALE


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"
