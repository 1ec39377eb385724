"""What a check says, and what all findings together come to."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any, Self


class Verdict(StrEnum):
    """`WARN`: it works, but not as well, or not for ever. `FAIL`: it would not work."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One line of the report. `change`: what to do about it; empty where nothing has to be done."""

    name: str
    verdict: Verdict
    what: str
    change: str = ""

    def __post_init__(self) -> None:
        assert bool(self.change) == (self.verdict is not Verdict.OK), "what is wrong comes with what to do about it"

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "verdict": str(self.verdict)}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Self:
        return cls(**{**value, "verdict": Verdict(value["verdict"])})


def ok(name: str, what: str) -> Finding:
    return Finding(name=name, verdict=Verdict.OK, what=what)


def warn(name: str, what: str, change: str) -> Finding:
    return Finding(name=name, verdict=Verdict.WARN, what=what, change=change)


def fail(name: str, what: str, change: str) -> Finding:
    return Finding(name=name, verdict=Verdict.FAIL, what=what, change=change)


def worst(findings: Iterable[Finding]) -> Verdict:
    """The gravest verdict among them."""
    found = {finding.verdict for finding in findings}
    return next((verdict for verdict in (Verdict.FAIL, Verdict.WARN) if verdict in found), Verdict.OK)
