"""How near `resilient verify` comes to a raw read: every byte of a snapshot read and compared with its digest.

In one process, from a cold cache, in turns with the limit: an O_DIRECT read of the same image, several requests at a
time. Beside it the same for a checkpoint of torch's DCP, whose archives have a CRC-32 of every tensor.
"""

from pathlib import Path
from statistics import median
from typing import Any

from bench.levels import evict
from bench.processes import Failure, launch
from bench.report import Report, Rounds, Target, ratio
from bench.settings import Settings

NATIVE, DCP = "a snapshot of ours", "a DCP checkpoint (CRC-32)"


def measure(*, folder: str, size_bytes: int, times: int) -> dict[str, dict[str, float]]:
    """Median seconds of both, and of the limit. Runs in a process of its own."""
    import torch
    import torch.distributed.checkpoint as dcp

    import resilient
    from bench.limits import DEPTHS, filled_buffer, raw_read, timed
    from resilient.checkpoint.formats.registry import open_source
    from resilient.checkpoint.formats.source import Reference

    state: dict[str, Any] = {f"tensor{number}": torch.randn(size_bytes // 64) for number in range(16)}
    checkpointer = resilient.Checkpointer(f"{folder}/ours", state, resilient.Policy(durable_every=1))
    checkpointer.save(1).durable("durable").result()
    checkpointer.close()
    dcp.save(state, checkpoint_id=f"{folder}/dcp")
    state.clear()

    def verify(url: str) -> None:
        with open_source(Reference(url=url)) as source:
            found = list(source.verify(lambda _: None))
        assert not found, found

    (image,) = Path(folder, "ours").rglob("*.safetensors")
    buffer = filled_buffer(image.stat().st_size // 4096 * 4096)
    limits: dict[int, list[float]] = {depth: [] for depth in DEPTHS}
    seconds: dict[str, list[float]] = {"ours": [], "dcp": []}
    for _ in range(times):
        for depth in DEPTHS:
            limits[depth].append(raw_read(image, buffer, depth))
        for name, found in seconds.items():
            evict(Path(folder))
            found.append(timed(lambda name=name: verify(f"{folder}/{name}")))  # type: ignore[misc]
    limit = min(median(found) for found in limits.values())
    return {name: {"seconds": median(found), "limit": limit} for name, found in seconds.items()}


def run(settings: Settings) -> list[Report]:
    rounds = Rounds()
    arguments = {"size_bytes": 32 << 20 if settings.smoke else 1 << 30, "times": 3 if settings.quick else 5}
    for number in range(settings.rounds):
        rounds.begin()
        settings.say(f"verify, round {number + 1} of {settings.rounds}")
        found = launch(settings.place, "bench.verify:measure", arguments)
        for method, name in ((NATIVE, "ours"), (DCP, "dcp")):
            if isinstance(found, Failure):
                rounds.failed(method, found.reason)
            else:
                rounds.add(method, found[name])
    rows = {
        method: [ratio(rounds.series(method, "limit"), rounds.series(method, "seconds"))] for method in (NATIVE, DCP)
    }
    return [
        Report(
            name="verify",
            title="Verifying a checkpoint against reading it",
            columns=("speed / raw read",),
            rows=rows,
            targets=[Target(what=f"{NATIVE}: speed / raw read", value=rows[NATIVE][0], bound=0.9, at_most=False)],
            plotted=("speed / raw read",),
            samples=rounds.samples,
            failures=rounds.failures,
        )
    ]
