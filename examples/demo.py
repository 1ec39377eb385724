"""The demo (`make demo`): kill a rank in mid-step, watch the job come back from memory, compare every bit.

Stages: (1) train undisturbed and unprotected; (2) train the same job with a snapshot at every step while one rank
kills itself between backward and optimizer step, and torchrun restarts both; (3) compare weights, optimizer and losses
and print what protection and recovery cost. Exits with 1 unless all bits are equal and memory is where the job came
back from. Everything happens in one temporary folder and takes one or two minutes on two slow cores. The figures are
those of a toy on this machine; `bench/` is for real ones.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from rich.console import Console
from rich.table import Table

sys.path.append(str(Path(__file__).resolve().parent.parent))  # so that it runs from any folder, installed or not

from examples.steplog import Step, kill_mark, losses, read_steps

TRAINER = Path(__file__).resolve().with_name("train_gpt.py")
RANKS = 2
KILLED_RANK = 1
STOP_GRACE_S = 15.0
POLL_S = 0.2


class DemoFailed(Exception):
    """The demo did not show what it promises; the message says what is missing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What one run of the trainer left behind. `killed_at` is None where nobody was killed."""

    result: dict[str, Any]
    steps: list[Step]
    killed_at: float | None

    def step_s(self) -> list[float]:
        """The lower quartile, median and upper quartile over all lives; the first two steps of a life warm up."""
        first = {step.life: step.step for step in reversed(self.steps)}
        return quantiles([step.ended - step.began for step in self.steps if step.step > first[step.life] + 1])

    def call_s(self) -> float:
        return median([step.call_s for step in self.steps])

    def fence_s(self) -> float:
        """Mean for a step of the last life. No median: most fences have nothing to wait for, and the others count."""
        fences: list[float] = self.result["fence_s"]
        return sum(fences) / max(1, len(self.result["step_s"]))

    def recovery_s(self) -> float:
        """From the kill to the end of the first step that was made afterwards."""
        assert self.killed_at is not None, "only for a run that was killed"
        return min(step.ended for step in self.steps if step.life > 0) - self.killed_at


def main() -> int:
    arguments = parse()
    console = Console()
    if not console.is_terminal:
        console = Console(width=110)
    die_at = arguments.die_at_step or arguments.steps * 2 // 3
    with tempfile.TemporaryDirectory(prefix="resilient-demo-") as name:
        folder = Path(name)
        common = ["--steps", str(arguments.steps), "--size", arguments.size, "--batch", str(arguments.batch)]
        killed = ["--url", str(folder / "durable"), "--memory-every", "1", "--durable-every", "0"]
        killed += ["--die-at-step", str(die_at), "--die-rank", str(KILLED_RANK)]
        try:
            with console.status("starting") as status:

                def tell(step: Step) -> None:
                    again = ", after a restart" if step.life else ""
                    status.update(f"step {step.step} of {arguments.steps}{again}, loss {step.loss:.3f}")

                console.print(f"1/2 undisturbed, without resilient: {RANKS} ranks, {arguments.steps} steps")
                plain = run_trainer(folder / "plain", [*common, "--no-resilient"], arguments.timeout_s, tell)
                console.print(f"2/2 with a snapshot at every step; rank {KILLED_RANK} is killed in step {die_at}")
                resumed = run_trainer(folder / "killed", [*common, *killed], arguments.timeout_s, tell)
            problems = compare(plain, resumed, die_at)
            console.print(report(plain, resumed, die_at))
        except DemoFailed as failure:
            problems = [str(failure)]
    for problem in problems:
        console.print(f"FAILED: {problem}", style="red", markup=False)
    if not problems:
        console.print("The killed run and the undisturbed run ended with the same bits.", style="green")
    return 1 if problems else 0


def run_trainer(folder: Path, arguments: list[str], timeout_s: float, tell: Callable[[Step], None]) -> Run:
    """Run the trainer under torchrun in `folder` until it ends. Blocks, at most for `timeout_s` and the stop.

    `tell` gets the newest step now and then. Raises DemoFailed with the end of the trainer's output when it fails or
    takes too long. Whatever ends the wait, Ctrl-C too, no process of it is left.
    """
    folder.mkdir()
    result, output = folder / "result.json", folder / "output.txt"
    log = result.with_name(result.name + ".steps")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
    command += ["--max-restarts=3", str(TRAINER), "--result", str(result), *arguments]
    with output.open("wb") as sink:
        # Its own session, so that Ctrl-C reaches this process alone, which then stops the others in order.
        process = subprocess.Popen(
            command, stdout=sink, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
            env=trainer_environment(folder), start_new_session=True,
        )  # fmt: skip
        try:
            code = watch(process, log, time.monotonic() + timeout_s, tell)
        finally:
            stop(process, folder)
    if code is None:
        raise DemoFailed(f"the trainer did not end within {timeout_s:.0f} s; {tail(output)}")
    if code != 0 or not result.exists():
        raise DemoFailed(f"the trainer ended with {code}; {tail(output)}")
    mark = kill_mark(log)
    killed_at = float(json.loads(mark.read_text())["time"]) if mark.exists() else None
    return Run(result=json.loads(result.read_text()), steps=read_steps(log), killed_at=killed_at)


def trainer_environment(folder: Path) -> dict[str, str]:
    """This process's environment, with one thread a rank, and the demo's own folder for sockets and torchrun's logs."""
    return os.environ | {"OMP_NUM_THREADS": "1", "RESILIENT_RUNTIME_DIR": str(folder), "TMPDIR": str(folder)}


