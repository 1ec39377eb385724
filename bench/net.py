"""Collectives in emulated networks with several paths: gloo, gloo over several groups, and the backend "resilient".

`examples/fabric.py` builds the networks; hosts are processes on this machine, links keep to rates far below what it can
move. A round has a seed of its own for the switches' hashes, and new connections. Three figures of each collective:

    time / bound            bound: the bytes that left or reached a leaf, headers included, over the rates of its links
    worst / bound           the slowest of all repetitions of a round
    fullest link / bound    what links' counters say; 1 is as good as packet spraying

Beside them stands the time of gloo over a method's. Small messages and ranks on one host are timed in one process
against gloo, in turns. `bench/net_worker.py` is what a rank does. Needs root.
"""

import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from bench.report import Report, Rounds, Target, ratio
from bench.settings import Settings

if TYPE_CHECKING:
    from examples.fabric import Fabric, Link
    from examples.netns import Job

ROOT = Path(__file__).resolve().parents[1]
OURS, GLOO, GROUPS, EQUAL = "resilient", "gloo", "gloo, 4 groups", "gloo, a group a plane"
COLLECTIVES = ("all_reduce", "reduce_scatter", "all_gather", "all_to_all")
_MBIT = 1e6 / 8
_PHASE_S = 240.0
_LEAF_SPINE, _UNEQUAL, _SLOW = "4 spines", "planes of 200 and 100", "4 planes, a link at a quarter"
_ONE_HOST, _SMALL = "one host, 2 ranks", "4 spines, small"


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """`slow`: (leaf, path) and the rate in Mbit/s that it has; `sizes` in MiB."""

    name: str
    fabric: "Fabric"
    mbits: Sequence[float]
    methods: Sequence[str]
    phases: Sequence[tuple[str, float]]
    slow: Mapping[tuple[int, int], float] = field(default_factory=dict)

    def rate(self, leaf: int, path: int) -> float:
        """Bytes a second of a link, each way."""
        return self.slow.get((leaf, path), self.mbits[path]) * _MBIT


def run(settings: Settings) -> list[Report]:
    from examples.netns import can_make_namespaces

    rounds = Rounds()
    if not can_make_namespaces():
        rounds.failed("all", "network namespaces need root, iproute2 and util-linux")
        return [_report(rounds)]
    for number in range(settings.rounds):
        rounds.begin()
        for scenario in _scenarios(settings):
            _measure(scenario, number, settings, rounds)
        _beside_gloo(settings, rounds)
    return [_report(rounds)]


