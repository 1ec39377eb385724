"""Versions: of Python, of this library, and of those that it works with. Nothing is imported to look at them."""

import platform
import re
from importlib.metadata import PackageNotFoundError, version

from resilient.launch.doctor.finding import Finding, fail, ok, warn

LEAST_PYTHON = (3, 11)
LEAST_TORCH = (2, 9)
TESTED_DEEPSPEED = (0, 19)


def examine() -> list[Finding]:
    """Python, torch, this library, DeepSpeed where there is one. Does not block."""
    return [
        decide_python(platform.python_version()),
        decide_torch(installed("torch")),
        decide_deepspeed(installed("deepspeed")),
        ok("resilient", f"torch-resilient {installed('torch-resilient') or 'from a checkout, not installed'}"),
    ]


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def decide_python(found: str) -> Finding:
    if _numbers(found) >= LEAST_PYTHON:
        return ok("python", f"Python {found}")
    return fail("python", f"Python {found}", f"install Python {_text(LEAST_PYTHON)} or later")


def decide_torch(found: str | None) -> Finding:
    if found is None:
        return fail("torch", "torch is not installed", f"pip install 'torch>={_text(LEAST_TORCH)}'")
    if _numbers(found) >= LEAST_TORCH:
        return ok("torch", f"torch {found}")
    return fail("torch", f"torch {found}", f"pip install 'torch>={_text(LEAST_TORCH)}'")


def decide_deepspeed(found: str | None) -> Finding:
    if found is None:
        return ok("deepspeed", "not installed")
    if _numbers(found) == TESTED_DEEPSPEED:
        return ok("deepspeed", f"DeepSpeed {found}")
    tested = _text(TESTED_DEEPSPEED)
    return warn("deepspeed", f"DeepSpeed {found}; {tested}.x is tested", f"pip install 'deepspeed=={tested}.*'")


def _numbers(text: str) -> tuple[int, int]:
    """The first two numbers of a version; "2.13.0+cpu" is (2, 13)."""
    found = re.match(r"(\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def _text(numbers: tuple[int, int]) -> str:
    return ".".join(map(str, numbers))
