"""The demo (`make demo`): lose a trainer, then a whole node, watch the job come back each time, compare every bit.

Three nodes with a rank each: network namespaces of this machine, or processes on loopback where these cannot be had.
Stages: (1) train undisturbed and unprotected; (2) train the same job with a snapshot at every step, in memory and in
parity. In one step a trainer kills itself between backward and optimizer step: the job comes back from memory. In a
later one its whole node is killed, with the agent and all it held: a spare takes its place and gets its image from the
parity of the others. (3) compare weights, optimizer and losses, and print what protection and recovery cost. Exits with
1 unless all bits are equal and memory and parity are where the job came back from. Everything happens in temporary
folders and takes about two minutes on two slow cores. The figures are those of a toy on this machine; `bench/` is for
real ones.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

sys.path.append(str(Path(__file__).resolve().parent.parent))  # so that it runs from any folder, installed or not

from examples.multinode import Job, JobFailed
from examples.nodes import Nodes
from examples.steplog import Step, kill_mark, loss_mark, losses, read_steps

TRAINER = Path(__file__).resolve().with_name("train_gpt.py")
NODES = 3
PARITY = "2+1"
KILLED_RANK = 1
LOST_RANK = 2
POLL_S = 0.05


class DemoFailed(Exception):
    """The demo did not show what it promises; the message says what is missing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What one run of the trainer left behind. `killed_at`, `lost_at`: None where nobody, no node was killed."""

    result: dict[str, Any]
    steps: list[Step]
    killed_at: float | None = None
    lost_at: float | None = None

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

    def recovery_s(self, since: float) -> float:
        """From a moment to the end of the first step that a later life made."""
        before = max((step.life for step in self.steps if step.began < since), default=-1)
        return min(step.ended for step in self.steps if step.life > before) - since


def main() -> int:
    arguments = parse()
    console = Console()
    if not console.is_terminal:
        console = Console(width=110)
    with tempfile.TemporaryDirectory(prefix="resilient-demo-") as name:
        try:
            plain, resumed = run_both(arguments, Path(name), console)
            problems = compare(plain, resumed)
            console.print(report(plain, resumed))
        except (DemoFailed, JobFailed) as failure:
            problems = [str(failure)]
    for problem in problems:
        console.print(f"FAILED: {problem}", style="red", markup=False)
    if not problems:
        console.print("The disturbed run and the undisturbed run ended with the same bits.", style="green")
    return 1 if problems else 0


def run_both(arguments: argparse.Namespace, folder: Path, console: Console) -> tuple[Run, Run]:
    die_at, lose_at = arguments.die_at_step, arguments.lose_at_step
    common = ["--steps", str(arguments.steps), "--size", arguments.size, "--batch", str(arguments.batch)]
    disturbed = ["--url", str(folder / "durable"), "--durable-every", "0", "--parity", PARITY]
    disturbed += ["--die-at-step", str(die_at), "--die-rank", str(KILLED_RANK)]
    disturbed += ["--lose-at-step", str(lose_at), "--lose-rank", str(LOST_RANK)]
    console.print(f"1/2 undisturbed, without resilient: {NODES} nodes, {arguments.steps} steps")
    with progress(console, arguments.steps) as tell:
        plain = run_trainer(folder / "plain", [*common, "--no-resilient"], arguments.timeout_s, tell)
    console.print(f"2/2 with a snapshot at every step, parity {PARITY}")
    console.print(f"    in step {die_at} a trainer is killed, in step {lose_at} a whole node")
    with progress(console, arguments.steps) as tell:
        resumed = run_trainer(folder / "disturbed", [*common, *disturbed], arguments.timeout_s, tell)
    return plain, resumed


@contextmanager
def progress(console: Console, steps: int) -> Iterator[Callable[[Step], None]]:
    """Something to tell the newest step, often: it shows a bar on a terminal, and in a log a line now and then."""
    columns = TextColumn("    step"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.description}")
    shown = (0, 0)
    with Progress(*columns, TimeElapsedColumn(), console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("starting", total=steps)

        def tell(step: Step) -> None:
            nonlocal shown
            text = f"loss {step.loss:.3f}" + (f", life {step.life}" if step.life else "")
            bar.update(task, completed=step.step, description=text)
            now = step.life, step.step * 10 // steps
            if bar.disable and now != shown:
                console.print(f"    step {step.step}/{steps}, {text}", highlight=False)
            shown = now

        yield tell


def run_trainer(folder: Path, arguments: list[str], timeout_s: float, tell: Callable[[Step], None]) -> Run:
    """Run the trainer on nodes of its own until it ends; a node that asks to be lost is, and a spare replaces it.

    Blocks, at most for about `timeout_s`. `tell` gets the newest step now and then. Raises DemoFailed and JobFailed
    with the end of the trainers' output. Whatever ends the wait, Ctrl-C too, no process of it is left.
    """
    folder.mkdir()
    result = folder / "result.json"
    log = result.with_name(result.name + ".steps")
    command = [str(TRAINER), "--result", str(result), *arguments]
    lost_at = None
    with Nodes(NODES) as nodes, Job(nodes, command, folder=folder) as job:
        deadline = time.monotonic() + timeout_s
        while not job.poll():
            for step in read_steps(log)[-1:]:
                tell(step)
            if lost_at is None and loss_mark(log).exists():
                lost_at = time.time()
                job.replace(job.starts(job.newest_life())[LOST_RANK].node)
            if time.monotonic() > deadline:
                raise DemoFailed(f"the job did not end within {timeout_s:.0f} s; {outputs(folder)}")
            time.sleep(POLL_S)
    if not result.exists():
        raise DemoFailed(f"the job has left no result; {outputs(folder)}")
    killed = kill_mark(log)
    return Run(
        result=json.loads(result.read_text()),
        steps=read_steps(log),
        killed_at=float(json.loads(killed.read_text())["time"]) if killed.exists() else None,
        lost_at=lost_at,
    )


def outputs(folder: Path, lines: int = 20) -> str:
    """The end of what the trainers of each node have said."""
    said = []
    for output in sorted(folder.glob("*.txt")):
        text = output.read_text(encoding="utf-8", errors="replace").splitlines()
        said += [f"the last lines on node {output.stem}:", *text[-lines:]]
    return "\n".join(said)


def compare(plain: Run, resumed: Run) -> list[str]:
    """Why the demo failed: all that is not as promised. Empty when it succeeded."""
    restore = resumed.result["restore"]
    levels = [level for _, level in sorted(restore["levels"].items())] if restore else []
    expected = ["memory"] * (NODES - 1) + ["parity"]
    checks = {
        "no trainer was killed": resumed.killed_at is not None,
        "no node was lost": resumed.lost_at is not None,
        "nothing was restored": restore is not None,
        f"the job came back from {', '.join(levels) or 'nowhere'}, not from memory and parity": (
            sorted(levels) == expected
        ),
        "the weights differ": plain.result["weights"] == resumed.result["weights"],
        "the optimizer's state differs": plain.result["optimizer"] == resumed.result["optimizer"],
        "the losses differ": losses(plain.steps) == losses(resumed.steps),
        "the ranks disagree": plain.result["ranks_agree"] and resumed.result["ranks_agree"],
    }
    return [problem for problem, holds in checks.items() if not holds]


def report(plain: Run, resumed: Run) -> Table:
    """The table. Rows about what did not happen are left out."""
    table = Table("what", "value", "", title="resilient: a trainer killed, a node lost, back each time")
    call_s, fence_s = resumed.call_s(), resumed.fence_s()
    without, protected = plain.step_s(), resumed.step_s()
    table.add_row("blocked per save", ms(call_s + fence_s), f"call {ms(call_s)} (median), fence {ms(fence_s)} (mean)")
    table.add_row("step without resilient", ms(without[1]), f"median; half are within {spread(without)}")
    table.add_row("step with a snapshot each", ms(protected[1]), f"median; half are within {spread(protected)}")
    table.add_row("  difference", difference(without, protected), "")
    if resumed.killed_at is not None:
        recovery_s = resumed.recovery_s(resumed.killed_at)
        table.add_row("recovery from a killed trainer", f"{recovery_s:.1f} s", "from the kill to the first new step")
    restore = resumed.result["restore"]
    if restore and resumed.lost_at is not None:
        levels = ", ".join(f"rank {rank} {level}" for rank, level in sorted(restore["levels"].items()))
        recovery_s = resumed.recovery_s(resumed.lost_at)
        table.add_row("recovery from a lost node", f"{recovery_s:.1f} s", "most of it until torchrun gives the node up")
        table.add_row("  of that, restore", ms(restore["seconds"]), f"{restore['bytes'] / 1e6:.0f} MB on rank 0")
        table.add_row("restored", f"step {restore['step']}", levels)
    table.add_row("finished steps lost", str(steps_lost(resumed)), "made again, as well as those that were cut short")
    table.add_row("weights", plain.result["weights"][:12], f"disturbed run: {resumed.result['weights'][:12]}")
    table.add_row("optimizer", plain.result["optimizer"][:12], f"disturbed run: {resumed.result['optimizer'][:12]}")
    return table


def steps_lost(run: Run) -> int:
    """How many steps were finished, and made again in a later life."""
    numbers = [step.step for step in run.steps]
    return len(numbers) - len(set(numbers))


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
    parser = argparse.ArgumentParser(description="Lose a trainer and a node; compare the end with an undisturbed run.")
    add = parser.add_argument
    add("--steps", type=int, default=60)
    add("--size", default="demo")
    add("--batch", type=int, default=4)
    add("--die-at-step", type=int, metavar="S", help="a trainer is killed in it; default: a third of the steps")
    add("--lose-at-step", type=int, metavar="S", help="a node is killed in it; default: two thirds of the steps")
    add("--timeout-s", type=float, default=300.0, help="the longest that either run may take")
    parsed = parser.parse_args(arguments)
    if parsed.steps < 8:
        parser.error("--steps must be at least 8, or there is nothing to take a median of")
    parsed.die_at_step = parsed.die_at_step or parsed.steps // 3
    parsed.lose_at_step = parsed.lose_at_step or parsed.steps * 2 // 3
    return parsed


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
