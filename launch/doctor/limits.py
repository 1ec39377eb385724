"""What the system lets a job have: memory for the images, page-locked memory, descriptors, files of their size."""

import os
import re
import resource
from dataclasses import dataclass
from pathlib import Path

from resilient.checkpoint.agent.huge_pages import huge_file
from resilient.checkpoint.agent.memory import Memory, available_bytes
from resilient.errors import OverBudget
from resilient.launch.cli.output import size_text
from resilient.launch.doctor.finding import Finding, fail, ok, warn
from resilient.launch.doctor.question import Question

_DESCRIPTORS = 256  # of an agent, for its peers, its stores and itself
_DESCRIPTORS_PER_RANK = 32  # up to eight buffers, each held for writing and for readers, and connections
_PROBE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Facts. A limit of None is none. `memory_limit`: which file says how much is left, "" for the whole machine's."""

    available_bytes: int
    memory_limit: str
    memory_file_error: str
    huge_pages: bool
    locked_bytes: int | None
    has_gpu: bool
    descriptors: int | None
    most_descriptors: int | None
    file_bytes: int | None


def examine(question: Question) -> list[Finding]:
    """Measure and decide. Does not block."""
    return decide(question, measure())


def decide(question: Question, limits: Limits) -> list[Finding]:
    return [
        decide_budget(question),
        decide_memory(question.wanted_bytes(), limits),
        decide_memory_files(limits),
        decide_locked(question.wanted_bytes(), limits),
        decide_descriptors(question.ranks_per_node, limits),
        decide_file_size(question.image_bytes, limits),
    ]


def decide_budget(question: Question) -> Finding:
    """Whether the budget that the policy states holds two images, as law 4 wants it."""
    image_bytes, stated = question.image_bytes, question.policy.memory_budget
    if image_bytes is None or stated is None:
        return ok("memory budget", f"{stated} for each rank" if stated else "two images and 5 % for each rank")
    budget = question.policy.budget_bytes(image_bytes)
    if budget >= 2 * image_bytes:
        return ok(
            "memory budget", f"{size_text(budget)} hold {budget // image_bytes} images of {size_text(image_bytes)}"
        )
    k, m = question.policy.parity_sizes() or (1, 0)
    needed = 2 * image_bytes * (k + m) // k
    return fail(
        "memory budget",
        f"{size_text(budget)} for images hold less than two of {size_text(image_bytes)}",
        f"set memory_budget to {needed} bytes or more",
    )


def decide_memory(wanted: int | None, limits: Limits) -> Finding:
    left = f"{size_text(limits.available_bytes)} left" + (f" ({limits.memory_limit})" if limits.memory_limit else "")
    if wanted is None:
        return ok("memory", f"{left}; --image-bytes or memory_budget would tell whether that is enough")
    if wanted <= limits.available_bytes:
        return ok("memory", f"{size_text(wanted)} wanted for this node's images, {left}")
    return fail(
        "memory",
        f"{size_text(wanted)} wanted for this node's images, {left}",
        "lower memory_budget, run fewer ranks on the node, or raise the memory limit of the container or job",
    )


def decide_memory_files(limits: Limits) -> Finding:
    if not limits.memory_file_error and limits.huge_pages:
        return ok("shared memory", "images get huge pages; the size of /dev/shm does not matter")
    if not limits.memory_file_error:
        return ok(
            "shared memory",
            "images get small pages, so copies to and from them are slower; the size of /dev/shm does not matter. For "
            "huge pages allow user namespaces, or: echo advise > /sys/kernel/mm/transparent_hugepage/shmem_enabled",
        )
    return fail(
        "shared memory",
        f"no memory file can be made: {limits.memory_file_error}",
        "allow memfd_create and file sealing (a seccomp profile of the container may forbid them)",
    )


