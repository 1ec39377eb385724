"""All checks of a machine, one after the other, each on a thread of its own that is waited for only so long.

A check that hangs (a dead file server, say) is reported and left behind: its thread cannot be ended, so whoever has
`Examination.overdue` leaves the process without waiting for threads.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from queue import Empty, SimpleQueue

from resilient.errors import PolicyError, ResilientError
from resilient.launch.doctor import levels, limits, network, software, storage, surroundings
from resilient.launch.doctor.finding import Finding, fail
from resilient.launch.doctor.question import Question

Check = Callable[[], list[Finding]]


@dataclass(slots=True)
class Examination:
    """What was found on this machine; `overdue` names the checks that did not come to an end."""

    findings: list[Finding] = field(default_factory=list)
    overdue: list[str] = field(default_factory=list)


def examine(question: Question) -> Examination:
    """Make all checks that the question calls for. Blocks for `patience_s` a check at most; raises nothing."""
    found = Examination()
    for name, check in checks(question):
        findings = within(question.patience_s, check)
        if findings is None:
            found.overdue.append(name)
            told = f"no answer within {question.patience_s:g} s"
            findings = [fail(name, told, "look at the file server, service or network behind it")]
        found.findings += findings
    return found


def checks(question: Question) -> list[tuple[str, Check]]:
    """Name and check, in the order of the report."""
    found: list[tuple[str, Check]] = [
        ("software", software.examine),
        ("limits", lambda: limits.examine(question)),
        ("surroundings", lambda: surroundings.examine(question)),
        ("network", lambda: network.examine(question)),
    ]
    for level, url in (("local", question.policy.local), ("url", question.url)):
        if url is not None:
            found.append((level, partial(_level, level, url, question)))
    return found


def _level(level: str, url: str, question: Question) -> list[Finding]:
    try:
        return levels.decide(level, storage.probe(url), question)
    except PolicyError as error:
        return [fail(level, str(error), "correct the URL, or install what it needs")]
    except (ResilientError, OSError) as error:
        return [fail(level, str(error), "give a folder, or a URL that this user may use")]


def within(patience_s: float, check: Check) -> list[Finding] | None:
    """What the check finds; None when it takes longer. What it raises is a defect, and raised here."""
    outcome: SimpleQueue[list[Finding] | BaseException] = SimpleQueue()

    def run() -> None:
        try:
            outcome.put(check())
        except BaseException as error:  # for the caller's thread, whatever it is
            outcome.put(error)

    threading.Thread(target=run, name="resilient-doctor", daemon=True).start()
    try:
        found = outcome.get(timeout=patience_s)
    except Empty:
        return None
    if isinstance(found, BaseException):
        raise found
    return found
