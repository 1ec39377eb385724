"""What the operator reads: one line at each end of a life and when the next one runs; the same as JSON lines.

Lines go to the standard error. Rank 0's node speaks for the job; another speaks when it has something of its own to
tell. With --log-dir every node also leaves resilient-<node>.jsonl there, with the facts behind each line.
"""

import json
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resilient.launch.run.decide import PREEMPTED, Action, Decision, how_it_ended


class Reporter:
    """Of one launcher. Does not raise: a log that cannot be written must not end the job."""

    def __init__(self, node: str, log_dir: Path | None) -> None:
        self._node = node
        self._file = None if log_dir is None else log_dir / f"resilient-{node}.jsonl"
        self.speaks = True

    def tell(self, event: str, text: str, facts: Mapping[str, Any], *, own: bool = False) -> None:
        """`facts`: what goes into the JSON line beside the text. `own`: something of this node, told even where another
        node speaks for the job.
        """
        if self.speaks or own:
            print(f"resilient: {text}", file=sys.stderr, flush=True)
        if self._file is None:
            return
        line = json.dumps({"time": time.time(), "event": event, "node": self._node, **facts, "text": text})
        try:
            with self._file.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            print(f"resilient: {self._file} cannot be written: {error}", file=sys.stderr)
            self._file = None


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """The end of a life. `step`: its last save; `safe`: the step that the ranks stopped with, if they stopped, and
    `problems`, why it may not be safe; `restored`: what the last life that restored anything began with (`life`,
    `step`, `levels`); `lost_steps`: in all lives; `exit_code`: of the launcher, if it ends.
    """

    life: int
    decision: Decision
    step: int | None = None
    safe: int | None = None
    problems: Sequence[str] = ()
    failure: Mapping[str, Any] | None = None
    restored: Mapping[str, Any] | None = None
    lost_steps: int = 0
    exit_code: int | None = None


def end_text(end: End) -> str:
    """What happened, and what comes next."""
    action, reason = end.decision.action, end.decision.reason
    at = "before its first save" if end.step is None else f"at step {end.step}"
    known = known_text(end.restored, end.lost_steps)
    code = f"{known} (exit code {end.exit_code})"
    if action is Action.DONE:
        lives = f" after {end.life + 1} lives" if end.life else ""
        return f"the job ended well{'' if end.step is None else f' {at}'}{lives}{known}"
    if action is Action.PREEMPTED:
        safe = reason if end.safe is None else f"the job stopped {at}, and step {end.safe} is safe"
        if end.problems:
            safe = f"the job stopped {at}, but step {end.safe} may not be safe ({'; '.join(end.problems)})"
        return f"{safe}: start the same command again to go on{code}"
    if action is Action.REGROUP:
        return f"life {end.life} stopped {at}, to go on with other nodes"
    if action is Action.STOPPED:
        return f"the job was stopped {at}: {reason}{code}"
    what = reason if end.failure is None else f"{failure_text(end.failure)}; {reason}"
    if action is Action.GIVE_UP:
        return f"life {end.life} ended {at}: {what}: giving up{code}"
    return f"life {end.life} ended {at}: {what}: starting again"


def known_text(restored: Mapping[str, Any] | None, lost_steps: int) -> str:
    """ "; life 2 began at step 7 from memory, 1 step lost in all": what every last line ends with."""
    if restored is None:
        return f"; nothing was restored, {number_of(lost_steps, 'step')} lost in all"
    began = f"life {restored['life']} began at step {restored['step']} from {restored['levels']}"
    return f"; {began}, {number_of(lost_steps, 'step')} lost in all"


def running_text(
    life: int, ranks: int, nodes: Sequence[str], lost: Sequence[str], new: Sequence[str], restored: str, after: str
) -> str:
    """ "life 1 runs on 4 ranks of 2 nodes, without n2: restored ..., 4.2 s after the failure"."""
    text = f"life {life} runs on {number_of(ranks, 'rank')} of {number_of(len(nodes), 'node')}"
    for word, names in (("without", lost), ("with", new)):
        text += f", {word} {', '.join(names)}" if names else ""
    return f"{text}: {restored}{after}"


def failure_text(failure: Mapping[str, Any]) -> str:
    """ "rank 1 on n2 (host h7) was killed by SIGKILL", with what the worker has said of it."""
    node, host = failure["node"], failure["host"]
    where = str(node) if node == host else f"{node} (host {host})"
    if failure.get("what"):
        return f"{where} {failure['what']}"
    text = f"rank {failure['rank']} on {where} {how_it_ended(failure['exit_code'])}"
    return f"{text} ({failure['message']})" if failure.get("message") else text


def restored_text(restored: Mapping[str, Any] | None, furthest: int | None) -> str:
    """ "restored step 7 from memory in 0.05 s, 0 steps lost"."""
    lost = steps_lost(restored, furthest)
    tail = "" if lost is None else f", {number_of(lost, 'step')} lost"
    if restored is None or restored.get("step") is None:
        return f"nothing to restore, it begins at the start{tail}"
    return f"restored step {restored['step']} from {levels_text(restored)} in {restored['seconds']:.2f} s{tail}"


def levels_text(restored: Mapping[str, Any]) -> str:
    """ "memory", or "memory (3 ranks) and parity (1 rank)"."""
    counts = Counter(restored["levels"].values())
    if len(counts) == 1:
        return str(next(iter(counts)))
    return " and ".join(f"{level} ({number_of(count, 'rank')})" for level, count in counts.most_common())


def steps_lost(restored: Mapping[str, Any] | None, furthest: int | None) -> int | None:
    """Steps that were done and have to be done again; None before the job had done any."""
    if furthest is None:
        return None
    step = None if restored is None else restored.get("step")
    return max(0, furthest - (step or 0))


def exit_code_of(action: Action, stop_signal: int | None) -> int | None:
    """How the launcher ends; None when another life follows."""
    codes = {Action.DONE: 0, Action.PREEMPTED: PREEMPTED, Action.GIVE_UP: 1, Action.STOPPED: 128 + (stop_signal or 15)}
    return codes.get(action)


def number_of(count: int, what: str) -> str:
    """ "1 step", "2 steps"."""
    return f"{count} {what}{'' if count == 1 else 's'}"
