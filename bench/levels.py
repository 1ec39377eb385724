"""How near the levels come to the hardware: a local write, a restore from memory, a restore from the local disk.

Each stands beside its limit, taken just before or after it in the same process: an O_DIRECT write + fsync, one memory
copy of the same tensors, an O_DIRECT read, of as many bytes. A restore verifies every byte; the limits do not. What one
copy between two flat buffers in huge pages takes, which no restore into tensors can reach, is shown beside it.
"""

import os
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import Any

from bench.processes import Failure, launch
from bench.report import Report, Rounds, Target, ratio
from bench.settings import Settings

WRITE, MEMORY, LOCAL = "local write", "restore from memory", "restore from local disk"
CHUNK_BYTES = 16 << 20


def write(*, folder: str, size_bytes: int, times: int) -> dict[str, float]:
    """Median seconds of a FileStore's write from shared memory, and of the limit, in turns. In a process of its own."""
    from bench.limits import DEPTHS, filled_buffer, raw_write
    from resilient.checkpoint.agent.memory import Memory
    from resilient.checkpoint.levels.files import FileStore

    source = filled_buffer(size_bytes)
    image = Memory(size_bytes, "bench").view  # where the agent has its images
    image[:] = source[:]
    store, path = FileStore(f"{folder}/store"), Path(folder) / "limit"
    ours: list[float] = []
    limits: dict[int, list[float]] = {depth: [] for depth in DEPTHS}
    for turn in range(times):
        for depth in DEPTHS:
            limits[depth].append(raw_write(path, source, depth))
            path.unlink()
        name = f"step_{turn:08d}/rank_00000-of-00001.safetensors"
        began = time.perf_counter()
        store.write(name, _chunks(image))
        ours.append(time.perf_counter() - began)
        store.delete([name])
    return {"seconds": median(ours), "limit": min(median(found) for found in limits.values())}


def restore(*, folder: str, shape: str, times: int) -> dict[str, dict[str, float]]:
    """Median seconds of restores from memory and from the local disk, and of their limits. In a process of its own."""
    import resilient
    from bench.limits import DEPTHS, TensorCopy, copy_flat, filled_buffer, raw_read, raw_write, timed
    from bench.ours import policy
    from bench.state import SHAPES, Training

    training = Training(SHAPES[shape])
    training.step(nullcontext)
    source, target = filled_buffer(training.image_bytes()), filled_buffer(training.image_bytes())
    path = Path(folder) / "limit"
    raw_write(path, source, 4)

    def checkpointer() -> resilient.Checkpointer:
        state = {"model": training.model, "optimizer": training.optimizer}
        return resilient.Checkpointer(f"file://{folder}/durable", state, policy(Path(folder), local=True))

    def restored(level: str) -> float:
        ours = checkpointer()
        ours.restore()
        found = ours.last_restore
        assert found is not None, "there was nothing to restore"
        assert found.levels[0] == level, f"restored from another level: {found}"
        ours.close(keep_memory=level == "memory")
        return found.seconds

    first = checkpointer()
    first.save(1).durable("local").result()
    first.close(keep_memory=True)
    copy_tensors = TensorCopy([tensor for part in training.tensors.values() for tensor in part.values()])
    copy_tensors()
    copy_flat(source, target)
    memory, copies, by_tensor, local = [], [], [], []
    reads: dict[int, list[float]] = {depth: [] for depth in DEPTHS}
    for _ in range(times):
        copies.append(copy_flat(source, target))
        by_tensor.append(timed(copy_tensors))
        memory.append(restored("memory"))
    checkpointer().close()  # ends the agent, and what it held
    for _ in range(times):
        for depth in DEPTHS:
            reads[depth].append(raw_read(path, target, depth))
        evict(Path(folder) / "local")
        local.append(restored("local"))
    return {
        "memory": {"seconds": median(memory), "limit": median(by_tensor), "flat": median(copies)},
        "local": {"seconds": median(local), "limit": min(median(found) for found in reads.values())},
    }


def evict(folder: Path) -> None:
    """Take the files below a folder out of the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            file = os.open(path, os.O_RDONLY)
            try:
                os.fsync(file)
                os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(file)


def _chunks(image: memoryview) -> Iterator[memoryview]:
    return (image[start : start + CHUNK_BYTES] for start in range(0, len(image), CHUNK_BYTES))


def run(settings: Settings) -> list[Report]:
    rounds = Rounds()
    times = 3 if settings.quick else 5
    size_bytes = 32 << 20 if settings.smoke else 1 << 30
    shape = "tiny" if settings.smoke else "large"
    for number in range(settings.rounds):
        rounds.begin()
        settings.say(f"levels, round {number + 1} of {settings.rounds}")
        arguments: dict[str, Any] = {"size_bytes": size_bytes, "times": times}
        written = launch(settings.place, "bench.levels:write", arguments)
        arguments = {"shape": shape, "times": times}
        read = launch(settings.place, "bench.levels:restore", arguments)
        for method, found, part in ((WRITE, written, None), (MEMORY, read, "memory"), (LOCAL, read, "local")):
            if isinstance(found, Failure):
                rounds.failed(method, found.reason)
            else:
                rounds.add(method, found[part] if part else found)
    return [_report(rounds)]


def _report(rounds: Rounds) -> Report:
    limits = {WRITE: (0.9, "raw write + fsync"), MEMORY: (0.7, "memcpy of the tensors"), LOCAL: (0.9, "raw read")}
    rows: dict[str, list[float | None]] = {}
    for method in limits:
        seconds, limit = rounds.series(method, "seconds"), rounds.series(method, "limit")
        flat = ratio(rounds.series(method, "flat"), seconds) if method == MEMORY else None
        rows[method] = [ratio(limit, seconds), ratio(seconds, limit), flat]
    return Report(
        name="levels",
        title="The levels against the hardware",
        columns=("speed / limit", "time / limit", "speed / one flat copy"),
        rows=rows,
        targets=[
            Target(what=f"{method}: speed / {limit}", value=rows[method][0], bound=bound, at_most=False)
            for method, (bound, limit) in limits.items()
        ],
        plotted=("speed / limit",),
        samples=rounds.samples,
        failures=rounds.failures,
        notes=("limits: " + "; ".join(f"{method}: {limit}" for method, (_, limit) in limits.items()),),
    )
