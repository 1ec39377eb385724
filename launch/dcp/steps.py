"""Which step a `checkpoint_id` of DCP means: 100, "100", "step-100", "outputs/checkpoint/step_100"."""

import os
import re
from contextlib import suppress

from resilient.errors import UsageError

_NUMBER = re.compile(r"(\d+)$")


def names_a_step(checkpoint_id: object) -> bool:
    """Whether `step_of` would tell its step."""
    with suppress(UsageError):
        return step_of(checkpoint_id) >= 0
    return False


def step_of(checkpoint_id: object) -> int:
    """The number at its end. Raises UsageError, naming it, where there is none."""
    if isinstance(checkpoint_id, int) and not isinstance(checkpoint_id, bool) and checkpoint_id >= 0:
        return checkpoint_id
    text = os.fspath(checkpoint_id) if isinstance(checkpoint_id, str | os.PathLike) else ""
    found = _NUMBER.search(str(text).rstrip("/"))
    if found is None:
        raise UsageError(
            f"checkpoint_id={checkpoint_id!r} does not say which step it is: give the step, as checkpoint_id=100 or as "
            "a name that ends with it; the url was given to the reader or writer"
        )
    return int(found[1])
