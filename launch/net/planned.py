"""What a collective would do on a topology: the same script and plan that its ranks would make. Pure."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from resilient.comms.certificate import Certificate
from resilient.comms.collectives import choice, schedule
from resilient.comms.collectives.schedule import Region, Script
from resilient.comms.fabric import Fabric, Link
from resilient.comms.flows import Step
from resilient.comms.plan import plan_step

COLLECTIVES = ("all_reduce", "reduce_scatter", "all_gather", "all_to_all", "broadcast")
LEAST_CUT = 1 << 16  # as `resilient.comms.collectives.execute` has it


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """Steps that are planned alike: `times` of them, one after the other."""

    times: int
    flows: int
    nbytes: int
    reason: str
    certificate: Certificate


@dataclass(frozen=True, kw_only=True)
class Planned:
    """Times in seconds; `bytes_on` each leaf's links to and from the paths, of all steps."""

    script: str
    reason: str
    stages: tuple[Stage, ...]
    bytes_on: dict[Link, int]

    @cached_property
    def load_s(self) -> float:
        """Of the fullest link, step by step: how long it takes if all goes well."""
        return sum(stage.times * stage.certificate.load_s for stage in self.stages)

    @cached_property
    def bound_s(self) -> float:
        """What no placement of these steps can beat."""
        return sum(stage.times * stage.certificate.bound_s for stage in self.stages)

    @property
    def ratio(self) -> float:
        return self.load_s / self.bound_s if self.bound_s else 1.0


def planned(fabric: Fabric, collective: str, nbytes: int, item: int = 4) -> Planned:
    """`nbytes` of the whole tensor: what is reduced, gathered or scattered; of all_to_all, what each rank holds.

    Raises UsageError where no path is left, or bytes are no whole items.
    """
    script, reason = _script(fabric, collective, nbytes, item)
    stages: list[Stage] = []
    bytes_on: Counter[Link] = Counter()
    for turn in script.turns:
        stage, carried = _stage(fabric, turn.flows, item)
        bytes_on.update(carried)
        last = stages[-1] if stages else None
        if last is not None and _alike(last, stage):
            stages[-1] = Stage(
                times=last.times + 1,
                flows=last.flows,
                nbytes=max(last.nbytes, stage.nbytes),
                reason=last.reason,
                certificate=max(last.certificate, stage.certificate, key=lambda one: one.load_s),
            )
        else:
            stages.append(stage)
    return Planned(script=script.name, reason=reason, stages=tuple(stages), bytes_on=dict(bytes_on))


def _alike(one: Stage, other: Stage) -> bool:
    near = abs(one.certificate.load_s - other.certificate.load_s) <= 0.01 * one.certificate.load_s
    return near and (one.flows, one.reason) == (other.flows, other.reason)


def _script(fabric: Fabric, collective: str, nbytes: int, item: int) -> tuple[Script, str]:
    ranks = len(fabric.leaf_of)
    at = tuple(schedule.parts(nbytes, ranks, item))
    if collective == "all_to_all":
        equal = [min(end - begin for begin, end in pairwise(at))] * ranks
        return schedule.all_to_all(0, equal, equal), "everybody to everybody at once"
    if collective == "reduce_scatter":
        script, decision = choice.reduce_scatter(fabric, 0, at, Region("output", 0, at[1]))
    elif collective == "all_gather":
        script, decision = choice.all_gather(fabric, 0, at)
    elif collective == "broadcast":
        script, decision = choice.broadcast(fabric, 0, at, 0)
    else:
        script, decision = choice.all_reduce(fabric, 0, at)
    return script, decision.reason


def _stage(fabric: Fabric, flows: Step, item: int) -> tuple[Stage, Counter[Link]]:
    plan = plan_step(fabric, flows, least_bytes=LEAST_CUT, item=item)
    carried: Counter[Link] = Counter()
    for piece in plan.pieces:
        for link in fabric.links(flows[piece.flow], piece.path):
            if link[0] in ("up", "down"):
                carried[link] += piece.end - piece.begin
    nbytes = max((flow.nbytes for flow in flows), default=0)
    stage = Stage(times=1, flows=len(flows), nbytes=nbytes, reason=plan.reason, certificate=plan.certificate)
    return stage, carried


def links(fabric: Fabric, found: Planned) -> Sequence[tuple[str, int, list[tuple[int, float]]]]:
    """Each leaf's links, ways apart: (bytes, seconds that they take) by path."""
    rows = []
    for way in ("up", "down"):
        for leaf in range(fabric.leaves):
            cells = []
            for path in range(fabric.paths):
                count, rate = found.bytes_on.get((way, leaf, path), 0), fabric.rate((way, leaf, path))
                cells.append((count, count / rate if count else 0.0))
            rows.append((way, leaf, cells))
    return rows
