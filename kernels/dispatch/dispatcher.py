"""Which way each call of a group takes: plain, chunked or fused. All ranks take the same one.

When a shape comes for the first time, the ranks compare it (`agree`), share the costs that rank 0 has, or measure them,
and compute the same plan from them. The shape's first calls try the plan's ways in turn; then the times are put
together (of each call the least among the ranks: whoever came last waited for nobody) and the verdict stands. It needs
no message after that. Everything here is called by all ranks in the same order, as collectives are.

Fused kernels are the one way that may turn out to be impossible only when it is tried (GPUs that do not share memory).
So ranks tell one another how it went, at each try and at a shape's first fused call without one. If it failed on any of
them, the call is done the plain way, and the group's calls are fused no more.
"""

import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TypeVar
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist

from resilient.errors import CollectiveFailed, CollectiveMismatch, PeerGone, UsageError
from resilient.kernels.dispatch import optional
from resilient.kernels.dispatch.cache import Cache, folder
from resilient.kernels.dispatch.costs import Costs
from resilient.kernels.dispatch.decide import FUSED, PLAIN, TRIES, Choice, Plan, Verdict, obvious, plan, settle, wider
from resilient.kernels.dispatch.machine import capturing, key_of
from resilient.kernels.dispatch.measure import Stopwatch, measure
from resilient.kernels.overlap.agree import agree
from resilient.kernels.overlap.call import Call
from resilient.kernels.overlap.chunks import most
from resilient.kernels.overlap.exchange import Group

RENEW_AFTER = 10_000  # calls; then a shape's ways are tried again, since networks change
_MOST_SHAPES = 4096  # kept; a job whose shapes never repeat begins anew beyond
_log = logging.getLogger(__name__)
_dispatchers: "WeakKeyDictionary[Group, Dispatcher]" = WeakKeyDictionary()
Result = TypeVar("Result")


def dispatcher_of(group: Group) -> "Dispatcher":
    """The one of a group, made when it is first asked for."""
    found = _dispatchers.get(group)
    if found is None:
        found = _dispatchers[group] = Dispatcher(Cache(folder()))
    return found


@dataclass(slots=True, kw_only=True)
class _Shape:
    """What is known of one call's shape. `left`: the choices of the calls to come, until there is a verdict."""

    plan: Plan
    verdict: Verdict | None = None
    proven: bool = False  # a fused call of it has been completed on all ranks
    left: deque[Choice] = field(default_factory=deque)
    clocks: dict[Choice, list[Stopwatch]] = field(default_factory=dict)
    times: dict[Choice, list[float]] = field(default_factory=dict)
    widened: bool = False
    calls: int = 0  # since the verdict

    def queue(self, choices: tuple[Choice, ...]) -> None:
        """Each once to warm up, and then in turns."""
        self.left = deque(choices * (TRIES + 1))
        self.clocks = {choice: [] for choice in choices}

    def renew(self) -> None:
        """Whatever was worth a try at any time."""
        kept = () if self.verdict is None else (self.verdict.choice,)
        self.verdict = None
        self.queue(tuple(dict.fromkeys((*self.plan.choices, *kept, *self.times))))

    def drop(self, choice: Choice, reason: str) -> None:
        """Do not do it any more."""
        if choice not in (*self.plan.choices, *self.left, *self.times, self.verdict and self.verdict.choice):
            return
        choices = tuple(one for one in self.plan.choices if one != choice)
        self.plan = replace(self.plan, choices=choices)
        self.left = deque(one for one in self.left if one != choice)
        self.clocks.pop(choice, None)
        self.times.pop(choice, None)
        if self.verdict is not None and self.verdict.choice == choice:
            self.verdict = Verdict(choice=PLAIN, reason=reason)


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """`choice`: what the next call does. `predicted_s`, `seen_s`: seconds of each way, as far as there are any."""

    choice: Choice
    settled: bool
    reason: str
    predicted_s: dict[Choice, float]
    seen_s: dict[Choice, list[float]]

    def __str__(self) -> str:
        lines = [f"{self.choice}{'' if self.settled else ', being tried'}: {self.reason}"]
        for choice in sorted({*self.predicted_s, *self.seen_s}):
            foretold = self.predicted_s.get(choice)
            seen = ", ".join(f"{seconds * 1e3:.3g}" for seconds in self.seen_s.get(choice, []))
            said = "" if foretold is None else f"predicted {foretold * 1e3:.3g} ms"
            lines.append(f"  {choice}: " + "; ".join(part for part in (said, seen and f"seen {seen} ms") if part))
        return "\n".join(lines)


