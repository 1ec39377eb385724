"""Options that several commands have, each defined once."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from resilient.errors import UsageError

if TYPE_CHECKING:
    from resilient.checkpoint.formats.source import Reference

F = TypeVar("F", bound=Callable[..., Any])

# As `checkpoint/formats/registry.py` has them; written out here, for that module brings numpy and torch.
FORMATS = ("native", "dcp", "deepspeed", "deepspeed-universal", "megatron", "safetensors", "torch")
SINKS = ("native", "dcp", "deepspeed-universal", "safetensors", "torch")


def as_json(function: F) -> F:
    return click.option("--json", "as_json", is_flag=True, help="One JSON document on the standard output.")(function)


def opening(function: F) -> F:
    """How to open a checkpoint: --from, --step, --spec, --trust-pickle."""
    for option in reversed(
        (
            click.option("--from", "format_name", type=click.Choice(FORMATS), help="Its format, if not recognised."),
            step,
            spec,
            click.option(
                "--trust-pickle",
                is_flag=True,
                help="Let foreign pickles build any object, which runs their code.",
            ),
        )
    ):
        function = option(function)
    return function


def spec(function: F) -> F:
    return click.option(
        "--spec",
        metavar="FILE|PRESET",
        help="How the ranks' tensors make up the whole ones: a file (docs/spec.md), or the name of a preset.",
    )(function)


def step(function: F) -> F:
    return click.option("--step", type=click.IntRange(min=0), help="The step; the newest complete one if not given.")(
        function
    )


def select(function: F) -> F:
    return click.option(
        "--select", multiple=True, metavar="PATTERN", help="Only tensors whose names match, such as 'model.*.weight'."
    )(function)


def reference(
    url: str, format_name: str | None = None, step: int | None = None, spec: str | None = None, trust: bool = False
) -> "Reference":
    """From what `opening` has given. Raises UsageError for a specification that is neither a file nor a preset."""
    from resilient.checkpoint.formats.source import Reference

    text = None if spec is None else _text_of(spec)
    return Reference(url=url, format=format_name, step=step, spec=text, trust_pickle=trust)


def _text_of(spec: str) -> str:
    from resilient.checkpoint.catalog.spec import PRESETS, preset

    if spec in PRESETS and not Path(spec).exists():
        return preset(spec)
    try:
        return Path(spec).read_text("utf-8")
    except FileNotFoundError:
        raise UsageError(f"--spec {spec}: no such file, and no preset; those are {', '.join(PRESETS)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--spec {spec} cannot be read: {error}") from error