def watch(process: "subprocess.Popen[bytes]", log: Path, deadline: float, tell: Callable[[Step], None]) -> int | None:
    """Wait for the exit code; None when `deadline` (monotonic) passes first."""
    while time.monotonic() < deadline:
        try:
            return process.wait(POLL_S)
        except subprocess.TimeoutExpired:
            for step in read_steps(log)[-1:]:
                tell(step)
    return None


def stop(process: "subprocess.Popen[bytes]", folder: Path) -> None:
    """End torchrun, which ends its workers; then, by force, whatever is left of the job, its agent too. Blocks."""
    if process.poll() is None:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOP_GRACE_S)
    deadline = time.monotonic() + STOP_GRACE_S
    while (left := processes_of(folder)) and time.monotonic() < deadline:
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(POLL_S)
    process.poll()


def processes_of(folder: Path) -> list[int]:
    """The processes whose command line names `folder`, a temporary one of this demo: torchrun, workers and agent."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it ended meanwhile
            if os.fsencode(folder) + b"/" in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
    return found


def tail(output: Path, lines: int = 40) -> str:
    text = output.read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join([f"the last lines of its output ({output.name}):", *text[-lines:]])


def compare(plain: Run, resumed: Run, die_at: int) -> list[str]:
    """Why the demo failed: all that is not as promised. Empty when it succeeded."""
    restore = resumed.result["restore"]
    levels = set(restore["levels"].values()) if restore else set()
    checks = {
        f"nobody was killed in step {die_at}": resumed.killed_at is not None,
        "nothing was restored": restore is not None,
        f"the job came back from {', '.join(sorted(levels)) or 'nowhere'}, not from memory": levels == {"memory"},
        "the weights differ": plain.result["weights"] == resumed.result["weights"],
        "the optimizer's state differs": plain.result["optimizer"] == resumed.result["optimizer"],
        "the losses differ": losses(plain.steps) == losses(resumed.steps),
        "the ranks disagree": plain.result["ranks_agree"] and resumed.result["ranks_agree"],
    }
    return [problem for problem, holds in checks.items() if not holds]


def report(plain: Run, resumed: Run, die_at: int) -> Table:
    """The table. Rows about the restore are left out where there was none."""
    table = Table("what", "value", "", title="resilient: killed in mid-step, back from memory")
    call_s, fence_s = resumed.call_s(), resumed.fence_s()
    without, protected = plain.step_s(), resumed.step_s()
    table.add_row("blocked per save", ms(call_s + fence_s), f"call {ms(call_s)} (median), fence {ms(fence_s)} (mean)")
    table.add_row("step without resilient", ms(without[1]), f"median; half are within {spread(without)}")
    table.add_row("step with a snapshot each", ms(protected[1]), f"median; half are within {spread(protected)}")
    table.add_row("  difference", difference(without, protected), "")
    restore = resumed.result["restore"]
    if restore:
        levels = ", ".join(f"rank {rank} {level}" for rank, level in sorted(restore["levels"].items()))
        lost = die_at - 1 - restore["step"]
        table.add_row("recovery", f"{resumed.recovery_s():.1f} s", "from the kill to the first new step")
        table.add_row("  of that, restore", ms(restore["seconds"]), f"{restore['bytes'] / 1e6:.0f} MB on rank 0")
        table.add_row("restored", f"step {restore['step']}", levels)
        table.add_row("finished steps lost", str(lost), f"step {die_at} was cut short and is made again")
        table.add_row("restarts", str(resumed.result["life"]), "by torchrun")
    table.add_row("weights", plain.result["weights"][:12], f"killed run: {resumed.result['weights'][:12]}")
    table.add_row("optimizer", plain.result["optimizer"][:12], f"killed run: {resumed.result['optimizer'][:12]}")
    return table


def difference(without: list[float], protected: list[float]) -> str:
    """How much longer a step takes, unless the machine itself varies more than that."""
    if protected[1] <= without[2]:
        return "less than the machine varies"
    return f"{protected[1] / without[1] - 1:+.1%}"


def spread(quartiles: list[float]) -> str:
    return f"{ms(quartiles[0])} to {ms(quartiles[2])}"


def ms(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Kill a rank in mid-step and compare the end with an undisturbed run.")
    add = parser.add_argument
    add("--steps", type=int, default=60)
    add("--size", default="demo")
    add("--batch", type=int, default=4)
    add("--die-at-step", type=int, metavar="S", help="default: two thirds of the steps")
    add("--timeout-s", type=float, default=240.0, help="the longest that either run may take")
    parsed = parser.parse_args(arguments)
    if parsed.steps < 8:
        parser.error("--steps must be at least 8, or there is nothing to take a median of")
    return parsed


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
