"""What is known of a SLURM job before it is a script: one value, checked when it is made."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from resilient.errors import UsageError

Launcher = Literal["run", "torchrun", "srun"]

DEFAULT_GRACE_S = 120
MOST_GRACE_S = 65535  # sbatch takes no more in --signal
TIMER_S = 60  # SLURM may send the signal so much earlier: its resolution
_UNLIMITED = ("0", "infinite", "unlimited")
_TIME = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", re.ASCII)
_ARRAY = re.compile(r"\d+(-\d+(:\d+)?)?(,\d+(-\d+(:\d+)?)?)*(%[1-9]\d*)?", re.ASCII)
_NAME = re.compile(r"[\w.-]+", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class SlurmJob:
    """A training job for SLURM. Raises UsageError for what cannot be meant.

    `nodes` train and `spares` wait; `processes_per_node` are the ranks of a node (as many as GPUs if not given).
    `grace_s`: how long before the end of its time the job is told. `variables`: RESILIENT_... for the job;
    `options`: further lines for #SBATCH, such as "--partition=gpu"; `setup`: lines of shell, run before all else.
    `launcher`: what starts the ranks of a node: `resilient run`, torchrun, or srun itself. `command` is what runs,
    "train.py" first. `restarts`: failures in a row of the training step, and within it of its ranks.
    """

    command: tuple[str, ...]
    nodes: int = 1
    spares: int = 0
    gpus_per_node: int = 0
    processes_per_node: int | None = None
    time: str | None = None
    grace_s: int = DEFAULT_GRACE_S
    name: str = "train"
    array: str | None = None
    launcher: Launcher = "run"
    restarts: int = 3
    variables: Mapping[str, str] = field(default_factory=dict)
    options: tuple[str, ...] = ()
    setup: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for key, least in (("nodes", 1), ("spares", 0), ("gpus_per_node", 0), ("restarts", 0)):
            if getattr(self, key) < least:
                raise UsageError(f"{_option(key)} {getattr(self, key)} cannot be; give it {least} or more")
        if self.processes_per_node is not None and self.processes_per_node < 1:
            raise UsageError(f"--processes-per-node {self.processes_per_node} cannot be; give it 1 or more")
        if not self.command:
            raise UsageError("there is no training script; name it after --, as in: resilient slurm ... -- train.py")
        if self.array is not None and not _ARRAY.fullmatch(self.array):
            raise UsageError(f"--array {self.array} cannot be; write it as 0-7, 1,3,5 or 0-99%4")
        if not _NAME.fullmatch(self.name):
            raise UsageError(f"--name {self.name!r} cannot be; use letters, digits, dots, - and _")
        for option in self.options:
            if not option.startswith("-") or not option.isprintable():
                raise UsageError(f"--sbatch {option!r} cannot be; write it as --sbatch=--partition=gpu")
        self._check_grace()

    @property
    def all_nodes(self) -> int:
        return self.nodes + self.spares

    @property
    def ranks_per_node(self) -> int:
        return self.processes_per_node or self.gpus_per_node or 1

    def _check_grace(self) -> None:
        if not 1 <= self.grace_s <= MOST_GRACE_S:
            raise UsageError(f"--grace {self.grace_s} cannot be; SLURM takes 1 to {MOST_GRACE_S} s")
        limit_s = None if self.time is None else seconds_of(self.time)
        if limit_s is not None and self.grace_s + TIMER_S > limit_s:
            raise UsageError(
                f"--grace {self.grace_s} cannot be within --time {self.time} ({limit_s} s): the job would be told to "
                f"stop as soon as it runs (SLURM may do so {TIMER_S} s early); shorten the one or raise the other"
            )


def seconds_of(time: str) -> int | None:
    """A time limit as SLURM writes it, in seconds; None for no limit. Raises UsageError.

    "90" is minutes; "90:30" minutes and seconds; "2:00:00"; "1-12" days and hours; "1-12:30"; "1-12:30:00".
    """
    if time.lower() in _UNLIMITED:
        return None
    match = _TIME.fullmatch(time)
    if match is None or (match[1] is None and match[4] is not None and match[3] is None):
        raise UsageError(f"--time {time} cannot be; write it as minutes, 2:30:00 (hours) or 1-12:00:00 (days-hours)")
    days, first, second, third = (int(part) if part else 0 for part in match.groups())
    if match[1] is not None:
        return ((days * 24 + first) * 60 + second) * 60 + third
    if match[4] is not None:
        return (first * 60 + second) * 60 + third
    return first * 60 + second


def _option(key: str) -> str:
    return f"--{key.replace('_', '-')}"
