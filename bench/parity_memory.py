"""The memory that a node gives for snapshots that survive the loss of nodes, in images of its own, beside replication.

Measured on real agents, one for each rank of a job, as their status tells it: slots of images and parity. *One
buffer* is what one snapshot takes once it is safe; *two buffers* the most that is taken at any time while one snapshot
follows another, which a library needs so that the last one stays until the next is safe. What replicating libraries
take follows from how they are made: lm-resiliency 0.2 and ML Flashpoint keep two own and two of a partner's images
(4 x), DLRover's flash checkpoint one of each (2 x): read in their sources, not measured. Not in the ratios: buffers for
blocks on their way, which do not grow with the image.
"""

import os
from typing import Any

from bench.processes import Failure, launch
from bench.report import Report, Rounds, Target, ratio
from bench.settings import Settings

CODES = ((2, 1), (4, 2))
REPLICAS = {"one replica, one buffer (DLRover)": 2.0, "one replica, two buffers (lm-resiliency)": 4.0}
SLACK = 1.05
_PATIENCE_S = 60.0


def measure(*, folder: str, k: int, m: int, image_bytes: int, saves: int) -> dict[str, float]:
    """Bytes on the node that has most of them. A rank for each node."""
    import torch
    import torch.distributed as dist

    import resilient

    os.environ["RESILIENT_NODE"] = f"node{dist.get_rank()}"
    state = {"weights": torch.full((image_bytes,), dist.get_rank(), dtype=torch.uint8)}
    policy = resilient.Policy(parity=f"{k}+{m}", durable_every=0, agent_idle_s=30)
    taken: list[dict[str, float]] = []
    with resilient.Checkpointer(f"file://{folder}/durable", state, policy) as checkpointer:
        for step in range(saves):
            handle = checkpointer.save(step)
            if step:  # an image on its way, beside the one before it
                handle.durable("memory").result(_PATIENCE_S)
                taken.append(_taken(checkpointer))
            handle.durable("parity").result(_PATIENCE_S)
            taken.append(_taken(checkpointer))
            dist.barrier()
    one = {"image": taken[0]["image"], "one": taken[0]["sealed"] + taken[0]["parity"]}
    most = {"two": max(each["slots"] + each["parity"] for each in taken), "buffers": taken[-1]["buffers"]}
    nodes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(nodes, one | most)
    return {what: max(node[what] for node in nodes) for what in nodes[0]}


def _taken(checkpointer: Any) -> dict[str, float]:
    """What the agent of this node holds now; the bytes of one image are those of its slots."""
    status = checkpointer._link.client().status()
    capacities = [slot["capacity"] for slot in status["slots"]]
    sealed = [slot["capacity"] for slot in status["slots"] if slot["state"] == "sealed"]
    return {
        "image": max(capacities),
        "slots": sum(capacities),
        "sealed": sum(sealed),
        "parity": status["parity"]["bytes"],
        "buffers": status["parity"]["buffer_bytes"],
    }


def run(settings: Settings) -> list[Report]:
    rounds = Rounds()
    rounds.begin()  # one: it is not a matter of time
    for k, m in CODES:
        settings.say(f"parity_memory: {k}+{m}")
        image_bytes = 8 << 20 if settings.smoke else 128 << 20
        arguments = {"k": k, "m": m, "image_bytes": image_bytes, "saves": 6}
        measured = launch(settings.place, "bench.parity_memory:measure", arguments, ranks=k + m, threads=1)
        if isinstance(measured, Failure):
            rounds.failed(_name(k, m), measured.reason)
        else:
            rounds.add(_name(k, m), measured)
    return [report(rounds)]


def report(rounds: Rounds) -> Report:
    rows: dict[str, list[float | None]] = {}
    targets = []
    for k, m in CODES:
        image = rounds.series(_name(k, m), "image")
        one, two = (ratio(rounds.series(_name(k, m), what), image) for what in ("one", "two"))
        lost = float(m)
        rows[_name(k, m)] = [lost, one, two]
        bound = SLACK * 2 * (k + m) / k
        targets.append(Target(what=f"memory of a node / image, {_name(k, m)}, two buffers", value=two, bound=bound))
    rows["replication: one own, one of a partner's"] = [1.0, 2.0, None]
    rows["replication: two own, two of a partner's"] = [1.0, None, 4.0]
    return Report(
        name="parity_memory",
        title="Memory of a node for snapshots that survive losses, in images of its own",
        columns=("nodes that may be lost", "one buffer / image", "two buffers / image"),
        rows=rows,
        targets=targets,
        plotted=("one buffer / image", "two buffers / image"),
        samples=rounds.samples,
        failures=rounds.failures,
        notes=(
            "replication as its libraries do it: DLRover keeps one of each, lm-resiliency and ML Flashpoint two",
            f"besides, for blocks on their way, whatever the image: {_buffers(rounds)}",
        ),
    )


def _buffers(rounds: Rounds) -> str:
    found = {_name(k, m): rounds.series(_name(k, m), "buffers")[0] for k, m in CODES}
    return ", ".join(f"{value / 1e6:.0f} MB ({name})" for name, value in found.items() if value is not None)


def _name(k: int, m: int) -> str:
    return f"parity {k}+{m}"
