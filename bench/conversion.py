"""From a ZeRO checkpoint to a universal one: `resilient` and DeepSpeed's own `ds_to_universal`, on the same files.

The checkpoint is written by DeepSpeed with two ranks, once. Each conversion is a command of its own: ours with the
workers it chooses or with none, DeepSpeed's with two. Its time ends when the result is on the medium, and its
memory is the most that the command and its workers held together, sampled every 50 ms, page cache of files that they
map included.
"""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from bench.memory import footprint
from bench.processes import Failure, launch
from bench.report import Report, Rounds, Target, ratio
from bench.settings import Settings

STAGES = (1, 3)
OURS, ALONE, THEIRS = "resilient", "resilient, one process", "ds_to_universal"
METHODS = tuple(f"ZeRO-{stage}: {method}" for stage in STAGES for method in (OURS, ALONE, THEIRS))
_STATED_BYTES = 80 << 20  # `convert.WORKER_BYTES`: the most that a worker takes beyond its program
_IDLE = """
import time
import resilient.checkpoint.formats.convert, resilient.checkpoint.formats.deepspeed
import resilient.checkpoint.formats.universal
print("ready", flush=True)
time.sleep(60)
"""
_CONVERT = """
import sys
from resilient.checkpoint.formats.convert import convert
from resilient.checkpoint.formats.source import Reference
if __name__ == "__main__":
    convert(Reference(url=sys.argv[1]), sys.argv[2], to="deepspeed-universal", workers=int(sys.argv[3]) or None)
"""


def measure(*, folder: str, method: str, source: str) -> dict[str, Any]:
    """Seconds and peak bytes of one conversion. Runs in a process of its own."""
    out = Path(folder) / "out"
    if not method.endswith(THEIRS):
        script = Path(folder) / "convert.py"
        script.write_text(_CONVERT)
        command = [str(script), source, str(out), "1" if method.endswith(ALONE) else "0"]
    else:
        (tag,) = (path for path in Path(source).iterdir() if path.is_dir())
        workers = ("--num_extract_workers", "2", "--num_merge_workers", "2", "--inject_missing_state")
        folders = ("--input_folder", str(tag), "--output_folder", str(out / "universal"))
        out.mkdir()
        command = ["-m", "deepspeed.checkpoint.ds_to_universal", *folders, *workers]
    program = _program(Path(folder)) if method.endswith(ALONE) else 0
    before, most = footprint(), 0
    start = time.perf_counter()
    with subprocess.Popen([sys.executable, *command], env={**os.environ, "DS_ACCELERATOR": "cpu"}) as process:
        while process.poll() is None:
            most = max(most, footprint() - before)
            time.sleep(0.05)
    _to_the_medium(out)
    seconds = time.perf_counter() - start
    if process.returncode:
        raise RuntimeError(f"{method} ended with exit status {process.returncode}")
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    return {"seconds": seconds, "most": most, "written": size, "program": program}


def _program(folder: Path) -> int:
    """Bytes of a process that has imported what a conversion needs, and does nothing."""
    script = folder / "idle.py"
    script.write_text(_IDLE)
    before = footprint()
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        held = footprint() - before
        process.kill()
    return held


def _to_the_medium(folder: Path) -> None:
    """What the command has left to the system to write; ours leaves nothing."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def run(settings: Settings) -> list[Report]:
    rounds = Rounds()
    checkpoints = settings.place.scratch.with_name("zero")
    try:
        for stage in STAGES:
            settings.say(f"conversion: DeepSpeed writes a checkpoint of ZeRO-{stage}")
            _write(checkpoints / str(stage), stage, settings)
        for number in range(settings.rounds):
            rounds.begin()
            for method in settings.turned(METHODS, number):
                settings.say(f"conversion, round {number + 1} of {settings.rounds}: {method}")
                source = str(checkpoints / method.removeprefix("ZeRO-")[0])
                measured = launch(settings.place, "bench.conversion:measure", {"method": method, "source": source})
                if isinstance(measured, Failure):
                    rounds.failed(method, measured.reason)
                else:
                    rounds.add(method, measured)
    finally:
        shutil.rmtree(checkpoints, ignore_errors=True)
    return [_report(rounds)]


def _write(folder: Path, stage: int, settings: Settings) -> None:
    """About 1 GiB; a fifth of it for a short look."""
    width, layers = (32, 2) if settings.smoke else (1024, 14) if settings.quick else (2048, 18)
    folder.mkdir(parents=True)
    job = Path(__file__).with_name("zero_job.py")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    numbers = map(str, (stage, width, layers))
    command = [sys.executable, *torchrun, str(job), str(folder), *numbers]
    settings.place.logs.mkdir(parents=True, exist_ok=True)
    log = settings.place.logs / "zero_job.log"
    with log.open("wb") as output:
        subprocess.run(command, check=True, stdout=output, stderr=subprocess.STDOUT, timeout=600)
    log.unlink()


def _report(rounds: Rounds) -> Report:
    rows: dict[str, list[float | None]] = {}
    targets = []
    for stage in STAGES:
        theirs = f"ZeRO-{stage}: {THEIRS}"
        seconds, most = rounds.series(theirs, "seconds"), rounds.series(theirs, "most")
        for method in (f"ZeRO-{stage}: {OURS}", f"ZeRO-{stage}: {ALONE}", theirs):
            own = rounds.series(method, "most")
            rows[method] = [
                ratio(rounds.series(method, "seconds"), seconds),
                ratio(own, most),
                ratio(own, rounds.series(method, "written")),
            ]
        ours, alone = rows[f"ZeRO-{stage}: {OURS}"], f"ZeRO-{stage}: {ALONE}"
        most, program = rounds.series(alone, "most"), rounds.series(alone, "program")
        taken = [None if a is None or b is None else a - b for a, b in zip(most, program, strict=True)]
        beyond = ratio(taken, [_STATED_BYTES] * len(taken))
        targets += [
            Target(what=f"ZeRO-{stage}: time / {THEIRS}", value=ours[0], bound=1.0),
            Target(what=f"ZeRO-{stage}: peak memory / {THEIRS}", value=ours[1], bound=1.0),
            Target(what=f"ZeRO-{stage}: memory beyond the program / WORKER_BYTES", value=beyond, bound=1.0),
        ]
    return Report(
        name="conversion",
        title="From ZeRO to a universal checkpoint, about 1 GiB",
        columns=(f"time / {THEIRS}", f"peak memory / {THEIRS}", "peak memory / written"),
        rows=rows,
        targets=targets,
        plotted=(f"time / {THEIRS}", f"peak memory / {THEIRS}"),
        samples=rounds.samples,
        failures=rounds.failures,
        notes=(
            "Each process that imports torch takes its memory (about 200 MiB) and seconds of that; ours are spawned.",
        ),
    )
