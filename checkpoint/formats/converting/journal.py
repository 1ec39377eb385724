"""What a conversion leaves in its target while it is under way, and what that means for one that comes. Pure."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from resilient.errors import UsageError


@dataclass(frozen=True, slots=True, kw_only=True)
class Journal:
    """A conversion that is under way: what from and how (`identity`), and the names of its outputs.

    `boot`: which start of which machine. `clearing`: older files of the same names may still be there.
    """

    identity: Mapping[str, Any]
    outputs: tuple[str, ...]
    boot: str
    clearing: bool = False

    def text(self) -> bytes:
        raw = {"format": "resilient.conversion", "version": 1, "identity": self.identity, "boot": self.boot}
        return (json.dumps(raw | {"outputs": self.outputs, "clearing": self.clearing}, indent=1) + "\n").encode()


def parse_journal(text: bytes, where: str) -> Journal:
    """What `Journal.text` gave. Raises UsageError for anything else: what that is the user has to say."""
    try:
        raw = json.loads(text)
        return Journal(
            identity=raw["identity"], outputs=tuple(raw["outputs"]), boot=raw["boot"], clearing=raw["clearing"]
        )
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{where} is no journal of a conversion: remove it, or use another place") from error


@dataclass(frozen=True, slots=True)
class Decision:
    """`start` in a place where nothing is, `resume`, `clear` what is there and start, or `refuse`; and why."""

    action: Literal["start", "resume", "clear", "refuse"]
    reason: str


def decide(occupied: bool, journal: Journal | None, mine: Journal, force: bool) -> Decision:
    """Whether a conversion may be done. `occupied`: whether anything is there. Pure."""
    if journal is None and not occupied:
        return Decision("start", "nothing is there")
    same = journal is not None and journal.identity == mine.identity
    if same and journal is not None and not journal.clearing:
        return Decision("resume", "it is this conversion, interrupted")
    if same or force:
        return Decision("clear", "it is this conversion, interrupted at its start" if same else "forced")
    if journal is None:
        return Decision("refuse", "something is there already: give another place, or --force to replace it")
    theirs = journal.identity
    keys = [key for key in mine.identity if theirs.get(key) != mine.identity[key]]
    differ = ", ".join(f"{key}: {_short(theirs.get(key))} there, {_short(mine.identity[key])} now" for key in keys)
    return Decision(
        "refuse", f"another conversion was interrupted there ({differ}): finish that one, or --force to replace it"
    )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
