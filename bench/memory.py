"""The memory that checkpointing takes beyond the training itself: trainer, agent and other processes, over 20 saves.

Counted are the private and file pages of every process involved (the trainer's beyond what it had before) and all
shared memory once. A process is involved if the trainer started it or if it has the same memory file open.
"""

import os
from pathlib import Path
from typing import Any

from bench.processes import Failure, launch
from bench.report import Report, Rounds, Target, ratio
from bench.settings import Settings

OURS = ("resilient, memory", "resilient, memory + local")
METHODS = (*OURS, "dcp.async_save, thread", "dcp.async_save, async staging", "dcp.async_save, process")
MOST_IMAGES = 2.1  # two images and 5 %
_MEMORY_FILES = ("/memfd:", "/resilient-")  # of memfd_create; in the agent's own file system, which is mounted nowhere
File = tuple[int, int]  # device and inode


def measure(*, folder: str, method: str, shape: str, saves: int) -> dict[str, Any]:
    """The most extra bytes after any of `saves` saves. Runs in a process of its own."""
    from bench.ours import METHODS
    from bench.state import SHAPES, Training

    training = Training(SHAPES[shape])
    for _ in range(3):
        training.step(METHODS["no checkpoint"](training, Path(folder), fsynced=False).updating)
    before = footprint()
    saver = METHODS[method](training, Path(folder), fsynced=False)
    extra: list[int] = []
    for step in range(saves):
        safe = saver.save(step)
        training.step(saver.updating)
        extra.append(footprint() - before)
        safe.exception()
        extra.append(footprint() - before)
    saver.finish()
    half = len(extra) // 2
    return {"image_bytes": training.image_bytes(), "most": max(extra), "first": max(extra[:half]), "last": extra[-1]}


def footprint() -> int:
    """Bytes of memory that this process and those that belong to it hold, shared pages counted once."""
    involved = _descendants() | _sharers() | {os.getpid()}
    held = [_rollup(pid) for pid in involved]
    mapped = sum(shared for _, shared in held)
    return sum(private for private, _ in held) + max(mapped, sum(_memory_files(involved).values()))


def _rollup(pid: int) -> tuple[int, int]:
    """(private and file pages, share of shared memory) of a process, in bytes; zeros if it has ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    except (FileNotFoundError, ProcessLookupError):
        return 0, 0
    kibibytes = {line.split(":")[0]: int(line.split()[1]) for line in lines}
    return (kibibytes["Pss_Anon"] + kibibytes["Pss_File"]) << 10, kibibytes["Pss_Shmem"] << 10


def _memory_files(pids: set[int]) -> dict[File, int]:
    """{file: bytes that it holds} of the memory files that processes have open."""
    found: dict[File, int] = {}
    for pid in pids:
        try:
            for link in Path(f"/proc/{pid}/fd").iterdir():
                if os.readlink(link).startswith(_MEMORY_FILES):
                    stat = link.stat()
                    found[stat.st_dev, stat.st_ino] = stat.st_blocks * 512
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue  # it ended, or it is another user's
    return found


def _processes() -> list[int]:
    return [int(entry) for entry in os.listdir("/proc") if entry.isdigit()]


def _descendants() -> set[int]:
    parents = {}
    for pid in _processes():
        try:
            parents[pid] = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended meanwhile
    found = {os.getpid()}
    while True:
        more = {pid for pid, parent in parents.items() if parent in found} | found
        if more == found:
            return found - {os.getpid()}
        found = more


def _sharers() -> set[int]:
    """Processes that have a memory file open that this one has open or mapped, such as an agent that was detached."""
    mine = set(_memory_files({os.getpid()})) | _mapped_memory_files()
    return {pid for pid in _processes() if mine & set(_memory_files({pid}))} if mine else set()


def _mapped_memory_files() -> set[File]:
    found = set()
    for line in Path("/proc/self/maps").read_text().splitlines():
        _, _, _, device, inode, *name = line.split(maxsplit=5)
        if name and name[0].startswith(_MEMORY_FILES):
            major, minor = (int(number, 16) for number in device.split(":"))
            found.add((os.makedev(major, minor), int(inode)))
    return found


def run(settings: Settings) -> list[Report]:
    rounds = Rounds()
    for number in range(settings.rounds):
        rounds.begin()
        for method in settings.turned(METHODS, number):
            settings.say(f"memory, round {number + 1} of {settings.rounds}: {method}")
            shape = "tiny" if settings.smoke else "large"
            arguments = {"method": method, "shape": shape, "saves": 6 if settings.quick else 20}
            measured = launch(settings.place, "bench.memory:measure", arguments)
            if isinstance(measured, Failure):
                rounds.failed(method, measured.reason)
            else:
                rounds.add(method, measured)
    return [_report(rounds)]


def _report(rounds: Rounds) -> Report:
    rows: dict[str, list[float | None]] = {}
    for method in METHODS:
        image = rounds.series(method, "image_bytes")
        most, first = rounds.series(method, "most"), rounds.series(method, "first")
        rows[method] = [ratio(most, image), ratio(rounds.series(method, "last"), image), ratio(most, first)]
    return Report(
        name="memory",
        title="Extra memory of all processes over 20 saves of about 1 GiB",
        columns=("most / image", "at the end / image", "most / most of the first half"),
        rows=rows,
        targets=[
            Target(what=f"extra memory of {method} / image", value=rows[method][0], bound=MOST_IMAGES)
            for method in OURS
        ],
        plotted=("most / image",),
        samples=rounds.samples,
        failures=rounds.failures,
    )