def _scenarios(settings: Settings) -> list[Scenario]:
    from examples.fabric import LeafSpine, MultiPlane

    sizes = [1.0] if settings.smoke else [16.0] if settings.quick else [4.0, 16.0, 64.0]
    one = sizes[len(sizes) // 2]
    return [
        Scenario(
            name=_LEAF_SPINE,
            fabric=LeafSpine(hosts=4, spines=4, rate="100mbit"),
            mbits=[100.0] * 4,
            methods=(GLOO, GROUPS, OURS),
            phases=[(name, size) for size in sizes for name in COLLECTIVES if size == one or name == COLLECTIVES[0]],
        ),
        Scenario(
            name=_UNEQUAL,
            fabric=MultiPlane(hosts=2, rates=["200mbit", "100mbit"]),
            mbits=[200.0, 100.0],
            methods=(GLOO, EQUAL, OURS),
            phases=[("all_reduce", one)],
        ),
        Scenario(
            name=_SLOW,
            fabric=MultiPlane(hosts=2, rates=["100mbit"] * 4),
            mbits=[100.0] * 4,
            methods=(EQUAL, OURS),
            phases=[("all_reduce", one)],
            slow={(1, 2): 25.0},
        ),
    ]


def _measure(scenario: Scenario, number: int, settings: Settings, rounds: Rounds) -> None:
    with scenario.fabric as fabric:
        for (leaf, path), mbit in scenario.slow.items():
            fabric.link(leaf, path).slow(f"{mbit:g}mbit")
        for method in settings.turned(scenario.methods, number):
            settings.say(f"net, round {number}: {scenario.name}, {method}")
            try:
                for (name, size), measured in _job(scenario, fabric, method, 3 if settings.quick else 10).items():
                    rounds.add(_row(scenario.name, name, size, method), measured)
            except RuntimeError as error:
                rounds.failed(f"{scenario.name}: {method}", str(error)[-2000:])


def _job(scenario: Scenario, fabric: "Fabric", method: str, repeats: int) -> dict[tuple[str, float], dict[str, float]]:
    """All collectives in one job, whose ranks stop between them so that counters can be read."""
    found = {}
    with tempfile.TemporaryDirectory(prefix="net-") as name:
        folder = Path(name)
        with fabric.launch(_command(folder, method, scenario.phases, repeats), env=_environment(folder, fabric)) as job:
            for number, phase in enumerate(scenario.phases):
                _await(folder / f"ready{number}", job)
                before = fabric.counters()
                (folder / f"go{number}").touch()
                took = json.loads(_await(folder / f"done{number}", job))
                carried = {link: count - before[link] for link, count in fabric.counters().items()}
                found[phase] = _figures(scenario, carried, took)
            job.wait(60).check()
    return found


def _command(folder: Path, method: str, phases: Sequence[tuple[str, float]], repeats: int) -> list[str]:
    return [
        sys.executable,
        "-P",
        str(ROOT / "bench" / "net_worker.py"),
        str(folder),
        method,
        json.dumps(phases),
        str(repeats),
    ]


def _environment(folder: Path, fabric: "Fabric") -> dict[str, str]:
    path = folder / "topology.toml"
    path.write_text(fabric.topology())
    return {"RESILIENT_TOPOLOGY": str(path)}


def _await(path: Path, job: "Job") -> str:
    end = time.monotonic() + _PHASE_S
    while not path.exists():
        if time.monotonic() > end or any(process.poll() for process in job.processes.values()):
            told = "\n".join(job.output(name)[-1000:] for name in job.processes)
            raise RuntimeError(f"the ranks did not come to {path.name}:\n{told}")
        time.sleep(0.01)
    return path.read_text()


def _figures(scenario: Scenario, carried: "Mapping[Link, int]", took: Sequence[float]) -> dict[str, float]:
    """`carried`: bytes on each link in all repetitions."""
    bound_s = fullest_s = 0.0
    for way, leaf in {(way, leaf) for way, leaf, _ in carried}:
        paths = range(len(scenario.mbits))
        counts, rates = [carried[way, leaf, path] for path in paths], [scenario.rate(leaf, path) for path in paths]
        bound_s = max(bound_s, sum(counts) / sum(rates))
        fullest_s = max(fullest_s, *(count / rate for count, rate in zip(counts, rates, strict=True)))
    ordered = sorted(took)
    return {
        "time": ordered[len(ordered) // 2],
        "worst": ordered[-1],
        "bound": bound_s / len(took),
        "fullest": fullest_s / len(took),
    }


def _beside_gloo(settings: Settings, rounds: Rounds) -> None:
    """Where lanes do not pay: one host, and small messages between several."""
    from examples.fabric import LeafSpine

    count = 50 if settings.quick else 400
    sizes = [4, 1 << 16, 1 << 18] if settings.smoke or settings.quick else [4, 1 << 12, 1 << 16, 1 << 18, 1 << 19]
    with LeafSpine(hosts=2, spines=4, rate="400mbit") as fabric:
        for name, hosts, per_host, more in ((_ONE_HOST, [0], 2, [1 << 22]), (_SMALL, [0, 1], 1, [])):
            settings.say(f"net: {name}")
            with tempfile.TemporaryDirectory(prefix="net-") as folder:
                command = _command(Path(folder), "beside", [("all_reduce", size) for size in [*sizes, *more]], count)
                outcome = fabric.run(
                    command, hosts=hosts, per_host=per_host, env=_environment(Path(folder), fabric), timeout_s=_PHASE_S
                )
                if outcome.code:
                    rounds.failed(name, outcome.outputs["0"][-2000:])
                    continue
                for size, (ours, gloo) in json.loads((Path(folder) / "beside").read_text()).items():
                    rounds.add(_small(name, int(size)), {"time": ours, GLOO: gloo})


def _row(scenario: str, collective: str, mib: float, method: str) -> str:
    return f"{scenario}, {collective} {mib:g} MiB: {method}"


def _small(scenario: str, nbytes: int) -> str:
    size = f"{nbytes} B" if nbytes < 1024 else f"{nbytes >> 10} KiB"
    return f"{scenario}, all_reduce {size}: {OURS}"


def _report(rounds: Rounds) -> Report:
    rows: dict[str, list[float | None]] = {}
    for name in rounds.samples:
        what = name.partition(": ")[0]
        times = rounds.series(name, "time")
        if GLOO in rounds.samples[name]:
            rows[name] = [None, None, None, ratio(rounds.series(name, GLOO), times)]
            continue
        bound = rounds.series(name, "bound")
        plain = rounds.series(f"{what}: {GLOO if f'{what}: {GLOO}' in rounds.samples else EQUAL}", "time")
        rows[name] = [
            ratio(times, bound),
            ratio(rounds.series(name, "worst"), bound),
            ratio(rounds.series(name, "fullest"), bound),
            ratio(plain, times),
        ]
    return Report(
        name="net",
        title="Collectives in emulated networks; medians over rounds",
        columns=("time / bound", "worst / bound", "fullest link / bound", "gloo / this"),
        rows=rows,
        targets=_targets(rows),
        plotted=("time / bound", "fullest link / bound"),
        samples=rounds.samples,
        failures=rounds.failures,
        notes=(
            f"with a slow link, the last column has {EQUAL!r}, which splits equally, in the place of gloo",
            "small messages: the median of many pairs of calls, one right after the other, in one process",
            "links pass on segments of up to 64 KiB whole, so headers are less than 1 % of what they count",
        ),
    )


def _targets(rows: Mapping[str, Sequence[float | None]]) -> list[Target]:
    targets = []
    for name, (time_ratio, _, load, faster) in rows.items():
        if not name.endswith(f": {OURS}"):
            continue
        what = name.partition(": ")[0]
        if time_ratio is None:
            slower = None if not faster else 1 / faster
            targets.append(Target(what=f"{what}: time / gloo's", value=slower, bound=1.02))
        elif what.startswith(_SLOW):
            targets.append(
                Target(what=f"{what}: times as quick as equal shares", value=faster, bound=2.5, at_most=False)
            )
        else:
            targets.append(
                Target(
                    what=f"{what}: time / bound", value=time_ratio, bound=1.15 if what.startswith(_UNEQUAL) else 1.10
                )
            )
            targets.append(Target(what=f"{what}: fullest link / bound", value=load, bound=1.05))
    return targets
