"""One life of the job as its launcher sees it, and what is remembered of those before."""

import json
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resilient.checkpoint.events import Heard, read_events
from resilient.launch.run.decide import PREEMPTED, REGROUP
from resilient.launch.run.rendezvous import Agreed
from resilient.launch.run.report import levels_text, steps_lost
from resilient.launch.run.workers import Workers


class Life:
    """From the start of this node's workers to their end. Times are on the monotonic clock, in seconds."""

    def __init__(self, agreed: Agreed, folder: Path, workers: Workers) -> None:
        """`folder`: where the ranks of this node tell what happens."""
        self.number = agreed.life
        self.agreed = agreed
        self.workers = workers
        self.began_s = time.monotonic()
        self.joined_s: float | None = None
        self.restored: Mapping[str, Any] | None = None
        self.stopped: Mapping[str, Any] | None = None
        self.step: int | None = None
        self.saved_at_s = self.began_s
        self.longest_interval_s = 0.0
        self.stopping_s: float | None = None
        self.regroup_asked_s: float | None = None
        self.partly_stopped_s: float | None = None
        self.failure: Mapping[str, Any] | None = None
        self._folder = folder
        self._heard: dict[int, Heard] = {}

    def listen(self) -> None:
        """Take in what the ranks have told so far."""
        self._heard = read_events(self._folder)
        step = max((told.step for told in self._heard.values() if told.step is not None), default=None)
        if step is not None and step != self.step:
            at_s = max(told.saved_at_s or 0.0 for told in self._heard.values())
            if self.step is not None:
                self.longest_interval_s = max(self.longest_interval_s, at_s - self.saved_at_s)
            self.step, self.saved_at_s = step, at_s
        if self.joined_s is None and self._first("joined") is not None:
            self.joined_s = time.monotonic()
        self.restored = self.restored or self._first("restored")
        self.stopped = self.stopped or self._first("stopped")

    def stopped_with(self) -> tuple[int | None, list[str]]:
        """The step that the ranks have made safe before they stopped, if they did, and why it may not be safe."""
        return (None, []) if self.stopped is None else (self.stopped["step"], self.stopped["problems"])

    def exits(self) -> dict[int, int]:
        """How workers of this node have ended, by rank.

        One that had told that it stops by agreement counts as that, however its process ended then: gloo's threads
        abort a program now and then that ends with a group, and a second signal may kill it meanwhile.
        """
        codes = self.workers.exits()
        for rank, code in codes.items():
            stopped = self._heard[rank].last("stopped") if rank in self._heard else None
            if code != 0 and stopped is not None:
                codes[rank] = PREEMPTED if stopped.get("durable") else REGROUP
        return codes

    def failed_rank(self) -> int | None:
        """A rank of this node that failed; of several, one that was killed before one that may only have missed it."""
        failed = {rank: code for rank, code in self.exits().items() if code not in (0, PREEMPTED, REGROUP)}
        return min(failed, key=lambda rank: (failed[rank] > 0, rank), default=None)

    def failure_of(self, rank: int, node: str) -> dict[str, Any]:
        """What is known of a worker that failed."""
        facts = {"rank": rank, "exit_code": self.exits()[rank], "pid": self.workers.pid(rank)}
        return {**trouble(node, ""), **facts, "message": _message(self.workers.error_file(rank))}

    def _first(self, event: str) -> Mapping[str, Any] | None:
        return next((found for told in self._heard.values() if (found := told.last(event)) is not None), None)


@dataclass(slots=True)
class History:
    """Of the lives that have ended, as far as this launcher has seen them."""

    furthest: int | None = None
    lost_steps: int = 0
    joined: bool = False
    first_start_s: float | None = None
    ended: tuple[str, float] | None = None  # in a word, and when
    restored: Mapping[str, Any] | None = None  # by the last life that did: `life`, `step`, `levels`

    def add(self, life: Life) -> None:
        self.lost_steps += self.lost_in(life) or 0
        self.joined = self.joined or life.joined_s is not None
        if self.first_start_s is None and life.joined_s is not None:
            self.first_start_s = life.joined_s - life.began_s
        if life.restored is not None and life.restored.get("step") is not None:
            self.restored = {"life": life.number, "step": life.restored["step"], "levels": levels_text(life.restored)}
        self.furthest = max((step for step in (self.furthest, life.step) if step is not None), default=None)

    def lost_in(self, life: Life) -> int | None:
        """Steps that were done before this life and are done again in it; None before any were done."""
        return None if life.restored is None else steps_lost(life.restored, self.furthest)


def trouble(node: str, what: str) -> dict[str, Any]:
    """A failure of a node as a whole, in words."""
    return {"node": node, "host": socket.gethostname(), "time": time.time(), "what": what}


def _message(error_file: str) -> str:
    """The first line of what a worker that uses torch's `record` has left."""
    try:
        message = json.loads(Path(error_file).read_text(encoding="utf-8"))["message"]
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    text = message if isinstance(message, str) else str(message.get("message", ""))
    return (text.strip().splitlines() or [""])[0][:300]