class Dispatcher:
    """One a group. Not for several threads at a time, as the group itself is not."""

    def __init__(
        self,
        cache: Cache,
        renew_after: int = RENEW_AFTER,
        unfused: Callable[[Call, Group], str | None] = optional.unwanted,
    ) -> None:
        """`unfused`: why a call is not to be tried with fused kernels; None: it is."""
        self._cache = cache
        self._unfused = unfused
        self._failed: str | None = None  # how fused kernels did, on some rank
        self._renew_after = renew_after
        self._near: dict[Call, tuple[Call, Verdict]] = {}
        self._costs: dict[tuple[str, str], Costs] = {}
        self._from_file: set[tuple[str, str]] = set()
        self._shapes: dict[Call, _Shape] = {}
        self._checked: set[tuple[Call, Choice | None]] = set()

    def run(self, call: Call, group: Group, way: Callable[[Choice], Result]) -> Result:
        """`way(choice)`, with the choice that is due. Blocks as it does, and longer at a shape's first calls.

        Raises CollectiveMismatch on all ranks when they come with different new shapes. While a CUDA graph is captured,
        the choice is the plain way: a graph can wait for nobody, and would repeat a fused kernel's signals.
        """
        if call.device != "cpu" and capturing(call.device):
            return way(PLAIN)
        shape = self._shapes.get(call)
        if shape is None:
            if len(self._shapes) >= _MOST_SHAPES:  # on all ranks at the same call
                self._shapes.clear()
                self._near.clear()
            shape = self._shapes[call] = self._meet(call, group)
        if shape.verdict is not None:
            shape.calls += 1
            if shape.plan.settled or shape.calls < self._renew_after:
                choice = shape.verdict.choice
                return way(choice) if choice != FUSED or shape.proven else self._try_fused(call, shape, group, way)[0]
            shape.renew()
        return self._try(call, shape, group, way)

    def check(self, call: Call, choice: Choice, group: Group) -> None:
        """For calls whose way was chosen by the caller: that it can be done, and is all ranks'; once for a shape."""
        if (call, choice) not in self._checked:
            problem = optional.unsupported(call, group) if choice == FUSED else None
            problem = problem and f"{call}: {problem}"
            if problem and capturing(call.device):
                raise UsageError(problem)
            self._compare(call, choice, f"{call}, {choice}", group, problem)

    def check_replicated(self, call: Call, group: Group) -> None:
        """For calls that communicate nothing: that they are all ranks', but for their columns; once for a shape."""
        call = replace(call, columns=0)
        if (call, None) not in self._checked:
            self._compare(call, None, f"replicated_matmul of [{call.rows}, {call.inner}] {call.dtype}", group)

    def _compare(self, call: Call, choice: Choice | None, what: str, group: Group, problem: str | None = None) -> None:
        if capturing(call.device):  # nobody can be asked
            return
        if len(self._checked) >= _MOST_SHAPES:
            self._checked.clear()
        agree(group, what, problem=problem, device=call.device)
        self._checked.add((call, choice))

    def explain(self, call: Call) -> Explanation | None:
        """What is known of a shape; None if it has not been called yet. Does not communicate."""
        shape = self._shapes.get(call)
        if shape is None:
            return None
        reason = shape.verdict.reason if shape.verdict else shape.plan.reason
        return Explanation(
            choice=shape.verdict.choice if shape.verdict else shape.left[0],
            settled=shape.verdict is not None,
            reason=reason if self._failed is None or self._failed in reason else f"{reason}; {self._failed}",
            predicted_s=dict(shape.plan.predicted_s),
            seen_s=dict(shape.times),
        )

    def explanations(self) -> dict[Call, Explanation]:
        """Of all shapes so far."""
        found = {call: self.explain(call) for call in self._shapes}
        return {call: explained for call, explained in found.items() if explained is not None}

    def _try(self, call: Call, shape: _Shape, group: Group, way: Callable[[Choice], Result]) -> Result:
        """The next of the choices, timed."""
        choice = shape.left[0]
        if choice == FUSED:
            result, clock = self._try_fused(call, shape, group, way)
            if clock is None:
                return result
        else:
            clock = Stopwatch(torch.device(call.device))
            result = way(choice)
            clock.stop()
        shape.clocks[choice].append(clock)
        shape.left.popleft()
        if not shape.left:
            self._settle(call, shape, group)
        return result

    def _try_fused(
        self, call: Call, shape: _Shape, group: Group, way: Callable[[Choice], Result]
    ) -> tuple[Result, Stopwatch | None]:
        """The fused way, if it succeeds on all ranks; else the plain one, without a clock, and never again.

        Raises CollectiveFailed on all ranks if an earlier fused call has failed on one: its result may be in use.
        """
        results: list[Result] = []
        earlier = _failure(lambda: optional.check(call, group))
        clock = Stopwatch(torch.device(call.device))

        def now() -> None:
            results.append(way(FUSED))
            clock.stop()
            optional.check(call, group)

        notes = agree(group, f"{call}, fused", note=[earlier, None if earlier else _failure(now)], device=call.device)
        for rank, (before, _) in enumerate(notes):
            if before is not None:
                raise CollectiveFailed(f"rank {rank}: a fused call before {call} failed: {before}", rank=rank)
        told = [f"rank {rank}: {failed}" for rank, (_, failed) in enumerate(notes) if failed is not None]
        if not told:
            shape.proven = True
            return results[0], clock
        self._give_up_fused(f"fused kernels failed on {', '.join(told[:4])}", group)
        return way(PLAIN), None

    def _give_up_fused(self, reason: str, group: Group) -> None:
        """On all ranks at the same call."""
        self._failed = reason
        if group.rank() == 0:
            _log.warning("%s; calls of this group are not fused any more", reason)
        self._near = {key: known for key, known in self._near.items() if known[1].choice != FUSED}
        for call, shape in self._shapes.items():
            shape.drop(FUSED, reason)
            if shape.verdict is None and not shape.left:
                self._settle(call, shape, group)

    def _meet(self, call: Call, group: Group) -> _Shape:
        notes = agree(group, str(call), note=self._failed or self._unfused(call, group), device=call.device)
        fused = next((note for note in notes if note is not None), None)
        made = obvious(call, fused) or plan(call, self._known(call, group), fused)
        shape = _Shape(plan=made, verdict=self._as_near(call, fused))
        if shape.verdict is not None:
            return shape
        if made.settled:
            shape.verdict = Verdict(choice=made.choices[0], reason=made.reason)
        else:
            shape.queue(made.choices)
        if group.rank() == 0:
            _log.debug("%s: %s: %s", call, ", ".join(map(str, made.choices)), made.reason)
        return shape

    def _as_near(self, call: Call, fused: str | None) -> Verdict | None:
        """The verdict on a shape that differs a little, and in rows only: where rows vary, not each number is tried."""
        other, verdict = self._near.get(_rounded(call), (None, None))
        if other is None or verdict is None or verdict.choice.chunks > most(call.rows_to_cut):
            return None
        if verdict.choice.method == "fused" and fused is not None:
            return None
        return Verdict(choice=verdict.choice, reason=f"as with {other.rows} rows, where {verdict.reason}")

    def _known(self, call: Call, group: Group) -> Costs:
        """The same on all ranks: rank 0's, or measured together."""
        name = (call.device, call.dtype)
        if name not in self._costs:
            key = key_of(call, group)
            found = self._cache.find(key) if group.rank() == 0 else None
            note = None if found is None else found.to_json()
            told = agree(group, f"costs of {name}", note=note, device=call.device)[0]
            if told is not None:
                self._costs[name] = Costs.from_json(told)
                self._from_file.add(name)
            else:
                self._costs[name] = measure(group, torch.device(call.device), getattr(torch, call.dtype))
                if group.rank() == 0:
                    self._cache.keep(key, self._costs[name])
        return self._costs[name]

    def _settle(self, call: Call, shape: _Shape, group: Group) -> None:
        shape.times.update(_agreed(shape.clocks, call.device, group))
        shape.clocks = {}
        verdict = settle(shape.plan, shape.times)
        if verdict.stale and not shape.widened:
            # Nothing that these numbers say can be relied upon: try what they did not want to.
            shape.widened = True
            self._forget(call, group)
            untried = tuple(choice for choice in wider(call) if choice not in shape.times)
            if untried:
                shape.queue((PLAIN, *untried))
                return
        shape.verdict, shape.calls = verdict, 0
        self._near[_rounded(call)] = call, verdict
        if group.rank() == 0:
            _log.info("%s: %s: %s", call, verdict.choice, verdict.reason)

    def _forget(self, call: Call, group: Group) -> None:
        """Costs of another time: the next shape measures anew. What was measured just now would come out the same."""
        name = (call.device, call.dtype)
        if name in self._from_file:
            self._from_file.discard(name)
            self._costs.pop(name)
            if group.rank() == 0:
                self._cache.forget(key_of(call, group))


def _failure(step: Callable[[], object]) -> str | None:
    """How a step failed that nobody has asked for; None if it did not.

    Raises PeerGone and CollectiveMismatch, as all ranks do: there is nobody to ask, or not about the same.
    """
    try:
        step()
    except (PeerGone, CollectiveMismatch):
        raise
    except Exception as error:  # of memory, drivers, compilers
        return f"{type(error).__name__}: {error}"[:200]
    return None


def _rounded(call: Call) -> Call:
    """The same for rows from one power of two to the next."""
    return replace(call, rows=1 << call.rows.bit_length())


def _agreed(clocks: dict[Choice, list[Stopwatch]], device: str, group: Group) -> dict[Choice, list[float]]:
    """Seconds of each call but the first of each way: of the rank that came last, which had to wait for nobody."""
    mine = [[clock.seconds() for clock in series[1:]] for series in clocks.values()]
    table = torch.tensor(mine, dtype=torch.float64).to(device)
    dist.all_reduce(table, dist.ReduceOp.MIN, group=group)
    return dict(zip(clocks, table.tolist(), strict=True))
