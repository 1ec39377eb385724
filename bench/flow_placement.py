"""How long a step of a collective takes in a simulated leaf-spine fabric of 4,096 hosts, by how its flows are placed.

ECMP (one hash a flow, and with 4 and 8 sub-flows), ideal packet spraying, the rule of Ethereal's authors, and our plan;
on a healthy fabric, with one link of a leaf at a quarter of its rate, and with one failed. Flow-level and max-min fair
(`comms/simulate.py`); a round is a seed, which places the ranks and draws the hashes. Nothing is timed here but in the
simulation; the emulated fabric is another matter.
"""

import random
from collections.abc import Callable
from typing import TYPE_CHECKING

from bench.report import Report, Rounds, Target, ratio
from bench.settings import Settings

if TYPE_CHECKING:
    from resilient.comms.certificate import Piece
    from resilient.comms.fabric import Fabric
    from resilient.comms.flows import Step

    Place = Callable[[Fabric, Step, int], list[Piece]]

OURS, SPRAYING = "ours", "spraying"
_LINK = (1, 2)  # the leaf and the path whose link is slow or fails
_WORKLOADS = ("ring", "halving-doubling", "permutation")
_NBYTES = 1 << 22
_TOLERANCE = 0.005  # of the simulated times


def run(settings: Settings) -> list[Report]:
    from resilient.comms.fabric import leaf_spine

    side = 4 if settings.smoke else 16 if settings.quick else 64
    healthy = leaf_spine(leaves=side, spines=side, hosts=side, rate=1.0)
    fabrics = {
        "healthy": healthy,
        "a link at a quarter": healthy.with_rate(*_LINK, 0.25),
        "a failed link": healthy.with_rate(*_LINK, 0.0),
    }
    rounds = Rounds()
    for seed in range(settings.rounds):
        rounds.begin()
        for workload in _WORKLOADS:
            step = _step(workload, side * side, seed)
            for state, fabric in fabrics.items():
                settings.say(f"flow_placement, seed {seed}: {workload}, {state}")
                for method, place in _methods().items():
                    rounds.add(f"{workload}, {state}: {method}", _measured(fabric, step, place(fabric, step, seed)))
    return [_report(rounds, list(fabrics), side * side)]


def _methods() -> "dict[str, Place]":
    from resilient.comms.plan import plan_step
    from resilient.comms.rivals import ecmp, ethereal, spraying

    return {
        "ECMP": ecmp,
        "ECMP x 4": lambda fabric, step, seed: ecmp(fabric, step, seed, 4),
        "ECMP x 8": lambda fabric, step, seed: ecmp(fabric, step, seed, 8),
        SPRAYING: lambda fabric, step, _: spraying(fabric, step),
        "Ethereal": ethereal,
        OURS: lambda fabric, step, _: list(plan_step(fabric, step).pieces),
    }


def _step(workload: str, ranks: int, seed: int) -> "Step":
    """One step of the collective; of halving-doubling the one at a quarter of the ranks' distance."""
    from resilient.comms.flows import Flow, halving_doubling_all_reduce, ring_all_reduce

    order = list(range(ranks))
    random.Random(seed).shuffle(order)
    if workload == "ring":
        return ring_all_reduce(order, ranks * _NBYTES)[0]
    if workload == "permutation":
        return tuple(Flow(one, other, _NBYTES) for one, other in enumerate(order) if one != other)
    return halving_doubling_all_reduce(ranks, ranks * _NBYTES)[ranks.bit_length() - 3]


def _measured(fabric: "Fabric", step: "Step", pieces: "list[Piece]") -> dict[str, float]:
    from resilient.comms.certificate import certify
    from resilient.comms.simulate import simulate

    certificate = certify(fabric, step, pieces)
    crossing = sum(fabric.crosses(flow) for flow in step)
    return {
        "time": simulate(fabric, step, pieces, tolerance=_TOLERANCE).seconds,
        "load": certificate.load_s,
        "bound": certificate.bound_s,
        "pieces": certificate.pieces - len(step) + crossing,
        "flows": crossing,
    }


def _report(rounds: Rounds, states: list[str], ranks: int) -> Report:
    rows: dict[str, list[float | None]] = {}
    targets = []
    for workload in _WORKLOADS:
        for state in states:
            times = {}
            for method in _methods():
                name = f"{workload}, {state}: {method}"
                bound = rounds.series(name, "bound")
                times[method] = ratio(rounds.series(name, "time"), bound)
                rows[name] = [
                    times[method],
                    ratio(rounds.series(name, "load"), bound),
                    ratio(rounds.series(name, "pieces"), rounds.series(name, "flows")),
                ]
            what = f"{workload}, {state}: time of ours / bound"
            targets.append(Target(what=what, value=times[OURS], bound=1.01 if state == "healthy" else 1.10))
    return Report(
        name="flow_placement",
        title=f"One step in a simulated fabric of {ranks:,} hosts; medians over seeds",
        columns=("time / bound", "fullest link / bound", "pieces a flow"),
        rows=rows,
        targets=targets,
        plotted=("time / bound", "pieces a flow"),
        samples=rounds.samples,
        failures=rounds.failures,
    )