def decide_locked(wanted: int | None, limits: Limits) -> Finding:
    if not limits.has_gpu:
        return ok("locked memory", "no GPU here: nothing is page-locked")
    if limits.locked_bytes is None or (wanted is not None and wanted <= limits.locked_bytes):
        allowed = "no limit" if limits.locked_bytes is None else f"{size_text(limits.locked_bytes)} allowed"
        return ok("locked memory", allowed)
    return warn(
        "locked memory",
        f"only {size_text(limits.locked_bytes)} may be page-locked; where the driver heeds that, copies from the GPU "
        "are slower",
        "ulimit -l unlimited (in SLURM: LimitMEMLOCK=infinity for slurmd)",
    )


def decide_descriptors(ranks: int, limits: Limits) -> Finding:
    needed = _DESCRIPTORS + _DESCRIPTORS_PER_RANK * ranks
    if limits.descriptors is None or limits.descriptors >= needed:
        allowed = "no limit" if limits.descriptors is None else f"{limits.descriptors} allowed"
        return ok("open files", f"{allowed}, up to {needed} needed")
    most = limits.most_descriptors
    change = (
        f"ulimit -n {needed}" if most is None or most >= needed else f"have the limit of open files raised, to {needed}"
    )
    return fail("open files", f"{limits.descriptors} allowed, up to {needed} needed", change)


def decide_file_size(image_bytes: int | None, limits: Limits) -> Finding:
    if limits.file_bytes is None:
        return ok("file size", "no limit")
    allowed = f"files of {size_text(limits.file_bytes)} allowed"
    if image_bytes is not None and image_bytes <= limits.file_bytes:
        return ok("file size", allowed)
    return fail("file size", f"{allowed}; an image may be larger", "ulimit -f unlimited")


def measure() -> Limits:
    """Facts of this machine and this process's limits."""
    left, which = memory_left()
    soft, hard = (_limit(number) for number in resource.getrlimit(resource.RLIMIT_NOFILE))
    return Limits(
        available_bytes=left,
        memory_limit=which,
        memory_file_error=_try_memory_file(),
        huge_pages=_try_huge_pages(),
        locked_bytes=_limit(resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]),
        has_gpu=any(re.fullmatch(r"nvidia\d+|kfd", name) for name in os.listdir("/dev")),
        descriptors=soft,
        most_descriptors=hard,
        file_bytes=_limit(resource.getrlimit(resource.RLIMIT_FSIZE)[0]),
    )


def memory_left(
    meminfo: Path = Path("/proc/meminfo"),
    groups: Path = Path("/proc/self/cgroup"),
    root: Path = Path("/sys/fs/cgroup"),
) -> tuple[int, str]:
    """What this process and its children can still have, and which control group says so ("": the machine).

    A limit may stand at any group between ours and the root, as SLURM and systemd set them.
    """
    least, which = available_bytes(meminfo, root / "no group"), ""
    for group in _own_groups(groups, root):
        left = available_bytes(meminfo, group)
        if left < least:
            least, which = left, str(group)
    return max(0, least), which


def _own_groups(groups: Path, root: Path) -> list[Path]:
    """The folders of our control group (version 2) and of all above it, the root first."""
    try:
        found = re.search(r"^0::/(.*)$", groups.read_text(), re.MULTILINE)
    except OSError:
        found = None
    folders = [root]
    for part in Path(found[1]).parts if found else ():
        folders.append(folders[-1] / part)
    return folders


def _try_memory_file() -> str:
    """Why no memory file can be had; "" if it can."""
    try:
        Memory(_PROBE_BYTES, "doctor").drop()
    except OverBudget as error:
        return str(error)
    return ""


def _try_huge_pages() -> bool:
    file = huge_file("doctor")
    if file is not None:
        os.close(file)
        return True
    advised = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
    return advised.is_file() and any(f"[{word}]" in advised.read_text() for word in ("always", "advise", "force"))


def _limit(number: int) -> int | None:
    return None if number == resource.RLIM_INFINITY else number
