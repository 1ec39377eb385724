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
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

sys.path.append(str(Path(__file__).resolve().parent.parent))  # so that it runs from any folder, installed or not

from examples.steplog import Step, kill_mark, losses, read_steps

TRAINER = Path(__file__).resolve().with_name("train_gpt.py")
RANKS = 2
KILLED_RANK = 1
STOP_GRACE_S = 15.0


class DemoFailed(Exception):
    """The demo did not show what it promises; the message says what is missing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What one run of the trainer left behind. `killed_at` is None where nobody was killed."""

    result: dict[str, Any]
    steps: list[Step]
    killed_at: float | None

    def step_s(self) -> float:
        """Median over all lives; the first steps of a life warm up and do not count."""
        first = {step.life: step.step for step in reversed(self.steps)}
        return median([step.ended - step.began for step in self.steps if step.step > first[step.life] + 1])

    def call_s(self) -> float:
        return median([step.call_s for step in self.steps])

    def fence_s(self) -> float:
        fences: list[float] = self.result["fence_s"]
        return median(fences or [0.0])

    def recovery_s(self) -> float:
        """From the kill to the end of the first step that was made afterwards."""
        assert self.killed_at is not None, "only for a run that was killed"
        return min(step.ended for step in self.steps if step.life > 0) - self.killed_at


def main() -> int:
    arguments = parse()
    console = Console()
    die_at = arguments.die_at_step or arguments.steps * 2 // 3
    with tempfile.TemporaryDirectory(prefix="resilient-demo-") as name:
        folder = Path(name)
        common = ["--steps", str(arguments.steps), "--size", arguments.size, "--batch", str(arguments.batch)]
        killed = ["--url", str(folder / "durable"), "--memory-every", "1", "--durable-every", "0"]
        killed += ["--die-at-step", str(die_at), "--die-rank", str(KILLED_RANK)]
        try:
            with console.status("") as status:
                status.update(f"1/2 undisturbed, without resilient: {RANKS} ranks, {arguments.steps} steps")
                plain = run_trainer(folder / "plain", [*common, "--no-resilient"], arguments.timeout_s)
                status.update(f"2/2 a snapshot at every step; rank {KILLED_RANK} is killed in step {die_at}")
                resumed = run_trainer(folder / "killed", [*common, *killed], arguments.timeout_s)
            problems = compare(plain, resumed, die_at)
            console.print(report(plain, resumed, die_at))
        except DemoFailed as failure:
            problems = [str(failure)]
    for problem in problems:
        console.print(f"FAILED: {problem}", style="red", markup=False)
    if not problems:
        console.print("The killed run and the undisturbed run ended with the same bits.", style="green")
    return 1 if problems else 0


def run_trainer(folder: Path, arguments: list[str], timeout_s: float) -> Run:
    """Run the trainer under torchrun in `folder` until it ends. Blocks, at most for `timeout_s` and the stop.

    Raises DemoFailed with the end of its output when it fails or takes too long. Whatever ends the wait, Ctrl-C too,
    no process of it is left.
    """
    folder.mkdir()
    result, output = folder / "result.json", folder / "output.txt"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
    command += ["--max-restarts=3", str(TRAINER), "--result", str(result), *arguments]
    with output.open("wb") as sink:
        # Its own session, so that Ctrl-C reaches this process alone, which then stops the others in order.
        process = subprocess.Popen(
            command, stdout=sink, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
            env=trainer_environment(folder), start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise DemoFailed(f"the trainer did not end within {timeout_s:.0f} s; {tail(output)}") from None
        finally:
            stop(process)
    if code != 0 or not result.exists():
        raise DemoFailed(f"the trainer ended with {code}; {tail(output)}")
    log = result.with_name(result.name + ".steps")
    mark = kill_mark(log)
    killed_at = float(json.loads(mark.read_text())["time"]) if mark.exists() else None
    return Run(result=json.loads(result.read_text()), steps=read_steps(log), killed_at=killed_at)


def trainer_environment(folder: Path) -> dict[str, str]:
    """This process's environment, with one thread a rank and the agent's sockets in the demo's own folder."""
    return os.environ | {"OMP_NUM_THREADS": "1", "RESILIENT_RUNTIME_DIR": str(folder / "runtime")}


def stop(process: "subprocess.Popen[bytes]") -> None:
    """End torchrun, which ends its workers; by force, each by its pid, if that takes too long."""
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(STOP_GRACE_S)
    except subprocess.TimeoutExpired:
        workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        for pid in [process.pid, *map(int, workers)]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()


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
    slower = resumed.step_s() / plain.step_s() - 1
    table.add_row("blocked per save", ms(call_s + fence_s), f"call {ms(call_s)}, fence {ms(fence_s)} (medians)")
    table.add_row("step without resilient", ms(plain.step_s()), "median")
    table.add_row("step with a snapshot each", ms(resumed.step_s()), f"median; {slower:+.1%}")
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
    return parser.parse_args(arguments)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
