"""From a notice of preemption to the moment when the step is safe on all ranks, in a real job under SLURM.

A job of two nodes and ranks is told by SIGUSR1 to its batch shell, as SLURM does before a job's time is up. The shell
passes the notice on, the ranks agree on a save, its snapshot is written to the disk. The limit is one step (the agreed
save may be a whole step away) and one direct write of as many bytes to the same disk. SLURM is one that the benchmark
starts by itself on this machine (`tests/slurm/cluster.py`), so both ranks share its cores and its disk.
"""

import os
import subprocess
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path

from bench.limits import measure as measure_limits
from bench.processes import Place
from bench.report import Report, Rounds, Target, ratio
from bench.settings import Settings
from resilient.launch.slurm import SlurmJob, batch_script
from tests.slurm.cluster import Cluster

JOB = Path(__file__).with_name("preemption_job.py")
METHOD, LIMIT = "resilient", "a step and one raw write"
STEP_S = 0.25
_PATIENCE_S = 300.0


def run(settings: Settings) -> list[Report]:
    rounds = Rounds()
    mib = 4 if settings.smoke else 512
    for _ in range(settings.rounds):
        rounds.begin()
        settings.say(f"preemption: a job with {mib} MiB of state")
        try:
            found = _measure(settings.place, mib)
        except (RuntimeError, TimeoutError, OSError, subprocess.SubprocessError) as error:
            rounds.failed(METHOD, str(error))
            continue
        rounds.add(METHOD, found)
        times = 1 if settings.quick else 3
        limits = measure_limits(folder=str(settings.place.fresh()), size_bytes=int(found["bytes"]), times=times)
        rounds.add(LIMIT, {"seconds": STEP_S + limits["raw write"], "write": limits["raw write"]})
    safe, limit = rounds.series(METHOD, "safe"), rounds.series(LIMIT, "seconds")
    whole = ratio(safe, limit)
    columns = ["notice → safe / limit", "notice → the agreed save / a step", "the agreed save → safe / raw write"]
    steps: list[float | None] = [STEP_S] * len(safe)
    row = [
        whole,
        ratio(rounds.series(METHOD, "agreed"), steps),
        ratio(rounds.series(METHOD, "flush"), rounds.series(LIMIT, "write")),
    ]
    return [
        Report(
            name="preemption",
            title="From SLURM's notice until the step is safe on all ranks",
            columns=columns,
            rows={METHOD: row},
            targets=[Target(what="notice to safe / (a step + one raw write)", value=whole, bound=2.0)],
            plotted=columns,
            samples=rounds.samples,
            failures=rounds.failures,
            notes=[f"two ranks, steps of {STEP_S} s, {mib} MiB of state on each"],
        )
    ]


def _measure(place: Place, mib: int) -> dict[str, float]:
    """Seconds from the notice to the agreed save and to safety, and the bytes that were written."""
    folder = place.fresh()
    slurm, out = folder / "slurm", folder / "out"
    slurm.mkdir()
    out.mkdir()
    cluster = Cluster(slurm, nodes=2)
    cluster.environment["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
    command = (str(JOB), str(folder / "durable"), str(out), str(mib), str(STEP_S))
    script = slurm / "job.sbatch"
    script.write_text(batch_script(SlurmJob(command=command, nodes=2, launcher="srun", grace_s=600)))
    try:
        cluster.start()
        number = cluster.submit(script)
        _wait(lambda: all((out / f"steady.{rank}").exists() for rank in range(2)), "the job takes steps", out)
        noticed_at = time.time()
        cluster.run("scancel", "--batch", "--signal=USR1", number)
        _wait(lambda: all((out / f"safe.{rank}").exists() for rank in range(2)), "the job is safe", out)
    finally:
        cluster.stop()
    told = [[float(word) for word in (out / f"safe.{rank}").read_text().split()] for rank in range(2)]
    agreed_at, safe_at = max(first for first, _ in told), max(second for _, second in told)
    nbytes = sum(path.stat().st_size for path in (folder / "durable").rglob("*.safetensors"))
    return {
        "safe": safe_at - noticed_at,
        "agreed": agreed_at - noticed_at,
        "flush": safe_at - agreed_at,
        "bytes": float(nbytes),
    }


def _wait(condition: Callable[[], bool], what: str, out: Path) -> None:
    """Raises TimeoutError, with what the job said."""
    end = time.monotonic() + _PATIENCE_S
    while not condition():
        if time.monotonic() > end:
            logs = "\n".join(path.read_text()[-1000:] for path in sorted(out.parent.rglob("*.txt")))
            raise TimeoutError(f"not within {_PATIENCE_S:g} s: {what}: {logs}")
        time.sleep(0.05)
